"""Building one shard: the unit of work that executors run anywhere."""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from avid_pipeline.preprocess.convert import Converted, PlannedSource, convert
from avid_pipeline.preprocess.fetch import Fetcher
from avid_pipeline.preprocess.finished import FinishedSamples
from avid_pipeline.preprocess.quarantine import QuarantineEntry, SourceRejectedError
from avid_pipeline.preprocess.settings import Settings
from avid_pipeline.preprocess.spectrogram_file import SpectrogramSums, sum_spectrogram
from avid_pipeline.shards_spec.errors import StorageError
from avid_pipeline.shards_spec.manifest import Parameters, Record
from avid_pipeline.shards_spec.sample import RECORD_MEMBER, SPECTROGRAM_MEMBER, VIDEO_MEMBER
from avid_pipeline.shards_spec.shard_file import ShardWriter
from avid_pipeline.shards_spec.storage import Storage, open_storage

PROGRESS_FOLDER = "_progress"
BUILDING_PREFIX = ".building-"


@dataclass(frozen=True)
class ShardTask:
    """Everything needed to build one shard, on any machine that sees the sources and the root.

    Attributes:
        number: which shard.
        root: URL of the data set.
        sources: in the order of the shard.
        parameters: how to store them.
        settings: which streams to convert, and what a source may cost.
        retry: keep the samples of the finished shard and try only the sources in its quarantine again.
    """

    number: int
    root: str
    sources: tuple[PlannedSource, ...]
    parameters: Parameters
    settings: Settings
    retry: bool = False

    @property
    def name(self) -> str:
        """``shard-000000.tar``."""
        return f"shard-{self.number:06d}.tar"


class ShardReport(Record):
    """What became of a shard's sources; written when the shard is in its place, so it marks the shard as done.

    ``samples`` is 0, and there is no tar, where every source was quarantined. ``without_video`` and ``without_audio``
    are the places in the shard of samples that lack it.
    """

    number: int
    name: str
    samples: int
    bytes: int
    sha256: str
    sums: SpectrogramSums
    without_video: tuple[int, ...]
    without_audio: tuple[int, ...]
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
        PreprocessError: converting failed for a reason that lies not in a source.
    """
    storage = open_storage(task.root, options=task.settings.storage_options)
    with _building_folder(storage) as folder:
        finished = _take_finished(task, storage, folder)
        path = folder / task.name
        with ShardWriter(path) as writer:
            tally = _fill(task, writer, finished, folder, on_source or (lambda: None))
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
        sums=tally.sums,
        without_video=tuple(tally.without_video),
        without_audio=tuple(tally.without_audio),
        quarantined=tuple(tally.quarantined),
    )
    storage.write(report_name(task.number), json.dumps(report.model_dump(mode="json")).encode())
    return report


class _Tally:
    """What a shard holds so far."""

    def __init__(self) -> None:
        self.samples = 0
        self.sums = SpectrogramSums()
        self.without_video: list[int] = []
        self.without_audio: list[int] = []
        self.quarantined: list[QuarantineEntry] = []

    def add(self, files: dict[str, Path]) -> None:
        if VIDEO_MEMBER not in files:
            self.without_video.append(self.samples)
        if SPECTROGRAM_MEMBER in files:
            self.sums = self.sums.plus(sum_spectrogram(files[SPECTROGRAM_MEMBER]))
        else:
            self.without_audio.append(self.samples)
        self.samples += 1


def _take_finished(task: ShardTask, storage: Storage, folder: Path) -> FinishedSamples | None:
    """The samples of the shard that is to be built again; from here on it is not finished any more."""
    report = read_report(storage, task.number) if task.retry else None
    if report is None:
        return None
    rejected = {entry.source for entry in report.quarantined}
    kept = [planned.key for planned in task.sources if planned.source.name not in rejected]
    finished = FinishedSamples.take(storage, report.name, report.sha256, kept, folder) if kept else None
    storage.delete(report_name(task.number))
    return finished


def _fill(
    task: ShardTask,
    writer: ShardWriter,
    finished: FinishedSamples | None,
    folder: Path,
    on_source: Callable[[], object],
) -> _Tally:
    fetcher = Fetcher(task.settings.source_options, task.settings.limits)
    tally = _Tally()
    for planned in task.sources:
        work = folder / "sample"
        work.mkdir()
        try:
            if finished is not None and planned.key in finished:
                files = finished.extract(planned.key, work)
                writer.add_members(planned.key, files)
            else:
                converted: Converted = convert(planned, task.parameters, task.settings, fetcher, work)
                files = converted.files
                writer.add_members(planned.key, {**files, RECORD_MEMBER: converted.record.to_json()})
        except SourceRejectedError as error:
            name = planned.source.name
            tally.quarantined.append(QuarantineEntry(source=name, reason=error.reason, detail=error.detail))
        else:
            tally.add(files)
        shutil.rmtree(work)
        on_source()
    return tally


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
