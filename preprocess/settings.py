"""What a conversion may do and take: everything that decides which sources become samples, but not their bytes."""

from dataclasses import dataclass, field
from typing import Literal

from avid_pipeline.shards_spec.manifest import Modality, Record

MissingAudio = Literal["quarantine", "keep"]


class Limits(Record):
    """What one source may cost; more is quarantined as ``limit_exceeded``, so that no file can exhaust a machine.

    Attributes:
        seconds: length of its picture or sound.
        frames: frames of its picture.
        pixels: width times height of its picture.
        bytes: size of its file.
    """

    seconds: float = 6 * 3600
    frames: int = 2_000_000
    pixels: int = 36_000_000
    bytes: int = 64 * 10**9


@dataclass(frozen=True)
class Settings:
    """How sources are converted.

    Attributes:
        modalities: what is converted of each source.
        missing_audio: what becomes of a source without sound, where sound is wanted: ``quarantine``, or ``keep`` to
            store it without.
        limits: what one source may cost.
        timeout: seconds that the conversion of one source may take.
        source_options: of the object store that sources come from.
        storage_options: of the object store that shards go to.
    """

    modalities: tuple[Modality, ...] = ("video", "audio")
    missing_audio: MissingAudio = "quarantine"
    limits: Limits = field(default_factory=Limits)
    timeout: float = 7200.0
    source_options: dict[str, str] = field(default_factory=dict)
    storage_options: dict[str, str] = field(default_factory=dict)
