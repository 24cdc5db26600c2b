"""The manifest: what a data set holds, and which instance index each sample has.

Read it first, and only it, to know every sample's index: *a sample's instance index is its shard's first index
plus its place in the shard*.
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from avid_pipeline.shards_spec.errors import ManifestError
from avid_pipeline.shards_spec.spectrogram import NUM_FREQUENCIES, SpectrogramStorage
from avid_pipeline.shards_spec.storage import Storage

SPEC_VERSION: Literal[1] = 1
MANIFEST_NAME = "manifest.json"
QUARANTINE_NAME = "quarantine.jsonl"
# The subset of samples with sound, in a data set where some have none.
WITH_AUDIO = "with-audio"

Modality = Literal["video", "audio"]
VideoCodec = Literal["h264", "hevc", "vp9", "mjpeg", "copy"]
Tune = Literal["none", "film", "animation", "grain", "fastdecode"]
Preset = Literal["ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow"]


class Record(BaseModel):
    """Base of everything that is written as JSON: unknown fields are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class VideoParameters(Record):
    """How videos are stored.

    Attributes:
        codec: of ``KEY.mp4``; ``copy`` keeps the source's video stream as it is.
        fps: constant frames a second.
        short_side: the shorter side is at most this many pixels (never upscaled, even).
        gop: frames from one key frame to the next.
        quality: constant rate factor for h264, hevc and vp9 (smaller is better); quantiser for mjpeg.
        preset: the encoder's speed preset, for h264 and hevc.
        tune: what h264's encoder is tuned for; ``none`` for nothing.
    """

    codec: VideoCodec = "h264"
    fps: int = Field(16, ge=1, le=240)
    short_side: int = Field(256, ge=16, le=4096)
    gop: int = Field(8, ge=1, le=600)
    quality: int = Field(23, ge=0, le=63)
    preset: Preset = "veryfast"
    tune: Tune = "fastdecode"


class AudioParameters(Record):
    """How sound is stored: see :mod:`avid_pipeline.shards_spec.spectrogram`.

    Attributes:
        sample_rate: samples a second before the transform.
        frames_per_second: spectrogram frames a second.
        transform_points: length of the Fourier transform in samples.
        storage: dtype of ``KEY.spectrogram.npy``.
    """

    sample_rate: int = Field(24_000, ge=8_000, le=192_000)
    frames_per_second: int = Field(100, ge=1, le=1000)
    transform_points: Literal[1024] = 1024
    storage: SpectrogramStorage = "uint8"


class Parameters(Record):
    """Everything that decides the bytes of the shards, apart from the sources."""

    video: VideoParameters = VideoParameters()
    audio: AudioParameters = AudioParameters()
    samples_per_shard: int = Field(256, ge=1, le=1_000_000)
    shuffle_seed: int = Field(0, ge=0)

    def fingerprint(self) -> str:
        """``sha256:…`` of the canonical JSON of these parameters."""
        return fingerprint(self.model_dump(mode="json"))


class SpectrogramStatistics(Record):
    """Per-frequency statistics of the stored log spectrograms.

    Attributes:
        mean: 257 means in dB.
        std: 257 standard deviations in dB (population).
        frames: how many frames they were computed over.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    frames: int = Field(ge=1)

    @model_validator(mode="after")
    def _lengths(self) -> "SpectrogramStatistics":
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != NUM_FREQUENCIES:
                raise ValueError(f"{name}: expected {NUM_FREQUENCIES} values, found {len(values)}")
        return self

    def arrays(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """``(mean, std)`` as float32 [257]."""
        return np.asarray(self.mean, dtype=np.float32), np.asarray(self.std, dtype=np.float32)


class ShardInfo(Record):
    """One shard: its file name, how many samples and bytes it has, and the instance index of its first sample."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+\.tar$")
    samples: int = Field(ge=1)
    bytes: int = Field(ge=1024)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    first_index: int = Field(ge=0)

    @property
    def index_name(self) -> str:
        """Name of the tar index: ``shard-000000.index.npz``."""
        return self.name.removesuffix(".tar") + ".index.npz"


