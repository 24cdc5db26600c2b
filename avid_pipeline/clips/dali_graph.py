"""The DALI graph that applies augmentation parameters, on the CPU or, with decoding in front, on a GPU."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from nvidia.dali import fn, math, types
from nvidia.dali.pipeline import Pipeline

from avid_pipeline.clips.reading import HostClip
from avid_pipeline.clips.settings import ClipSettings
from avid_pipeline.clips.sound import DYNAMIC_RANGE_DB, STD_GUARD

Inputs = tuple[list[npt.NDArray[Any]], ...]
IntArray = npt.NDArray[np.int32]

Decoder = Literal["nvdec", "dali-cpu"]
_DECODER_DEVICE = {"nvdec": "mixed", "dali-cpu": "cpu"}


@dataclass(frozen=True)
class GraphSettings:
    """What a graph is built for.

    Attributes:
        clip: length and size of clips; their modalities, both by default, are the graph's outputs.
        mean: float32 [257], subtracted from the sound.
        std: float32 [257]; the sound is divided by it plus 1e-5.
        batch_size: the largest batch.
        threads: DALI's own CPU threads; with ``nvdec``, as many videos are decoded at a time.
        device_id: the GPU, or None for the CPU.
        decoder: what decodes inside of the graph, see :func:`choose_decoder`; None where pictures come decoded.
        prefetch: batches that are under way in the graph.
    """

    clip: ClipSettings
    mean: npt.NDArray[np.float32]
    std: npt.NDArray[np.float32]
    batch_size: int
    threads: int = 1
    device_id: int | None = None
    decoder: Decoder | None = None
    prefetch: int = 2

    @property
    def video(self) -> bool:
        """Whether clips have a picture."""
        return "video" in (self.clip.modalities or ("video", "audio"))

    @property
    def audio(self) -> bool:
        """Whether clips have sound."""
        return "audio" in (self.clip.modalities or ("video", "audio"))


def choose_decoder(device_id: int | None) -> Decoder | None:
    """What decodes inside of the graph: NVDEC on a GPU; nothing on the CPU, where PyAV decodes before it.

    DALI's own CPU decoder (``dali-cpu``) reads VP8, VP9 and MJPEG but no H.264, so it is never chosen; it shows
    without a GPU that decoding inside of the graph picks the right frames.
    """
    return None if device_id is None else "nvdec"


def frame_numbers(first: int, count: int, stride: int, stored: int) -> IntArray:
    """The stored frames of a clip.

    Args:
        first: the clip's first frame on its own frame grid.
        count: frames of the clip.
        stride: stored frames from one clip frame to the next.
        stored: frames of the stored video.

    Returns:
        int32 [count]; the last frame of the grid again and again where the video ends early.
    """
    last = (stored - 1) // stride
    return np.minimum(np.arange(first, first + count, dtype=np.int32), np.int32(last)) * np.int32(stride)


def pack(clips: Sequence[HostClip], settings: GraphSettings, frames: Sequence[IntArray] = ()) -> Inputs:
    """A batch of clips as the graph's inputs.

    They are, each only where it is wanted: picture, crop start and end, colour, numbers of the stored frames; sound,
    volume.

    Args:
        clips: the batch.
        settings: of the graph.
        frames: numbers of the stored frames of each clip, where the graph decodes.
    """
    inputs: Inputs = ()
    if settings.video:
        boxes = [clip.augmentation.crop for clip in clips]
        # A horizontal extent that runs backwards mirrors the picture.
        starts = [np.array([box.top, box.left + box.width * box.flip], np.float32) for box in boxes]
        ends = [np.array([box.top + box.height, box.left + box.width * (not box.flip)], np.float32) for box in boxes]
        pictures = [clip.picture for clip in clips if clip.picture is not None]
        inputs = (pictures, starts, ends, [clip.augmentation.colour for clip in clips])
    if settings.video and settings.decoder is not None:
        inputs = (*inputs, list(frames))
    if settings.audio:
        sounds = [clip.sound for clip in clips if clip.sound is not None]
        volumes = [np.array(clip.augmentation.volume_db, np.float32) for clip in clips]
        inputs = (*inputs, sounds, volumes)
    return inputs


def build_graph(source: Callable[[], Inputs], settings: GraphSettings) -> Pipeline:
    """Build the pipeline.

    Args:
        source: gives the inputs of the next batch (see :func:`pack`), raises StopIteration at the end.
        settings: see :class:`GraphSettings`.

    Returns:
        A built pipeline with the outputs ``video`` float32 [3, T, H, W] and ``audio`` float32 [1, frames, 257], each
        only where it is wanted. It uses DALI's default executor, whose output buffers are not used again as long as
        somebody holds them.
    """
    layouts: list[str] = []
    if settings.video:
        layouts += ["FHWC", "", "", ""] if settings.decoder is None else ["", "", "", "", ""]
    if settings.audio:
        layouts += ["", ""]
    pipeline = Pipeline(
        batch_size=settings.batch_size,
        num_threads=settings.threads,
        device_id=settings.device_id,
        prefetch_queue_depth=settings.prefetch,
    )
    with pipeline:
        inputs = list(fn.external_source(source=source, num_outputs=len(layouts), batch=True, layout=layouts))
        outputs = []
        if settings.video:
            of_video, inputs = inputs[:-2] if settings.audio else inputs, inputs[-2:]
            outputs.append(_augment_picture(*of_video, settings=settings))
        if settings.audio:
            outputs.append(_augment_sound(*inputs, settings=settings))
        pipeline.set_outputs(*outputs)
    pipeline.build()
    return pipeline


def _augment_picture(
    picture: Any, crop_start: Any, crop_end: Any, colour: Any, frames: Any = None, *, settings: GraphSettings
) -> Any:
    """Decoding where that comes here, then crop, size, flip and colour."""
    if settings.decoder is not None:
        picture = _decode(picture, frames, settings.decoder)
    elif settings.device_id is not None:
        picture = picture.gpu()
    scaled = fn.resize(
        picture,
        size=[settings.clip.crop_size, settings.clip.crop_size],
        roi_start=crop_start,
        roi_end=crop_end,
        interp_type=types.INTERP_LINEAR,
        antialias=True,
    )
    return fn.transpose(fn.coord_transform(scaled, MT=colour), perm=[3, 0, 1, 2])


def _decode(encoded: Any, frames: Any, decoder: Decoder) -> Any:
    """The chosen frames, uint8 RGB [T, H, W, 3]; videos of a batch may differ in size.

    Frames are chosen by number, so that short videos are padded as on the CPU: DALI's own padding would repeat the
    last stored frame, which a clip with a stride may not have. The index that finds key frames is built in host
    memory, where the encoded file stays; only the packets from the key frame on go to NVDEC.
    """
    # Pinned threads of all ranks of a node would share the same few cores.
    return fn.decoders.video(encoded, device=_DECODER_DEVICE[decoder], frames=frames, build_index=True, affine=False)


def _augment_sound(sound: Any, volume: Any, *, settings: GraphSettings) -> Any:
    """Volume, dynamic range of the clip, normalisation, and a channel in front."""
    on_gpu = settings.device_id is not None
    device = "gpu" if on_gpu else "cpu"
    mean = types.Constant(settings.mean[None, :], device=device)
    scale = types.Constant(1 / (settings.std[None, :] + STD_GUARD), device=device)
    louder = sound.gpu() + volume.gpu() if on_gpu else sound + volume
    clipped = math.max(louder, fn.reductions.max(louder, keep_dims=True) - DYNAMIC_RANGE_DB)
    return fn.expand_dims((clipped - mean) * scale, axes=[0])
