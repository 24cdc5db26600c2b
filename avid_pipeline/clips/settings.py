"""What a clip is, and how it is augmented (design section 6)."""

from typing import Literal, Self

import numpy as np
from pydantic import Field, ValidationInfo, field_validator, model_validator

from avid_pipeline.config import Settings
from avid_pipeline.errors import ConfigError
from avid_pipeline.shards_spec.manifest import WITH_AUDIO, Manifest, Modality

_MULTI_SCALE_AREA = (0.08, 1.0)
_MULTI_SCALE_RATIO = (3 / 4, 4 / 3)


class ClipSettings(Settings):
    """Length and size of a clip.

    Attributes:
        video_seconds: length of the picture.
        fps: frames a second of the picture.
        crop_size: height and width of the picture in pixels.
        audio_seconds: length of the sound.
        max_offset: how far, in seconds, the shorter of the two may reach out of the longer at either end.
        modalities: what is read: picture, sound or both; None for what every sample of a data set has (see
            :func:`resolve_modalities`). A clip is chosen as if its sample had nothing else.
    """

    video_seconds: float = Field(0.5, gt=0)
    fps: float = Field(16, gt=0)
    crop_size: int = Field(224, ge=16)
    audio_seconds: float = Field(2.0, gt=0)
    max_offset: float = Field(0.5, ge=0)
    modalities: tuple[Modality, ...] | None = None

    @field_validator("modalities")
    @classmethod
    def _in_order(cls, value: tuple[Modality, ...] | None) -> tuple[Modality, ...] | None:
        if value is not None and value not in (("video",), ("audio",), ("video", "audio")):
            raise ValueError(f"expected [video], [audio] or [video, audio], found {list(value)}")
        return value

    @property
    def num_frames(self) -> int:
        """Frames of the picture."""
        return max(1, round(self.video_seconds * self.fps))


class AugmentationSettings(Settings):
    """Random changes to training clips, the same for all frames of a clip.

    Attributes:
        crop: ``multi_scale`` takes a box of random area and ratio (pre-training, fine-tuning); ``resize`` scales the
            shorter side to 256/224 of the crop's size and takes a square at a random place (linear probes).
        area: range of the crop's share of the picture, for ``multi_scale``.
        ratio: range of the crop's width divided by its height, for ``multi_scale``.
        flip: probability of a horizontal flip.
        brightness: factors are drawn from [max(0, 1 - x), 1 + x].
        contrast: likewise, about mid grey.
        saturation: likewise.
        hue: turns are drawn from [-x, x], in full turns of the YIQ colour plane.
        volume: gains are drawn from [1 - x, 1 + x].
    """

    crop: Literal["multi_scale", "resize"] = "multi_scale"
    area: tuple[float, float] = _MULTI_SCALE_AREA
    ratio: tuple[float, float] = _MULTI_SCALE_RATIO
    flip: float = Field(0.5, ge=0, le=1)
    brightness: float = Field(0.4, ge=0)
    contrast: float = Field(0.4, ge=0)
    saturation: float = Field(0.4, ge=0)
    hue: float = Field(0.2, ge=0, le=0.5)
    volume: float = Field(0.1, ge=0, lt=1)

    @field_validator("area", "ratio")
    @classmethod
    def _is_range(cls, value: tuple[float, float], info: ValidationInfo) -> tuple[float, float]:
        highest = 1.0 if info.field_name == "area" else float("inf")
        if not 0 < value[0] <= value[1] <= highest:
            limit = " <= 1" if info.field_name == "area" else ""
            raise ValueError(f"expected [lowest, highest] with 0 < lowest <= highest{limit}, found {list(value)}")
        return value

    @model_validator(mode="after")
    def _no_idle_ranges(self) -> Self:
        if self.crop == "resize" and (self.area, self.ratio) != (_MULTI_SCALE_AREA, _MULTI_SCALE_RATIO):
            raise ValueError("area and ratio have no meaning with crop: resize; leave them out, or crop: multi_scale")
        return self


def resolve_modalities(settings: ClipSettings, manifest: Manifest, subset: str | None = None) -> ClipSettings:
    """Say which modalities clips of a data set have, so that no sample lacks one.

    Args:
        settings: their ``modalities`` are kept where given.
        manifest: of the data set.
        subset: the named subset that is read, None for all samples. One whose samples all have sound, as those of
            ``with-audio`` do, has sound even where the data set as a whole has none.

    Returns:
        The settings with ``modalities`` set.

    Raises:
        ConfigError: a modality is wanted that not every sample has; the message says what to do.
        ManifestError: there is no such subset.
    """
    available = manifest.modalities
    if subset is not None and "audio" not in available and _all_have_sound(manifest, subset):
        available = (*available, "audio")
    wanted = settings.modalities or tuple(sorted(available, reverse=True))
    lacking = [modality for modality in wanted if modality not in available]
    if lacking:
        where = f"the subset {subset}" if subset is not None else f"{manifest.dataset} ({manifest.split})"
        remedy = f"; samples with sound are its subset {WITH_AUDIO}" if WITH_AUDIO in manifest.subsets else ""
        raise ConfigError(
            f"clip.modalities: expected what every sample of {where} has, which is {' and '.join(available)}, "
            f"found also {' and '.join(lacking)}{remedy}"
        )
    return settings.model_copy(update={"modalities": wanted})


def _all_have_sound(manifest: Manifest, subset: str) -> bool:
    indices = manifest.subset_indices(subset)
    with_sound = manifest.subset_indices(WITH_AUDIO) if WITH_AUDIO in manifest.subsets else indices[:0]
    return len(indices) > 0 and bool(np.isin(indices, with_sound).all())
