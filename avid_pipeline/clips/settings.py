"""What a clip is, and how it is augmented (design section 6)."""

from pydantic import Field, ValidationInfo, field_validator

from avid_pipeline.config import Settings


class ClipSettings(Settings):
    """Length and size of a clip.

    Attributes:
        video_seconds: length of the picture.
        fps: frames a second of the picture.
        crop_size: height and width of the picture in pixels.
        audio_seconds: length of the sound.
        max_offset: how far, in seconds, the shorter of the two may reach out of the longer at either end.
    """

    video_seconds: float = Field(0.5, gt=0)
    fps: float = Field(16, gt=0)
    crop_size: int = Field(224, ge=16)
    audio_seconds: float = Field(2.0, gt=0)
    max_offset: float = Field(0.5, ge=0)

    @property
    def num_frames(self) -> int:
        """Frames of the picture."""
        return max(1, round(self.video_seconds * self.fps))


class AugmentationSettings(Settings):
    """Random changes to training clips, the same for all frames of a clip.

    Attributes:
        area: range of the crop's share of the picture.
        ratio: range of the crop's width divided by its height.
        flip: probability of a horizontal flip.
        brightness: factors are drawn from [1 - x, 1 + x].
        contrast: likewise, about mid grey.
        saturation: likewise.
        hue: turns are drawn from [-x, x], in full turns of the YIQ colour plane.
        volume: gains are drawn from [1 - x, 1 + x].
    """

    area: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
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
