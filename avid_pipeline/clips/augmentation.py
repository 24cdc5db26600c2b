"""Augmentation parameters are data: drawn here, on the host, and only applied elsewhere.

The generator of a clip is keyed by (seed, epoch, instance, visit), so the same clip comes out on any worker,
rank or device.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from avid_pipeline.clips.settings import AugmentationSettings

FloatArray = npt.NDArray[np.float32]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

MID_GREY = 128.0
_CROP_ATTEMPTS = 10
_TEST_CROP = 224 / 256
# NTSC's luminance and chrominance axes, with the digits DALI uses for its colour operators.
_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]])
_MEAN, _STD = 255 * np.array(IMAGENET_MEAN)[:, None], 255 * np.array(IMAGENET_STD)[:, None]
_YIQ_TO_NORMALISED = np.linalg.inv(_YIQ) / _STD


@dataclass(frozen=True)
class CropBox:
    """A crop in pixels of the decoded frame; ``flip`` mirrors it left to right."""

    top: float
    left: float
    height: float
    width: float
    flip: bool = False


@dataclass(frozen=True)
class Augmentation:
    """All that is done to a clip after decoding.

    Attributes:
        crop: which part of the picture is scaled to the clip's size; of height and width 0 where there is no picture.
        colour: float32 [3, 4]; RGB in [0, 255] with a one appended to normalised RGB.
        volume_db: added to the spectrogram, in dB.
    """

    crop: CropBox
    colour: FloatArray
    volume_db: float


def clip_generator(seed: int, epoch: int, instance: int, visit: int) -> np.random.Generator:
    """The generator of one clip, keyed by ``(seed, epoch, instance, visit)``, none of them negative."""
    return np.random.default_rng([seed, epoch, instance, visit])


def draw_augmentation(
    settings: AugmentationSettings, height: int, width: int, generator: np.random.Generator
) -> Augmentation:
    """Draw a training augmentation for frames of a size (0 by 0 where there is no picture).

    Takes 28 uniform numbers from the generator whatever the settings and the size, so that volume, flip and colour
    do not depend on the crop: volume, flip, brightness, contrast, saturation, hue, top, left, and ten attempts'
    areas and ratios.
    """
    uniform = generator.random(8 + 2 * _CROP_ATTEMPTS).tolist()
    gain = _between((1 - settings.volume, 1 + settings.volume), uniform[0])
    brightness, contrast, saturation = (
        _between((max(0.0, 1 - strength), 1 + strength), number)
        for strength, number in zip(
            (settings.brightness, settings.contrast, settings.saturation), uniform[2:5], strict=True
        )
    )
    hue = _between((-settings.hue, settings.hue), uniform[5])
    return Augmentation(
        crop=_crop(settings, height, width, uniform[1] < settings.flip, uniform[6:]),
        colour=colour_matrix(brightness, contrast, saturation, hue),
        volume_db=20 * math.log10(gain),
    )


def evaluation_augmentation(height: int, width: int) -> Augmentation:
    """The evaluation transform: shorter side to 256/224 of the crop's size, then the centre."""
    side = min(height, width) * _TEST_CROP
    crop = CropBox((height - side) / 2, (width - side) / 2, side, side)
    return Augmentation(crop, colour_matrix(), volume_db=0.0)


def colour_matrix(
    brightness: float = 1.0, contrast: float = 1.0, saturation: float = 1.0, hue: float = 0.0
) -> FloatArray:
    """Fold all colour operations and ImageNet normalisation into one matrix.

    Args:
        brightness: factor on the values.
        contrast: factor on the distance from mid grey (128).
        saturation: factor on the YIQ chrominance.
        hue: rotation of the YIQ chrominance, in full turns.

    Returns:
        float32 [3, 4], to be applied to RGB in [0, 255] with a one appended.
    """
    cosine, sine = saturation * math.cos(2 * math.pi * hue), saturation * math.sin(2 * math.pi * hue)
    chrominance = np.array([[1, 0, 0], [0, cosine, sine], [0, -sine, cosine]])
    matrix = np.empty((3, 4), dtype=np.float32)
    matrix[:, :3] = brightness * contrast * (_YIQ_TO_NORMALISED @ chrominance @ _YIQ)
    matrix[:, 3:] = (brightness * MID_GREY * (1 - contrast) - _MEAN) / _STD
    return matrix


def _crop(settings: AugmentationSettings, height: int, width: int, flip: bool, uniform: list[float]) -> CropBox:
    """A random crop at a place in whole pixels of the frame, each as likely as any other."""
    if height == 0 or width == 0:
        return CropBox(0, 0, 0, 0)
    if settings.crop == "resize":
        crop_height = crop_width = min(height, width) * _TEST_CROP
    else:
        size = _multi_scale_size(settings, height, width, uniform[2:])
        if size is None:
            return _largest_crop(settings, height, width, flip)
        crop_height, crop_width = size
    top, left = int(uniform[0] * int(height - crop_height + 1)), int(uniform[1] * int(width - crop_width + 1))
    return CropBox(top, left, crop_height, crop_width, flip)


def _multi_scale_size(
    settings: AugmentationSettings, height: int, width: int, uniform: list[float]
) -> tuple[int, int] | None:
    """RandomResizedCrop's height and width: ten attempts at a uniform area and a log-uniform ratio, else None."""
    log_ratio = math.log(settings.ratio[0]), math.log(settings.ratio[1])
    for attempt in range(_CROP_ATTEMPTS):
        area = height * width * _between(settings.area, uniform[2 * attempt])
        ratio = math.exp(_between(log_ratio, uniform[2 * attempt + 1]))
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            return crop_height, crop_width
    return None


def _largest_crop(settings: AugmentationSettings, height: int, width: int, flip: bool) -> CropBox:
    """The largest crop of an allowed ratio, in the centre."""
    ratio = min(max(width / height, settings.ratio[0]), settings.ratio[1])
    crop_height, crop_width = min(height, round(width / ratio)), min(width, round(height * ratio))
    return CropBox((height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width, flip)


def _between(limits: tuple[float, float], uniform: float) -> float:
    return limits[0] + uniform * (limits[1] - limits[0])
