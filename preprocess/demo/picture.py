"""The picture of a demo video: three shapes that move together before a striped background."""

import colorsys
from typing import Final

import numpy as np
from numpy.typing import NDArray

from avid_pipeline.preprocess.demo.causes import HiddenCauses, Shape, geometric

__all__ = ["FRAMES_PER_SECOND", "HEIGHT", "WIDTH", "render_frames"]

WIDTH: Final = 160
HEIGHT: Final = 120
# Not the 16 frames per second of the shards, so that transcoding has to resample.
FRAMES_PER_SECOND: Final = 25

# Red, orange, yellow, green, cyan, blue, violet, magenta: equal steps to the eye, which even steps of hue are not.
# Hue is a circle and pitch is not, so the two ends do not meet.
_HUES: Final = (0.0, 0.075, 0.155, 0.33, 0.5, 0.62, 0.75, 0.87)
_RADIUS_PIXELS: Final = (10.0, 23.0)
_STRIPES_PER_PIXEL: Final = (0.03, 0.15)
_STAR_POINTS: Final = 5
_STAR_INNER_RADIUS: Final = 0.5
_NOISE_DEVIATION: Final = 3.0

_Array = NDArray[np.float32]


def render_frames(causes: HiddenCauses, seconds: float, generator: np.random.Generator) -> NDArray[np.uint8]:
    """Draw the frames of one instance.

    Args:
        causes: What to draw.
        seconds: Duration.
        generator: For what the sound knows nothing of: places, angles and camera noise.

    Returns:
        frames_THWC: RGB, ``[round(seconds * 25), 120, 160, 3]``.
    """
    count = round(seconds * FRAMES_PER_SECOND)
    cycles_T = causes.cycles(np.arange(count) / FRAMES_PER_SECOND)
    frames_THWC = np.repeat(_background(causes, generator)[None], count, axis=0)
    frames_THWC += _NOISE_DEVIATION * generator.standard_normal((count, HEIGHT, WIDTH, 1), dtype=np.float32)

    radius = geometric(_RADIUS_PIXELS, causes.size)
    fill_C = _rgb(causes.colour, saturation=0.85, value=0.96)
    for slot in range(3):
        home_x = WIDTH * (slot + 0.5) / 3 + generator.uniform(-4, 4)
        home_y = HEIGHT * 0.5 + generator.uniform(-18, 18)
        angle = generator.uniform(0, 2 * np.pi)
        offsets_T2, scale_T2, tilt_T = _movement(causes, cycles_T)
        centers_T2 = np.array([home_x, home_y]) + offsets_T2
        _draw(frames_THWC, causes.shape, centers_T2, radius * scale_T2, angle + tilt_T, fill_C)
    return np.clip(np.rint(frames_THWC), 0, 255).astype(np.uint8)


def _rgb(position: float, saturation: float, value: float) -> _Array:
    """Colour at ``position`` (0 to 1) on the way from red to magenta, ``[3]``, 0 to 255."""
    hue = float(np.interp(position * (len(_HUES) - 1), np.arange(len(_HUES)), _HUES))
    return np.array(colorsys.hsv_to_rgb(hue, saturation, value), np.float32) * 255


def _background(causes: HiddenCauses, generator: np.random.Generator) -> _Array:
    """Soft slanted stripes in two shades of one hue, darker towards the corners, ``[H, W, 3]``."""
    y_H1, x_1W = np.mgrid[:HEIGHT, :WIDTH].astype(np.float32)
    slant = generator.uniform(0, np.pi)
    along_HW = x_1W * np.cos(slant) + y_H1 * np.sin(slant)
    density = geometric(_STRIPES_PER_PIXEL, causes.grain)
    wave_HW = np.sin(2 * np.pi * (density * along_HW + generator.random()))
    blend_HW = 0.5 + 0.5 * np.tanh(2 * wave_HW) / np.tanh(2)
    dark_C, light_C = (_rgb(causes.backdrop, 0.75, value) for value in (0.26, 0.46))
    distance_HW = np.hypot((x_1W - WIDTH / 2) / WIDTH, (y_H1 - HEIGHT / 2) / HEIGHT)
    shade_HW = 1 - 0.5 * distance_HW**2
    background: _Array = ((dark_C + (light_C - dark_C) * blend_HW[..., None]) * shade_HW[..., None]).astype(np.float32)
    return background


