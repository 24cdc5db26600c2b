"""The DALI graph that applies augmentation parameters, on the CPU or, with decoding in front, on a GPU."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from nvidia.dali import fn, math, types
from nvidia.dali.pipeline import Pipeline

from avid_pipeline.clips.reading import HostClip
from avid_pipeline.clips.settings import ClipSettings

DYNAMIC_RANGE_DB = 100.0
_STD_GUARD = 1e-5


@dataclass(frozen=True)
class GraphSettings:
    """What a graph is built for.

    Attributes:
        clip: length and size of clips.
        mean: float32 [257], subtracted from the sound.
        std: float32 [257]; the sound is divided by it plus 1e-5.
        batch_size: the largest batch.
        threads: DALI's own CPU threads.
        device_id: the GPU, or None for the CPU.
        frame_stride: stored frames from one clip frame to the next (GPU decoding only).
    """

    clip: ClipSettings
    mean: npt.NDArray[np.float32]
    std: npt.NDArray[np.float32]
    batch_size: int
    threads: int = 1
    device_id: int | None = None
    frame_stride: int = 1


def pack(clips: list[HostClip], settings: GraphSettings) -> tuple[list[npt.NDArray[Any]], ...]:
    """A batch of clips as the graph's inputs: picture, crop start and end, colour, sound, volume.

    On a GPU, where pictures are still encoded, the first stored frame comes last.
    """
    boxes = [clip.augmentation.crop for clip in clips]
    starts = [np.array([box.top, box.left + box.width * box.flip], np.float32) for box in boxes]
    # A horizontal extent that runs backwards mirrors the picture.
    ends = [np.array([box.top + box.height, box.left + box.width * (not box.flip)], np.float32) for box in boxes]
    inputs: tuple[list[npt.NDArray[Any]], ...] = (
        [clip.picture for clip in clips],
        starts,
        ends,
        [clip.augmentation.colour for clip in clips],
        [clip.sound for clip in clips],
        [np.array(clip.augmentation.volume_db, np.float32) for clip in clips],
    )
    if settings.device_id is None:
        return inputs
    return (*inputs, [np.array(clip.first_frame * settings.frame_stride, np.int32) for clip in clips])


def build_graph(source: Callable[[], tuple[list[npt.NDArray[Any]], ...]], settings: GraphSettings) -> Pipeline:
    """Build the pipeline.

    Args:
        source: gives the inputs of the next batch (see :func:`pack`), raises StopIteration at the end.
        settings: see :class:`GraphSettings`.

    Returns:
        A built pipeline with the outputs ``video`` float32 [3, T, H, W] and ``audio`` float32 [1, frames, 257].
    """
    on_gpu = settings.device_id is not None
    pipeline = Pipeline(
        batch_size=settings.batch_size,
        num_threads=settings.threads,
        device_id=settings.device_id,
        prefetch_queue_depth=2,
    )
    with pipeline:
        picture, crop_start, crop_end, colour, sound, volume, *first_frame = fn.external_source(
            source=source,
            num_outputs=7 if on_gpu else 6,
            batch=True,
            layout=["" if on_gpu else "FHWC", *[""] * (6 if on_gpu else 5)],
        )
        frames = _decode(picture, first_frame[0], settings) if on_gpu else picture
        scaled = fn.resize(
            frames,
            size=[settings.clip.crop_size, settings.clip.crop_size],
            roi_start=crop_start,
            roi_end=crop_end,
            interp_type=types.INTERP_LINEAR,
            antialias=True,
        )
        video = fn.transpose(fn.coord_transform(scaled, MT=colour), perm=[3, 0, 1, 2])
        audio = _augment_sound(sound.gpu() if on_gpu else sound, volume, settings, on_gpu)
        pipeline.set_outputs(video, audio)
    pipeline.build()
    return pipeline


def _decode(picture: Any, first_frame: Any, settings: GraphSettings) -> Any:
    return fn.decoders.video(
        picture,
        device="mixed",
        start_frame=first_frame,
        sequence_length=settings.clip.num_frames,
        stride=settings.frame_stride,
        pad_mode="edge",
    )


def _augment_sound(sound: Any, volume: Any, settings: GraphSettings, on_gpu: bool) -> Any:
    """Volume, dynamic range of the clip, normalisation, and a channel in front."""
    device = "gpu" if on_gpu else "cpu"
    mean = types.Constant(settings.mean[None, :], device=device)
    scale = types.Constant(1 / (settings.std[None, :] + _STD_GUARD), device=device)
    louder = sound + (volume.gpu() if on_gpu else volume)
    clipped = math.max(louder, fn.reductions.max(louder, keep_dims=True) - DYNAMIC_RANGE_DB)
    return fn.expand_dims((clipped - mean) * scale, axes=[0])
