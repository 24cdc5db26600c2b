"""Building one shard: the unit of work that executors run anywhere."""

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from avid_pipeline.preprocess.convert import convert
from avid_pipeline.preprocess.quarantine import QuarantineEntry, SourceRejectedError
from avid_pipeline.preprocess.sources.base import Source
from avid_pipeline.shards_spec.errors import StorageError
from avid_pipeline.shards_spec.manifest import Parameters, Record, SpectrogramStatistics
from avid_pipeline.shards_spec.reader import read_spectrogram
from avid_pipeline.shards_spec.shard_file import ShardWriter
from avid_pipeline.shards_spec.spectrogram import NUM_FREQUENCIES
from avid_pipeline.shards_spec.storage import Storage, open_storage

PROGRESS_FOLDER = "_progress"
BUILDING_PREFIX = ".building-"


@dataclass(frozen=True)
class ShardTask:
    """Everything needed to build one shard, on any machine that sees the sources and the root.

    Attributes:
        number: which shard.
        root: URL of the data set.
        sources: in the order of the shard, with their keys and label positions.
        parameters: how to store them.
    """

    number: int
    root: str
    sources: tuple[tuple[Source, str, tuple[int, ...]], ...]
    parameters: Parameters

    @property
    def name(self) -> str:
        """``shard-000000.tar``."""
        return f"shard-{self.number:06d}.tar"


class SpectrogramSums(Record):
    """Sums over stored spectrogram frames, from which statistics of the whole data set follow.

    Attributes:
        frames: how many.
        total: 257 sums in dB.
        squares: 257 sums of squares.
    """

    frames: int
    total: tuple[float, ...]
    squares: tuple[float, ...]


class ShardReport(Record):
    """What became of a shard's sources; written when the shard is in its place, so it marks the shard as done.

    ``samples`` is 0, and there is no tar, where every source was quarantined.
    """

    number: int
    name: str
    samples: int
    bytes: int
    sha256: str
    sums: SpectrogramSums
    quarantined: tuple[QuarantineEntry, ...]


def report_name(number: int) -> str:
    """Where a shard's report is, below the root."""
    return f"{PROGRESS_FOLDER}/shard-{number:06d}.json"


def _index_name(name: str) -> str:
    return name.removesuffix(".tar") + ".index.npz"


def read_report(storage: Storage, number: int) -> ShardReport | None:
    """The report of a finished shard; None where it has to be built (again)."""
    if not storage.exists(report_name(number)):
        return None
    try:
        report = ShardReport.model_validate_json(storage.read(report_name(number)))
    except ValidationError:
        return None
    if report.samples and (storage.size(report.name) != report.bytes or not storage.exists(_index_name(report.name))):
        return None
    return report


def build_shard(task: ShardTask, on_source: Callable[[], object] | None = None) -> ShardReport:
    """Convert a task's sources, write the shard, its index and, last, its report.

    Args:
        task: what to build.
        on_source: called after each source, for progress.

    Raises:
        StorageError: the root cannot be written.
    """
    storage = open_storage(task.root)
    frames, total, squares = 0, np.zeros(NUM_FREQUENCIES), np.zeros(NUM_FREQUENCIES)
    quarantined: list[QuarantineEntry] = []
    with _building_folder(storage) as folder:
        path = folder / task.name
        with ShardWriter(path) as writer:
            for source, key, labels in task.sources:
                try:
                    sample = convert(source, key, labels, task.parameters)
                except SourceRejectedError as error:
                    quarantined.append(QuarantineEntry(source=source.name, reason=error.reason, detail=error.detail))
                else:
                    writer.add(sample)
                    if sample.spectrogram is not None:
                        decibels = read_spectrogram(sample.spectrogram, key).astype(np.float64)
                        frames += len(decibels)
                        total += decibels.sum(axis=0)
                        squares += np.square(decibels).sum(axis=0)
                if on_source is not None:
                    on_source()
            shard = writer.finish()
        if shard.samples:
            storage.write(_index_name(task.name), shard.index.to_bytes())
            storage.upload(path, task.name)
    report = ShardReport(
        number=task.number,
        name=task.name,
        samples=shard.samples,
        bytes=shard.bytes,
        sha256=shard.sha256,
        sums=SpectrogramSums(frames=frames, total=tuple(total.tolist()), squares=tuple(squares.tolist())),
        quarantined=tuple(quarantined),
    )
    storage.write(report_name(task.number), json.dumps(report.model_dump(mode="json")).encode())
    return report


@contextmanager
def _building_folder(storage: Storage) -> Iterator[Path]:
    """A temporary folder, on the root's own disk where it has one, so that finishing a shard is a rename."""
    try:
        with tempfile.TemporaryDirectory(prefix=BUILDING_PREFIX, dir=storage.local_root) as folder:
            yield Path(folder)
    except OSError as error:
        raise StorageError(
            f"{storage.local_root or tempfile.gettempdir()}: cannot write: {error.strerror}; make room or permit it, "
            "and run the command again (finished shards are kept)"
        ) from error


def combine_sums(reports: list[ShardReport]) -> SpectrogramStatistics | None:
    """Per-frequency mean and standard deviation over all shards; None where no shard has sound."""
    frames = sum(report.sums.frames for report in reports)
    if frames == 0:
        return None
    mean = np.sum([report.sums.total for report in reports], axis=0) / frames
    variance = np.sum([report.sums.squares for report in reports], axis=0) / frames - np.square(mean)
    std = np.sqrt(np.maximum(variance, 0))
    return SpectrogramStatistics(mean=tuple(mean.tolist()), std=tuple(std.tolist()), frames=frames)
