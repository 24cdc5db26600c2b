"""Checking one shard in one pass over its bytes, one sample in memory at a time."""

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from avid_pipeline.shards_spec.deep_validation import SpectrogramSums, spectrogram_problems, video_problems
from avid_pipeline.shards_spec.errors import AvidPipelineError, SampleError, ShardError
from avid_pipeline.shards_spec.manifest import Parameters, ShardInfo
from avid_pipeline.shards_spec.reader import stored_spectrogram
from avid_pipeline.shards_spec.sample import (
    MEMBERS,
    RECORD_MEMBER,
    SPECTROGRAM_MEMBER,
    VIDEO_MEMBER,
    SampleRecord,
    is_valid_key,
    parse_record,
)
from avid_pipeline.shards_spec.sequential import Member, SequentialReader, tar_members
from avid_pipeline.shards_spec.shard_file import ShardIndex, load_index
from avid_pipeline.shards_spec.storage import Storage

_CLOCK_TOLERANCE = 0.01


@dataclass(frozen=True)
class ShardCheck:
    """What to check, and against what.

    Attributes:
        storage: the root.
        shard: the shard.
        parameters: of the data set.
        modalities: that every sample must have; others it may have.
        num_classes: labels are below it.
        deep: decode all pictures and look at all spectrogram values.
    """

    storage: Storage
    shard: ShardInfo
    parameters: Parameters
    modalities: tuple[str, ...]
    num_classes: int
    deep: bool


@dataclass
class ShardFindings:
    """What was found in a shard.

    Attributes:
        shard: the shard.
        bytes: how many were read.
        problems: one line each, naming shard and key.
        keys: of the samples, in order.
        with_audio: instance indices of the samples that have sound.
        audio_frames: spectrogram frames of all samples.
        sums: over all spectrogram values; empty unless deep.
    """

    shard: ShardInfo
    bytes: int = 0
    problems: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    with_audio: list[int] = field(default_factory=list)
    audio_frames: int = 0
    sums: SpectrogramSums = field(default_factory=SpectrogramSums)


def check_shard(check: ShardCheck, on_sample: Callable[[], object]) -> ShardFindings:
    """Check one shard; everything that is wrong is in the findings.

    Args:
        check: what to check.
        on_sample: called after each sample, for progress.
    """
    shard, findings = check.shard, ShardFindings(check.shard)
    index = _read_index(check, findings.problems)
    try:
        with SequentialReader(check.storage, shard.name) as reader:
            try:
                largest = int(index.sizes.max(initial=0)) if index is not None else reader.size
                for members in _samples(tar_members(reader, largest)):
                    _check_sample(check, index, members, findings)
                    on_sample()
            except ShardError as error:
                found = f"the tar is damaged after {len(findings.keys)} samples: {error}"
                findings.problems.append(f"{shard.name}: {found}")
            for _ in reader.pieces():
                pass
            findings.bytes = reader.count
            if reader.count != shard.bytes:
                findings.problems.append(f"{shard.name}: expected {shard.bytes} bytes, found {reader.count}")
            if reader.hexdigest() != shard.sha256:
                problem = f"sha256: expected {shard.sha256}, found {reader.hexdigest()}"
                findings.problems.append(f"{shard.name}: {problem}")
    except AvidPipelineError as error:
        findings.problems.append(str(error))
        return findings
    if len(findings.keys) != shard.samples:
        findings.problems.append(f"{shard.name}: expected {shard.samples} samples, found {len(findings.keys)}")
    return findings


def _read_index(check: ShardCheck, problems: list[str]) -> ShardIndex | None:
    name = check.shard.index_name
    try:
        index = load_index(check.storage, name)
    except AvidPipelineError as error:
        problems.append(str(error))
        return None
    if len(index) != check.shard.samples:
        problems.append(f"{name}: expected {check.shard.samples} samples as in the manifest, found {len(index)}")
    return index


def _samples(members: Iterator[Member]) -> Iterator[list[Member]]:
    """Members of one key that follow each other."""
    sample: list[Member] = []
    for member in members:
        if sample and member.key != sample[0].key:
            yield sample
            sample = []
        sample.append(member)
    if sample:
        yield sample


def _check_sample(check: ShardCheck, index: ShardIndex | None, members: list[Member], findings: ShardFindings) -> None:
    place, key = len(findings.keys), members[0].key
    findings.keys.append(key)
    where = f"{check.shard.name}: {key}"
    by_name = {member.name: member for member in members}
    findings.problems += _member_problems(check, where, key, members)
    if index is not None:
        findings.problems += _index_problems(where, index, place, key, by_name)
    if SPECTROGRAM_MEMBER in by_name:
        findings.with_audio.append(check.shard.first_index + place)
    if RECORD_MEMBER not in by_name:
        return
    try:
        record = parse_record(by_name[RECORD_MEMBER].content, where)
    except SampleError as error:
        findings.problems.append(str(error))
        return
    findings.problems += _record_problems(check, where, key, record, by_name)
    if record.video is not None and VIDEO_MEMBER in by_name and check.deep:
        content = by_name[VIDEO_MEMBER].content
        findings.problems += video_problems(content, record.video, check.parameters.video, where)
    if record.audio is not None and SPECTROGRAM_MEMBER in by_name:
        _check_spectrogram(check, where, record.audio.frames, by_name[SPECTROGRAM_MEMBER].content, findings)


