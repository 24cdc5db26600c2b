"""What the samples of a data set are like: durations, sizes, classes and what their sources were.

Only indices and records (``KEY.json``) are read, by ranged reads; no video and no spectrogram.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from avid_pipeline.shards_spec.errors import SampleError
from avid_pipeline.shards_spec.manifest import ShardInfo
from avid_pipeline.shards_spec.parallel import in_threads
from avid_pipeline.shards_spec.reader import ShardReader
from avid_pipeline.shards_spec.sample import MEMBERS, RECORD_MEMBER, SPECTROGRAM_MEMBER, VIDEO_MEMBER, SampleRecord

_THREADS = 8
_CLASSES_SHOWN = 5
_KINDS_SHOWN = 6

Table = tuple[str, tuple[str, ...], list[tuple[str, ...]]]


@dataclass
class DatasetStatistics:
    """Values of all samples that were looked at.

    Attributes:
        total: samples in the data set.
        class_names: of the data set.
        durations: seconds, one for each sample.
        sizes: bytes by member (mp4, spectrogram.npy, json), one for each sample, 0 where it has no such member.
        offsets: seconds from the start of the picture to that of the sound, where a sample has both.
        labels: samples by label.
        unlabelled: samples without a label.
        resolutions: samples by original width and height.
        frame_rates: samples by original frames a second.
        codecs: samples by original codecs.
    """

    total: int
    class_names: tuple[str, ...]
    durations: list[float] = field(default_factory=list)
    sizes: dict[str, list[int]] = field(default_factory=lambda: {name: [] for name in MEMBERS})
    offsets: list[float] = field(default_factory=list)
    labels: Counter[int] = field(default_factory=Counter)
    unlabelled: int = 0
    resolutions: Counter[tuple[int, int] | None] = field(default_factory=Counter)
    frame_rates: Counter[float | None] = field(default_factory=Counter)
    codecs: Counter[str] = field(default_factory=Counter)

    @property
    def count(self) -> int:
        """Samples that were looked at."""
        return len(self.durations)

    def class_counts(self) -> npt.NDArray[np.int64]:
        """Samples by class, int64 [classes]."""
        return np.array([self.labels[label] for label in range(len(self.class_names))], dtype=np.int64)

    def sample_bytes(self) -> npt.NDArray[np.int64]:
        """Bytes of all members, int64 [samples]."""
        total: npt.NDArray[np.int64] = np.sum([np.asarray(self.sizes[name]) for name in MEMBERS], axis=0)
        return total

    def _add(self, record: SampleRecord, sizes: Iterable[int]) -> None:
        self.durations.append(record.duration)
        for name, size in zip(MEMBERS, sizes, strict=True):
            self.sizes[name].append(max(0, size))
        if record.video is not None and record.audio is not None:
            self.offsets.append(record.audio.start - record.video.start)
        self.labels.update(record.labels)
        self.unlabelled += not record.labels
        original = record.original
        known = original.width is not None and original.height is not None
        self.resolutions[(original.width, original.height) if known else None] += 1  # type: ignore[index]
        self.frame_rates[None if original.fps is None else round(original.fps, 2)] += 1
        self.codecs[f"{original.video_codec or 'no picture'}, {original.audio_codec or 'no sound'}"] += 1


def choose(reader: ShardReader, count: int | None, seed: int) -> list[tuple[ShardInfo, list[int] | None]]:
    """The shards and places of ``count`` samples, or all (None).

    Samples are drawn without repetition by ``numpy.random.default_rng(seed)``: the same data set, count and seed give
    the same samples.
    """
    shards = reader.manifest.shards
    if count is None or count >= len(reader):
        return [(shard, None) for shard in shards]
    drawn = np.sort(np.random.default_rng(seed).choice(len(reader), size=count, replace=False))
    edges = np.searchsorted(drawn, [shard.first_index for shard in shards] + [len(reader)])
    parts = [
        (shard, (drawn[start:stop] - shard.first_index).tolist())
        for shard, start, stop in zip(shards, edges[:-1], edges[1:], strict=True)
    ]
    return [(shard, places) for shard, places in parts if places]


def collect(
    reader: ShardReader,
    *,
    sample: int | None = None,
    seed: int = 0,
    on_samples: Callable[[int], object] = lambda count: None,
) -> DatasetStatistics:
    """Read the records of a data set, many at once.

    Args:
        reader: the data set.
        sample: look at this many samples only.
        seed: that draws them.
        on_samples: called with the number of samples read since the last call, for progress.

    Raises:
        SampleError: the data set is empty, or a record is not valid.
        ShardError: an index or a record is damaged.
    """
    if len(reader) == 0:
        raise SampleError(f"{reader.storage.url}: the data set has no samples, so there is nothing to count")
    statistics = DatasetStatistics(len(reader), reader.manifest.classes)

    def read(part: tuple[ShardInfo, list[int] | None]) -> tuple[list[SampleRecord], list[list[int]]]:
        shard, places = part
        sizes = reader.index_of(shard).sizes
        return reader.read_records(shard, places), (sizes if places is None else sizes[places]).tolist()

    for records, sizes in in_threads(read, choose(reader, sample, seed), _THREADS):
        for record, row in zip(records, sizes, strict=True):
            statistics._add(record, row)
        on_samples(len(records))
    return statistics


def tables(statistics: DatasetStatistics) -> list[Table]:
    """The statistics as titled tables: title, column names, rows."""
    found: list[Table] = [("", (), _overview(statistics)), _distributions(statistics)]
    if statistics.class_names:
        found.append(_classes(statistics))
    resolutions = Counter(
        {f"{size[0]}x{size[1]}" if size else "unknown": count for size, count in statistics.resolutions.items()}
    )
    rates = Counter({"unknown" if fps is None else f"{fps:g}": count for fps, count in statistics.frame_rates.items()})
    for title, counts in (
        ("original size", resolutions),
        ("original frames/s", rates),
        ("original codecs", statistics.codecs),
    ):
        found.append((title, (title, "samples", ""), _frequent(counts, statistics.count)))
    return found


def _overview(statistics: DatasetStatistics) -> list[tuple[str, ...]]:
    looked_at = f"{statistics.count:,}" + ("" if statistics.count == statistics.total else f" of {statistics.total:,}")
    total = int(statistics.sample_bytes().sum())
    rows: list[tuple[str, ...]] = [
        ("samples", looked_at),
        ("duration in all", in_hours(sum(statistics.durations))),
        ("bytes in all", f"{total / 1e6:,.1f} MB"),
    ]
    for name, title in ((VIDEO_MEMBER, "videos"), (SPECTROGRAM_MEMBER, "spectrograms"), (RECORD_MEMBER, "records")):
        size = sum(statistics.sizes[name])
        present = sum(1 for one in statistics.sizes[name] if one)
        rows.append((f"bytes of {title}", f"{size / 1e6:,.1f} MB, {size / total:.1%}, in {present:,} samples"))
    return rows


def in_hours(seconds: float) -> str:
    """A duration as hours, or minutes where it is short, with its unit."""
    return f"{seconds / 3600:,.2f} hours" if seconds >= 3600 else f"{seconds / 60:.2f} minutes"


def _distributions(statistics: DatasetStatistics) -> Table:
    columns: list[tuple[str, npt.NDArray[np.float64], str]] = [
        ("duration, s", np.asarray(statistics.durations), ",.2f"),
        ("bytes a sample", statistics.sample_bytes().astype(float), ",.0f"),
    ]
    for name, title in ((VIDEO_MEMBER, "bytes of video"), (SPECTROGRAM_MEMBER, "bytes of spectrogram")):
        columns.append((title, np.array([size for size in statistics.sizes[name] if size], dtype=float), ",.0f"))
    columns.append(("sound after picture, s", np.asarray(statistics.offsets), ",.3f"))
    rows = []
    for title, values, form in columns:
        if values.size:
            median, high = np.percentile(values, [50, 95])
            shown = (values.min(), values.mean(), median, high, values.max())
            rows.append((title, *(format(value, form) for value in shown)))
    return "distribution", ("distribution", "min", "mean", "median", "95 %", "max"), rows


def _classes(statistics: DatasetStatistics) -> Table:
    counts = statistics.class_counts()
    order = sorted(range(len(counts)), key=lambda label: (-counts[label], label))
    present = [label for label in order if counts[label]]
    shown = present if len(present) <= 2 * _CLASSES_SHOWN else present[:_CLASSES_SHOWN] + present[-_CLASSES_SHOWN:]
    rows: list[tuple[str, ...]] = []
    for place, label in enumerate(shown):
        if place == _CLASSES_SHOWN and len(shown) < len(present):
            rows.append((f"… {len(present) - len(shown):,} more classes", "", ""))
        rows.append((statistics.class_names[label], f"{counts[label]:,}", f"{counts[label] / statistics.count:.1%}"))
    rows.append((f"{len(counts) - len(present):,} of {len(counts):,} classes without a sample", "", ""))
    if statistics.unlabelled:
        share = statistics.unlabelled / statistics.count
        rows.append(("samples without a class", f"{statistics.unlabelled:,}", f"{share:.1%}"))
    several = int(counts.sum()) - (statistics.count - statistics.unlabelled)
    if several:
        rows.append(("labels a sample, mean", f"{counts.sum() / statistics.count:.2f}", ""))
    return "class", ("class", "samples", ""), rows


def _frequent(counts: Counter[str], total: int) -> list[tuple[str, ...]]:
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    rows: list[tuple[str, ...]] = [
        (name, f"{count:,}", f"{count / total:.1%}") for name, count in ordered[:_KINDS_SHOWN]
    ]
    rest = sum(count for _, count in ordered[_KINDS_SHOWN:])
    if rest:
        rows.append((f"… {len(ordered) - _KINDS_SHOWN:,} more", f"{rest:,}", f"{rest / total:.1%}"))
    return rows
