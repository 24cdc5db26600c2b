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
_TEST_RESIZE = 256 / 224
# NTSC's luminance and chrominance axes, with the digits DALI uses for its colour operators.
_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]])


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
        crop: which part of the picture is scaled to the clip's size.
        colour: float32 [3, 4]; RGB in [0, 255] with a one appended to normalised RGB.
        volume_db: added to the spectrogram, in dB.
    """

    crop: CropBox
    colour: FloatArray
    volume_db: float


def clip_generator(seed: int, epoch: int, instance: int, visit: int) -> np.random.Generator:
    """The generator of one clip, keyed by ``(seed, epoch, instance, visit)``."""
    return np.random.default_rng([seed, epoch, instance, visit])


def draw_augmentation(
    settings: AugmentationSettings, height: int, width: int, generator: np.random.Generator
) -> Augmentation:
    """Draw a training augmentation for frames of a size.

    The order of draws is fixed: crop, flip, brightness, contrast, saturation, hue, volume.
    """
    crop = _draw_crop(settings, height, width, generator)
    flip = bool(generator.random() < settings.flip)
    brightness, contrast, saturation = (
        generator.uniform(max(0.0, 1 - strength), 1 + strength)
        for strength in (settings.brightness, settings.contrast, settings.saturation)
    )
    hue = generator.uniform(-settings.hue, settings.hue)
    gain = generator.uniform(1 - settings.volume, 1 + settings.volume)
    return Augmentation(
        crop=CropBox(crop.top, crop.left, crop.height, crop.width, flip),
        colour=colour_matrix(brightness, contrast, saturation, hue),
        volume_db=20 * math.log10(gain),
    )


def evaluation_augmentation(height: int, width: int) -> Augmentation:
    """The evaluation transform: shorter side to 256/224 of the crop's size, then the centre."""
    side = min(height, width) / _TEST_RESIZE
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
    angle = 2 * math.pi * hue
    turn = np.array([[1, 0, 0], [0, math.cos(angle), math.sin(angle)], [0, -math.sin(angle), math.cos(angle)]])
    chrominance = np.diag([1, saturation, saturation])
    linear = brightness * contrast * np.linalg.inv(_YIQ) @ turn @ chrominance @ _YIQ
    offset = np.full((3, 1), brightness * MID_GREY * (1 - contrast))
    mean, std = 255 * np.array(IMAGENET_MEAN)[:, None], 255 * np.array(IMAGENET_STD)[:, None]
    return np.hstack([linear / std, (offset - mean) / std]).astype(np.float32)


def _draw_crop(settings: AugmentationSettings, height: int, width: int, generator: np.random.Generator) -> CropBox:
    """RandomResizedCrop's box: ten attempts at an area and a log-uniform ratio, else the largest centre crop."""
    for _ in range(_CROP_ATTEMPTS):
        area = height * width * generator.uniform(*settings.area)
        ratio = math.exp(generator.uniform(math.log(settings.ratio[0]), math.log(settings.ratio[1])))
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(generator.integers(0, height - crop_height + 1))
            left = int(generator.integers(0, width - crop_width + 1))
            return CropBox(top, left, crop_height, crop_width)
    ratio = min(max(width / height, settings.ratio[0]), settings.ratio[1])
    crop_height, crop_width = min(height, round(width / ratio)), min(width, round(height * ratio))
    return CropBox((height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width)