def _check_spectrogram(check: ShardCheck, where: str, frames: int, content: bytes, findings: ShardFindings) -> None:
    try:
        codes = stored_spectrogram(content, where)
    except SampleError as error:
        findings.problems.append(str(error))
        return
    findings.audio_frames += len(codes)
    if len(codes) != frames:
        findings.problems.append(f"{where}: spectrogram: expected {frames} frames as in the record, found {len(codes)}")
    if codes.dtype != check.parameters.audio.storage:
        expected = check.parameters.audio.storage
        findings.problems.append(f"{where}: spectrogram: expected {expected}, found {codes.dtype}")
    if check.deep:
        findings.problems += spectrogram_problems(codes, findings.sums, where)


def _member_problems(check: ShardCheck, where: str, key: str, members: list[Member]) -> Iterator[str]:
    if not is_valid_key(key):
        yield f"{where}: the key has invalid characters"
    names = [member.name for member in members]
    yield from (f"{where}: unknown member {name}" for name in names if name not in MEMBERS)
    known = [name for name in names if name in MEMBERS]
    if known != sorted(set(known), key=MEMBERS.index):
        yield f"{where}: expected members once each and in the order {', '.join(MEMBERS)}, found {', '.join(known)}"
    required = {"video": VIDEO_MEMBER, "audio": SPECTROGRAM_MEMBER}
    expected = {RECORD_MEMBER} | {required[modality] for modality in check.modalities}
    yield from (f"{where}: member {name} is missing" for name in sorted(expected - set(names)))


def _index_problems(where: str, index: ShardIndex, place: int, key: str, members: dict[str, Member]) -> Iterator[str]:
    if place >= len(index) or index.keys[place] != key:
        yield f"{where}: the index has another key at place {place}"
        return
    for column, name in enumerate(MEMBERS):
        offset = members[name].offset if name in members else -1
        size = len(members[name].content) if name in members else -1
        in_index = (int(index.offsets[place, column]), int(index.sizes[place, column]))
        if in_index != (offset, size):
            yield f"{where}.{name}: the index says offset and size {in_index}, the tar {(offset, size)}"
        elif size >= 0 and zlib.crc32(members[name].content) != index.crc32[place, column]:
            yield f"{where}.{name}: bytes {offset} to {offset + size} are damaged (checksum differs)"


def _record_problems(
    check: ShardCheck, where: str, key: str, record: SampleRecord, members: dict[str, Member]
) -> Iterator[str]:
    if record.key != key:
        yield f"{where}: the record has key {record.key}"
    for label in record.labels:
        if not 0 <= label < check.num_classes:
            yield f"{where}: label {label}: expected 0 to {check.num_classes - 1}"
    for name, part in ((VIDEO_MEMBER, record.video), (SPECTROGRAM_MEMBER, record.audio)):
        if (part is None) != (name not in members):
            yield f"{where}: the record and the members disagree about {name}"
    video, audio = check.parameters.video, check.parameters.audio
    ends, starts = [], []
    if record.video is not None:
        starts.append(record.video.start)
        ends.append(record.video.start + record.video.frames / record.video.fps)
        if video.codec != "copy":
            size = (record.video.width, record.video.height)
            if record.video.fps != video.fps:
                yield f"{where}: video: expected {video.fps} frames/s, found {record.video.fps:g}"
            if min(size) > video.short_side or size[0] % 2 or size[1] % 2:
                expected = f"an even size, the shorter side at most {video.short_side}"
                yield f"{where}: video: expected {expected}, found {size[0]}x{size[1]}"
    if record.audio is not None:
        starts.append(record.audio.start)
        ends.append(record.audio.start + record.audio.frames / record.audio.frames_per_second)
        if record.audio.frames_per_second != audio.frames_per_second:
            found = f"{record.audio.frames_per_second:g}"
            yield f"{where}: spectrogram: expected {audio.frames_per_second} frames/s, found {found}"
    if starts and abs(min(starts)) > _CLOCK_TOLERANCE:
        yield f"{where}: expected picture or sound to start at 0 s, found {min(starts):g} s"
    if ends and video.codec != "copy" and abs(max(ends) - record.duration) > _CLOCK_TOLERANCE:
        yield f"{where}: duration: expected {max(ends):.3f} s, the later end of picture and sound, " + (
            f"found {record.duration:.3f} s"
        )