class Manifest(Record):
    """What is in a data set; ``<root>/manifest.json``.

    Attributes:
        spec_version: version of the specification, 1.
        dataset: name of the data set, for example ``kinetics``.
        split: for example ``train``.
        parameters: how the samples were made.
        parameters_fingerprint: ``Parameters.fingerprint()`` when they were made.
        modalities: which of ``video`` and ``audio`` every sample has.
        classes: class names; a label is a position in this list.
        spectrogram_statistics: None where there is no sound.
        shards: in the order of their first index.
        quarantined: how many sources did not become samples.
        subsets: name to half-open ranges of instance indices, ascending and apart, for example a fold's part; a data
            set where some samples lack sound has ``with-audio``.
    """

    spec_version: Literal[1] = SPEC_VERSION
    dataset: str
    split: str
    parameters: Parameters
    parameters_fingerprint: str
    modalities: tuple[Modality, ...] = Field(min_length=1)
    classes: tuple[str, ...]
    spectrogram_statistics: SpectrogramStatistics | None
    shards: tuple[ShardInfo, ...]
    quarantined: int = Field(ge=0)
    subsets: dict[str, tuple[tuple[int, int], ...]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _consistent(self) -> "Manifest":
        expected = 0
        for shard in self.shards:
            if shard.first_index != expected:
                raise ValueError(f"shards: {shard.name} must begin at index {expected}, found {shard.first_index}")
            expected += shard.samples
        if len({shard.name for shard in self.shards}) != len(self.shards):
            raise ValueError("shards: two shards have the same name")
        found = self.parameters.fingerprint()
        if self.parameters_fingerprint != found:
            raise ValueError(
                f"parameters_fingerprint: expected {found}, found {self.parameters_fingerprint}: "
                "the parameters were changed by hand"
            )
        for name, ranges in self.subsets.items():
            edges = [edge for pair in ranges for edge in pair]
            if edges != sorted(set(edges)) or (edges and not 0 <= edges[0] < edges[-1] <= self.num_samples):
                raise ValueError(
                    f"subsets.{name}: expected ascending ranges of indices within 0 to {self.num_samples}, "
                    "not touching each other"
                )
        return self

    @property
    def num_samples(self) -> int:
        """Number of instances, which is the number of rows of a memory bank."""
        return sum(shard.samples for shard in self.shards)

    def fingerprint(self) -> str:
        """``sha256:…`` of the whole manifest; part of every stream state."""
        return fingerprint(self.model_dump(mode="json"))

    def locate(self, index: int) -> tuple[ShardInfo, int]:
        """The shard of an instance index, and the sample's place in it.

        Raises:
            ManifestError: no such index.
        """
        if not 0 <= index < self.num_samples:
            raise ManifestError(f"instance index {index}: expected 0 to {self.num_samples - 1}")
        place = bisect_right(self.shards, index, key=lambda shard: shard.first_index) - 1
        return self.shards[place], index - self.shards[place].first_index

    def subset_indices(self, name: str) -> npt.NDArray[np.int64]:
        """The instance indices of a named subset, int64 [n], ascending.

        Raises:
            ManifestError: there is no subset of that name.
        """
        if name not in self.subsets:
            known = ", ".join(sorted(self.subsets)) or "none"
            raise ManifestError(f"subset {name}: this data set has no such subset; it has: {known}")
        ranges = [np.arange(start, stop, dtype=np.int64) for start, stop in self.subsets[name]]
        return np.concatenate(ranges) if ranges else np.empty(0, dtype=np.int64)

    def to_json(self) -> bytes:
        """UTF-8 JSON, stable to the byte."""
        return (json.dumps(self.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n").encode()


def index_ranges(indices: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Ascending instance indices as the half-open ranges of :attr:`Manifest.subsets`."""
    ranges: list[tuple[int, int]] = []
    for index in indices:
        if ranges and ranges[-1][1] == index:
            ranges[-1] = (ranges[-1][0], index + 1)
        else:
            ranges.append((index, index + 1))
    return tuple(ranges)


def fingerprint(value: Any) -> str:
    """``sha256:…`` of a JSON value, independent of key order."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def describe_validation_error(error: ValidationError) -> str:
    """A pydantic error as ``field: problem`` lines joined by ``; ``."""
    parts = []
    for item in error.errors():
        field = ".".join(str(part) for part in item["loc"])
        parts.append(f"{field}: {item['msg']}" if field else item["msg"])
    return "; ".join(parts)


def read_manifest(storage: Storage) -> Manifest:
    """Read and check ``manifest.json`` below a root.

    Raises:
        StorageError: the root cannot be read.
        ManifestError: there is none, or it is not JSON, of another version, or inconsistent; the message names the
            field.
    """
    if not storage.exists(MANIFEST_NAME):
        raise ManifestError(
            f"{storage.url_of(MANIFEST_NAME)}: does not exist, so this is not a finished data set; "
            "run avid-preprocess (again, if it was interrupted)"
        )
    data = storage.read(MANIFEST_NAME)
    try:
        content = json.loads(data)
    except ValueError as error:
        raise ManifestError(f"{storage.url_of(MANIFEST_NAME)}: is not JSON: {error}") from error
    version = content.get("spec_version") if isinstance(content, dict) else None
    if version != SPEC_VERSION:
        raise ManifestError(
            f"{storage.url_of(MANIFEST_NAME)}: spec_version: expected {SPEC_VERSION}, found {version!r}; "
            "convert the data set again or use the avid-pipeline release that wrote it"
        )
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        problems = describe_validation_error(error)
        raise ManifestError(f"{storage.url_of(MANIFEST_NAME)}: {problems}") from error