def _movement(
    causes: HiddenCauses, cycles_T: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Displacement in pixels ``[T, 2]`` (x, y), scale ``[T, 2]`` and turn in radians ``[T]``."""
    turn_T = 2 * np.pi * cycles_T
    still_T = np.zeros_like(cycles_T)
    if causes.motion == "bouncing":
        height_T = np.abs(np.sin(turn_T / 2))
        squash_T = 0.3 * np.exp(-((height_T / 0.3) ** 2))
        return (
            np.stack([still_T, 14 - 28 * height_T], axis=1),
            np.stack([1 + 0.6 * squash_T, 1 - squash_T], axis=1),
            still_T,
        )
    if causes.motion == "swinging":
        sway_T = np.sin(turn_T)
        return np.stack([18 * sway_T, still_T], axis=1), np.ones((len(cycles_T), 2)), 0.5 * sway_T
    scale_T = 1 + 0.38 * np.cos(turn_T)
    return np.zeros((len(cycles_T), 2)), np.stack([scale_T, scale_T], axis=1), still_T


def _draw(
    frames_THWC: _Array,
    shape: Shape,
    centers_T2: NDArray[np.float64],
    radii_T2: NDArray[np.float64],
    angles_T: NDArray[np.float64],
    fill_C: _Array,
) -> None:
    """Blend one shape, with a dark rim and a soft light from above, into every frame in place."""
    # Only a square window around the shape is computed: that is several times faster than whole frames.
    half = int(np.ceil(radii_T2.max() * 1.3)) + 2
    corners_T2 = np.floor(centers_T2).astype(int) - half
    grid_P = np.arange(2 * half + 1)
    x_T1P = (corners_T2[:, 0, None, None] + grid_P - centers_T2[:, 0, None, None]).astype(np.float32)
    y_TP1 = (corners_T2[:, 1, None, None] + grid_P[:, None] - centers_T2[:, 1, None, None]).astype(np.float32)
    outside_TPP = _distance_outside(shape, x_T1P, y_TP1, radii_T2, angles_T)
    alpha_TPP = np.clip(0.5 - outside_TPP, 0, 1)
    rim_TPP = np.clip(outside_TPP + 2.5, 0, 1)
    light_TPP = (1 - 0.25 * y_TP1 / radii_T2.max()) * (1 - 0.65 * rim_TPP)
    color_TPPC = np.minimum(light_TPP[..., None] * fill_C, 255)

    for frame_HWC, (left, top), alpha_PP, color_PPC in zip(frames_THWC, corners_T2, alpha_TPP, color_TPPC, strict=True):
        rows = slice(max(top, 0), min(top + len(grid_P), HEIGHT))
        columns = slice(max(left, 0), min(left + len(grid_P), WIDTH))
        window = (slice(rows.start - top, rows.stop - top), slice(columns.start - left, columns.stop - left))
        region_HWC = frame_HWC[rows, columns]
        region_HWC += alpha_PP[window][..., None] * (color_PPC[window] - region_HWC)


def _distance_outside(
    shape: Shape, x_T1P: _Array, y_TP1: _Array, radii_T2: NDArray[np.float64], angles_T: NDArray[np.float64]
) -> _Array:
    """Distance in pixels from the outline (negative inside), ``[T, P, P]``; exact enough to smooth edges."""
    radius_T11 = radii_T2.mean(axis=1).astype(np.float32)[:, None, None]
    stretch_T2 = (radii_T2.mean(axis=1, keepdims=True) / radii_T2).astype(np.float32)
    x_T1P = x_T1P * stretch_T2[:, 0, None, None]
    y_TP1 = y_TP1 * stretch_T2[:, 1, None, None]
    if shape == "circle":
        round_TPP: _Array = np.sqrt(x_T1P**2 + y_TP1**2) - radius_T11
        return round_TPP
    cosine_T11 = np.cos(angles_T).astype(np.float32)[:, None, None]
    sine_T11 = np.sin(angles_T).astype(np.float32)[:, None, None]
    u_TPP = cosine_T11 * x_T1P + sine_T11 * y_TP1
    v_TPP = cosine_T11 * y_TP1 - sine_T11 * x_T1P
    if shape == "square":
        side_TPP: _Array = np.maximum(np.abs(u_TPP), np.abs(v_TPP)) - 0.88 * radius_T11
        return side_TPP
    # One half of a star's point stands for all ten by symmetry: fold the plane onto it, then take the distance
    # from the straight edge between its tip and the notch beside it.
    sector = 2 * np.pi / _STAR_POINTS
    folded_TPP = np.abs((np.arctan2(v_TPP, u_TPP) + sector / 2) % sector - sector / 2)
    distance_TPP = np.hypot(u_TPP, v_TPP)
    tip_T11 = 1.2 * radius_T11
    notch_x = _STAR_INNER_RADIUS * np.cos(sector / 2) * tip_T11
    notch_y = _STAR_INNER_RADIUS * np.sin(sector / 2) * tip_T11
    edge = np.hypot(tip_T11 - notch_x, notch_y)
    along_x = distance_TPP * np.cos(folded_TPP) - tip_T11
    across_y = distance_TPP * np.sin(folded_TPP)
    star_TPP: _Array = ((along_x * notch_y + across_y * (tip_T11 - notch_x)) / edge).astype(np.float32)
    return star_TPP
