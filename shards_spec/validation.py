"""Checking a data set against the specification: everything is read once, every problem is named."""

import hashlib
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import IO, BinaryIO

from avid_pipeline.shards_spec.errors import AvidPipelineError, SampleError
from avid_pipeline.shards_spec.manifest import Manifest, ShardInfo
from avid_pipeline.shards_spec.reader import ShardReader, stored_spectrogram
from avid_pipeline.shards_spec.sample import (
    MEMBERS,
    RECORD_MEMBER,
    SPECTROGRAM_MEMBER,
    VIDEO_MEMBER,
    SampleRecord,
    is_valid_key,
    parse_record,
)
from avid_pipeline.shards_spec.shard_file import ShardIndex
from avid_pipeline.shards_spec.storage import Storage


@dataclass
class ValidationReport:
    """What a validation found.

    Attributes:
        samples: how many samples were checked.
        bytes: how many bytes of shards were read.
        problems: one line each, naming shard and key; empty when the data set is sound.
    """

    samples: int = 0
    bytes: int = 0
    problems: list[str] = field(default_factory=list)


def validate(storage: Storage, on_shard: Callable[[ShardInfo], object] | None = None) -> ValidationReport:
    """Check every shard of a data set: checksums, counts, index, records and shapes.

    Args:
        storage: the root.
        on_shard: called after each shard, for progress.

    Raises:
        StorageError: the root cannot be read.
        ManifestError: the manifest is missing or invalid; nothing can be checked then.
    """
    reader = ShardReader(storage)
    report = ValidationReport()
    seen: dict[str, str] = {}
    for shard in reader.manifest.shards:
        for key in _validate_shard(reader, shard, report):
            if key.casefold() in seen:
                report.problems.append(f"{shard.name}: key {key} was used in {seen[key.casefold()]} (case ignored)")
            seen[key.casefold()] = shard.name
        if on_shard is not None:
            on_shard(shard)
    return report


def _validate_shard(reader: ShardReader, shard: ShardInfo, report: ValidationReport) -> list[str]:
    """Check one shard in one pass over its bytes; return the keys found in it."""
    try:
        index: ShardIndex | None = reader.index_of(shard)
    except AvidPipelineError as error:
        report.problems.append(str(error))
        index = None
    keys: list[str] = []
    try:
        with reader.storage.open(shard.name) as raw:
            file = _HashingReader(raw)
            try:
                for key, members in _samples(file):
                    place = len(keys)
                    keys.append(key)
                    report.problems += _sample_problems(shard, index, place, key, members, reader.manifest)
            except (tarfile.TarError, EOFError) as error:
                report.problems.append(f"{shard.name}: the tar is damaged after {len(keys)} samples: {error}")
            file.drain()
    except AvidPipelineError as error:
        report.problems.append(str(error))
        return keys
    if file.count != shard.bytes:
        report.problems.append(f"{shard.name}: expected {shard.bytes} bytes, found {file.count}")
    if file.hexdigest() != shard.sha256:
        report.problems.append(f"{shard.name}: sha256: expected {shard.sha256}, found {file.hexdigest()}")
    if len(keys) != shard.samples:
        report.problems.append(f"{shard.name}: expected {shard.samples} samples, found {len(keys)}")
    report.samples += len(keys)
    report.bytes += file.count
    return keys


def _samples(file: "_HashingReader") -> Iterator[tuple[str, dict[str, tuple[int, bytes]]]]:
    """Samples of a tar in order: key, and member name to (offset, content)."""
    current = ""
    members: dict[str, tuple[int, bytes]] = {}
    with tarfile.open(fileobj=file, mode="r|") as tar:  # type: ignore[call-overload]
        for info in tar:
            key, _, member = info.name.partition(".")
            if members and key != current:
                yield current, members
                members = {}
            content = tar.extractfile(info)
            current = key
            members[member] = (info.offset_data, content.read() if content is not None else b"")
    if members:
        yield current, members


def _sample_problems(
    shard: ShardInfo,
    index: ShardIndex | None,
    place: int,
    key: str,
    members: dict[str, tuple[int, bytes]],
    manifest: Manifest,
) -> Iterator[str]:
    where = f"{shard.name}: {key}"
    if not is_valid_key(key):
        yield f"{where}: the key has invalid characters"
    yield from (f"{where}: unknown member {name}" for name in members if name not in MEMBERS)
    expected = {RECORD_MEMBER} | ({VIDEO_MEMBER} if "video" in manifest.modalities else set())
    expected |= {SPECTROGRAM_MEMBER} if "audio" in manifest.modalities else set()
    yield from (f"{where}: member {name} is missing" for name in sorted(expected - members.keys()))
    if index is not None:
        yield from _index_problems(where, index, place, key, members)
    if RECORD_MEMBER not in members:
        return
    try:
        record = parse_record(members[RECORD_MEMBER][1], where)
    except SampleError as error:
        yield str(error)
        return
    yield from _record_problems(where, key, record, members, manifest)


def _index_problems(
    where: str, index: ShardIndex, place: int, key: str, members: dict[str, tuple[int, bytes]]
) -> Iterator[str]:
    if place >= len(index) or index.keys[place] != key:
        yield f"{where}: the index has another key at place {place}"
        return
    for column, name in enumerate(MEMBERS):
        offset, content = members.get(name, (-1, b""))
        size = len(content) if name in members else -1
        in_index = (int(index.offsets[place, column]), int(index.sizes[place, column]))
        if in_index != (offset, size):
            yield f"{where}.{name}: the index says offset and size {in_index}, the tar {(offset, size)}"
        elif size >= 0 and zlib.crc32(content) != index.crc32[place, column]:
            yield f"{where}.{name}: bytes {offset} to {offset + size} are damaged (checksum differs)"


def _record_problems(
    where: str,
    key: str,
    record: SampleRecord,
    members: dict[str, tuple[int, bytes]],
    manifest: Manifest,
) -> Iterator[str]:
    if record.key != key:
        yield f"{where}: the record has key {record.key}"
    for label in record.labels:
        if not 0 <= label < len(manifest.classes):
            yield f"{where}: label {label}: expected 0 to {len(manifest.classes) - 1}"
    for name, part in ((VIDEO_MEMBER, record.video), (SPECTROGRAM_MEMBER, record.audio)):
        if (part is None) != (name not in members):
            yield f"{where}: the record and the members disagree about {name}"
    if record.audio is not None and SPECTROGRAM_MEMBER in members:
        try:
            codes = stored_spectrogram(members[SPECTROGRAM_MEMBER][1], where)
        except SampleError as error:
            yield str(error)
            return
        if len(codes) != record.audio.frames:
            yield f"{where}: spectrogram: expected {record.audio.frames} frames, found {len(codes)}"
        if codes.dtype != manifest.parameters.audio.storage:
            yield f"{where}: spectrogram: expected {manifest.parameters.audio.storage}, found {codes.dtype}"


class _HashingReader:
    """Hashes and counts what is read, so that checksum and structure take one pass."""

    def __init__(self, file: BinaryIO | IO[bytes]) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self.count = 0

    def read(self, size: int = -1) -> bytes:
        data = bytes(self._file.read(size))
        self._hash.update(data)
        self.count += len(data)
        return data

    def drain(self) -> None:
        while self.read(1 << 20):
            pass

    def hexdigest(self) -> str:
        return self._hash.hexdigest()
