"""One sample: its members in the tar, its record, its key."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import Field, ValidationError

from avid_pipeline.shards_spec.errors import SampleError
from avid_pipeline.shards_spec.manifest import Record, describe_validation_error

VIDEO_MEMBER = "mp4"
SPECTROGRAM_MEMBER = "spectrogram.npy"
RECORD_MEMBER = "json"
MEMBERS = (VIDEO_MEMBER, SPECTROGRAM_MEMBER, RECORD_MEMBER)

MAX_KEY_LENGTH = 80
_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")


class VideoRecord(Record):
    """The stored video stream.

    Attributes:
        frames: number of frames.
        fps: frames a second.
        width: in pixels.
        height: in pixels.
        start: when the first frame is shown, in seconds on the sample's clock.
    """

    frames: int = Field(ge=1)
    fps: float = Field(gt=0)
    width: int = Field(ge=2)
    height: int = Field(ge=2)
    start: float


class AudioRecord(Record):
    """The stored spectrogram.

    Attributes:
        frames: number of spectrogram frames.
        frames_per_second: of the spectrogram.
        start: when the first sample sounds, in seconds on the sample's clock.
    """

    frames: int = Field(ge=1)
    frames_per_second: float = Field(gt=0)
    start: float


class OriginalRecord(Record):
    """What the source was like before conversion; None where it did not say."""

    width: int | None = None
    height: int | None = None
    fps: float | None = None
    video_codec: str | None = None
    audio_codec: str | None = None
    audio_sample_rate: int | None = None


class SampleRecord(Record):
    """``KEY.json``.

    Attributes:
        key: the sample's key, unique in the data set.
        id: the data set's own name of this video, for example a YouTube id with its times.
        source: path of the source relative to the data set's folder, with forward slashes.
        source_sha256: checksum of the source file.
        labels: positions in the manifest's ``classes``; none, one or many.
        duration: seconds from the earlier start to the later end of picture and sound.
        video: None where the data set has no picture.
        audio: None where the data set has no sound.
        original: what the source was like.
        segment: start and end, in seconds of the source, of the part that was converted; None for all of it.
    """

    key: str
    id: str
    source: str
    source_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    labels: tuple[int, ...]
    duration: float = Field(gt=0)
    video: VideoRecord | None
    audio: AudioRecord | None
    original: OriginalRecord
    segment: tuple[float, float] | None = None

    def to_json(self) -> bytes:
        """UTF-8 JSON in one line, stable to the byte."""
        return json.dumps(self.model_dump(mode="json"), ensure_ascii=False).encode()


@dataclass(frozen=True)
class Sample:
    """One sample as it lies in a shard: its record, its encoded video and its ``.npy`` spectrogram.

    ``video`` and ``spectrogram`` are None where the data set lacks that modality.
    """

    record: SampleRecord
    video: bytes | None
    spectrogram: bytes | None

    def members(self) -> dict[str, bytes]:
        """Member suffix to content, in the order of the tar."""
        present = {VIDEO_MEMBER: self.video, SPECTROGRAM_MEMBER: self.spectrogram}
        return {name: data for name, data in present.items() if data is not None} | {
            RECORD_MEMBER: self.record.to_json()
        }


def parse_record(data: bytes, where: str) -> SampleRecord:
    """Read ``KEY.json``.

    Args:
        data: its content.
        where: shard and key, for messages.

    Raises:
        SampleError: it is no valid record; the message names the field.
    """
    try:
        return SampleRecord.model_validate_json(data)
    except ValidationError as error:
        raise SampleError(f"{where}: {describe_validation_error(error)}") from error


def is_valid_key(key: str) -> bool:
    """Whether a key has only letters, digits, ``_`` and ``-``, no leading ``-``, and at most 80 characters."""
    return len(key) <= MAX_KEY_LENGTH and _KEY.fullmatch(key) is not None


def assign_keys(names: Sequence[str]) -> list[str]:
    """Keys for source names (relative paths without their ending), in the same order.

    A key is the last part of the name where that is a valid key and no other source (not even one that differs
    only in case) wants it; otherwise invalid characters become ``_`` and ``-`` plus eight hexadecimal digits of
    the whole name's SHA-256 are appended (all 64 digits where two keys would be equal even so).

    Raises:
        SampleError: two names are equal.
    """
    if len(set(names)) != len(names):
        repeated = next(name for name in names if names.count(name) > 1)
        raise SampleError(f"{repeated}: is listed twice; list every source once")
    plain = [name.rsplit("/", 1)[-1] for name in names]
    wanted = Counter(stem.casefold() for stem in plain)
    keys = [
        stem if is_valid_key(stem) and wanted[stem.casefold()] == 1 else _distinct_key(stem, name, 8)
        for stem, name in zip(plain, names, strict=True)
    ]
    taken = Counter(key.casefold() for key in keys)
    return [
        key if taken[key.casefold()] == 1 else _distinct_key(stem, name, 64)
        for key, stem, name in zip(keys, plain, names, strict=True)
    ]


def _distinct_key(stem: str, name: str, digits: int) -> str:
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:digits]
    cleaned = re.sub(r"[^A-Za-z0-9_-]", "_", stem)[: MAX_KEY_LENGTH - digits - 2]
    return f"{'_' if cleaned[:1] in ('', '-') else ''}{cleaned}-{digest}"
