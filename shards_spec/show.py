"""One sample, readably: its record, where it lies, and its members as files."""

from dataclasses import dataclass
from pathlib import Path

from avid_pipeline.shards_spec.errors import SampleError, ShardError, StorageError
from avid_pipeline.shards_spec.manifest import Manifest, ShardInfo
from avid_pipeline.shards_spec.reader import ShardReader
from avid_pipeline.shards_spec.sample import (
    MEMBERS,
    RECORD_MEMBER,
    OriginalRecord,
    SampleRecord,
    is_valid_key,
    parse_record,
)
from avid_pipeline.shards_spec.shard_file import ShardIndex


@dataclass(frozen=True)
class LocatedSample:
    """A sample's record and where it lies.

    Attributes:
        index: instance index.
        shard: its shard.
        place: its place in the shard.
        tar_index: byte offsets and sizes of the shard's members.
        record: its record.
        members: contents by member name that were read.
    """

    index: int
    shard: ShardInfo
    place: int
    tar_index: ShardIndex
    record: SampleRecord
    members: dict[str, bytes]


def resolve(reader: ShardReader, key_or_index: str, *, is_key: bool = False) -> int:
    """The instance index that a user's text means: digits are an index, everything else is a key.

    Args:
        reader: the data set.
        key_or_index: the text.
        is_key: take it for a key even when it has digits only.

    Raises:
        SampleError: there is no such sample.
        ShardError: a key was searched and an index is damaged.
    """
    if is_key or not (key_or_index.isascii() and key_or_index.isdigit()):
        return reader.find(key_or_index)
    # Compared by length first: Python refuses to convert thousands of digits.
    digits = key_or_index.lstrip("0") or "0"
    if len(digits) > len(str(len(reader))) or int(digits) >= len(reader):
        raise SampleError(
            f"{reader.storage.url}: expected an instance index from 0 to {len(reader) - 1}, found {key_or_index}; "
            "add --key if this is the key of a sample"
        )
    return int(digits)


def locate(reader: ShardReader, index: int, *, whole: bool = False) -> LocatedSample:
    """Read a sample's record (``whole``: all of its members) in one ranged read of its shard.

    Raises:
        ManifestError: no such index.
        ShardError: what was read is damaged.
        SampleError: the record is not valid.
    """
    shard, place = reader.manifest.locate(index)
    tar_index = reader.index_of(shard)
    if whole:
        members = reader.read_members(shard, place)
        record = parse_record(members[RECORD_MEMBER], f"{reader.storage.url_of(shard.name)}: {tar_index.keys[place]}")
    else:
        record = reader.read_records(shard, [place])[0]
        members = {}
    return LocatedSample(index, shard, place, tar_index, record, members)


def facts(sample: LocatedSample, manifest: Manifest) -> list[tuple[str, str]]:
    """What there is to say about a sample, as names and texts."""
    record = sample.record
    labels = [manifest.classes[label] if label < len(manifest.classes) else "?" for label in record.labels]
    named = [f"{name} ({label})" for name, label in zip(labels, record.labels, strict=True)]
    subsets = [name for name, ranges in manifest.subsets.items() if _within(sample.index, ranges)]
    rows = [
        ("key", record.key),
        ("id", record.id),
        ("index", f"{sample.index} of {manifest.num_samples:,}"),
        ("place", f"{sample.place} in {sample.shard.name}"),
        ("source", record.source),
        ("source sha256", record.source_sha256),
        ("labels", ", ".join(named) or "none"),
        ("subsets", ", ".join(subsets) or "none"),
        ("duration", f"{record.duration:.3f} s"),
    ]
    if record.segment is not None:
        rows.append(("segment", f"{record.segment[0]:g} s to {record.segment[1]:g} s of the source"))
    if record.video is not None:
        video = record.video
        seconds = f"{video.start:.3f} s to {video.start + video.frames / video.fps:.3f} s"
        rows.append(("video", f"{video.width}x{video.height}, {video.frames} frames at {video.fps:g}/s, {seconds}"))
    if record.audio is not None:
        audio = record.audio
        seconds = f"{audio.start:.3f} s to {audio.start + audio.frames / audio.frames_per_second:.3f} s"
        rows.append(("spectrogram", f"{audio.frames} frames at {audio.frames_per_second:g}/s, {seconds}"))
    rows.append(("original", _original(record.original)))
    for column, name in enumerate(MEMBERS):
        tar_index = sample.tar_index
        size, offset = int(tar_index.sizes[sample.place, column]), int(tar_index.offsets[sample.place, column])
        if size >= 0:
            crc32 = int(tar_index.crc32[sample.place, column])
            rows.append((f".{name}", f"{size:,} bytes at {offset:,} of the shard, crc32 {crc32:08x}"))
    return rows


def _within(index: int, ranges: tuple[tuple[int, int], ...]) -> bool:
    return any(start <= index < stop for start, stop in ranges)


def _original(original: OriginalRecord) -> str:
    parts = []
    if original.width is not None and original.height is not None:
        parts.append(f"{original.width}x{original.height}")
    if original.fps is not None:
        parts.append(f"{original.fps:g} frames/s")
    parts += [codec for codec in (original.video_codec, original.audio_codec) if codec is not None]
    if original.audio_sample_rate is not None:
        parts.append(f"{original.audio_sample_rate} Hz")
    return ", ".join(parts) or "unknown"


def extract(sample: LocatedSample, folder: Path) -> list[Path]:
    """Write a sample's members, as they are, as ``KEY.mp4``, ``KEY.spectrogram.npy`` and ``KEY.json``.

    Args:
        sample: the whole sample.
        folder: made if it is missing; files of these names are replaced.

    Raises:
        ShardError: the key is not safe as a file name, or is not the record's.
        StorageError: the folder cannot be written.
    """
    key = sample.tar_index.keys[sample.place]
    if not is_valid_key(key) or sample.record.key != key:
        raise ShardError(
            f"{sample.shard.name}: key {key!r}: expected letters, digits, '_' and '-' only, and the same key as in the "
            f"record ({sample.record.key!r}); nothing was written: check the data set with avid-shards validate"
        )
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in sample.members.items():
            path = folder / f"{key}.{name}"
            partial = folder / f".{path.name}.partial"
            partial.write_bytes(content)
            partial.replace(path)
            written.append(path)
    except OSError as error:
        raise StorageError(f"{folder}: cannot write: {error.strerror}; give another folder") from error
    return written
