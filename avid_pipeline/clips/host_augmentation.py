"""Applying augmentation parameters on the CPU, several times faster than DALI's CPU operators.

The planes of a decoded frame are cropped and scaled as they are, luminance and chrominance apart, and become colours
only at the clip's size: one 3x4 matrix does the conversion to RGB, all colour operations and normalisation. DALI's
graph (:mod:`avid_pipeline.clips.dali_graph`) is the reference.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import av
import cv2
import numpy as np
import numpy.typing as npt
from av.video.reformatter import ColorRange

from avid_pipeline.clips.augmentation import Augmentation, CropBox, FloatArray
from avid_pipeline.clips.colour_space import BT601, OTHER_WEIGHTS, yuv_to_rgb

ByteArray = npt.NDArray[np.uint8]

_PLANAR_FORMATS = ("yuv420p", "yuvj420p")
# Numpy's BLAS computes products this small in the calling thread; larger ones would wake threads of its own.
_COLUMNS_PER_PRODUCT = 1 << 14
_LEAST_BLUR = 1.02


@contextmanager
def single_threaded_opencv() -> Iterator[None]:
    """Keeps OpenCV from starting threads of its own: the loader's are enough."""
    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(before)


def augment_picture(frames: Sequence[av.VideoFrame], augmentation: Augmentation, out: FloatArray) -> None:
    """Crop, scale, mirror and colour a clip.

    Args:
        frames: T decoded frames of one size.
        augmentation: what to do.
        out: float32 [3, T, size, size], normalised RGB, is written.
    """
    size = out.shape[-1]
    scaled = np.empty((3, len(frames), size, size), dtype=np.uint8)
    planes: list[ByteArray] = []
    for number, frame in enumerate(frames):
        if number and frame is frames[number - 1]:
            scaled[:, number] = scaled[:, number - 1]
            continue
        planes = _planes(frame)
        for channel, plane in enumerate(planes):
            _scale(plane, _on_plane(augmentation.crop, channel), scaled[channel, number])
    _colour(scaled, _from_yuv(augmentation.colour, frames[0]), out)


def _planes(frame: av.VideoFrame) -> list[ByteArray]:
    """Luminance and the two chrominance planes, the latter of half height and width, without a copy."""
    if frame.format.name not in _PLANAR_FORMATS:
        frame = frame.reformat(format="yuv420p")
    planes = []
    for plane in frame.planes:
        rows = np.frombuffer(memoryview(plane), dtype=np.uint8).reshape(-1, plane.line_size)
        planes.append(rows[: plane.height, : plane.width])
    return planes


def _on_plane(crop: CropBox, channel: int) -> CropBox:
    """A crop in the pixels of a plane: chrominance has half as many each way."""
    if channel == 0:
        return crop
    return CropBox(crop.top / 2, crop.left / 2, crop.height / 2, crop.width / 2, crop.flip)


def _scale(plane: ByteArray, crop: CropBox, out: ByteArray) -> None:
    """Scale a crop of a plane, linearly and, where it shrinks, without aliasing."""
    step_down, step_right = crop.height / out.shape[0], crop.width / out.shape[1]
    if max(step_down, step_right) > _LEAST_BLUR:
        plane = cv2.GaussianBlur(plane, (0, 0), sigmaX=_blur(step_right), sigmaY=_blur(step_down))  # type: ignore[assignment]
    left = crop.left + (crop.width - step_right / 2 if crop.flip else step_right / 2) - 0.5
    top = crop.top + step_down / 2 - 0.5
    places = np.array([[-step_right if crop.flip else step_right, 0, left], [0, step_down, top]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    cv2.warpAffine(plane, places, out.shape[::-1], dst=out, flags=flags, borderMode=cv2.BORDER_REPLICATE)


def _blur(step: float) -> float:
    """Deviation of a Gaussian that makes linear interpolation as wide as a triangle of ``step`` pixels each side."""
    return math.sqrt(max((step * step - 1) / 6, 1e-4))


def _from_yuv(colour: FloatArray, frame: av.VideoFrame) -> FloatArray:
    """The colour matrix [3, 4] for YUV as coded instead of RGB."""
    to_rgb = yuv_to_rgb(*OTHER_WEIGHTS.get(int(frame.colorspace), BT601))
    zero = np.array([0.0, 128.0, 128.0])
    if frame.format.name != "yuvj420p" and frame.color_range != ColorRange.JPEG:
        to_rgb *= [255 / 219, 255 / 224, 255 / 224]
        zero[0] = 16.0
    linear = colour[:, :3] @ to_rgb
    offset = colour[:, 3] - linear @ zero
    return np.hstack([linear, offset[:, None]]).astype(np.float32)


def _colour(scaled: ByteArray, matrix: FloatArray, out: FloatArray) -> None:
    """Apply a [3, 4] matrix to uint8 [3, …], into float32 [3, …]."""
    values, results = scaled.reshape(3, -1), out.reshape(3, -1)
    for first in range(0, values.shape[1], _COLUMNS_PER_PRODUCT):
        part = values[:, first : first + _COLUMNS_PER_PRODUCT].astype(np.float32)
        product = matrix[:, :3] @ part
        np.add(product, matrix[:, 3:], out=results[:, first : first + _COLUMNS_PER_PRODUCT])
