"""From a stored sample to one clip on the host: decoded (or still encoded) picture, sound, and what to do to it."""

import re
from dataclasses import dataclass, replace
from typing import Literal

import av
import numpy as np
import numpy.typing as npt

from avid_pipeline.clips.augmentation import (
    Augmentation,
    clip_generator,
    draw_augmentation,
    evaluation_augmentation,
)
from avid_pipeline.clips.settings import AugmentationSettings, ClipSettings
from avid_pipeline.clips.timing import ClipTimes, draw_times, num_audio_frames, spread_times
from avid_pipeline.errors import DecodeError, ManifestError
from avid_pipeline.shards_spec.manifest import WITH_AUDIO, Modality
from avid_pipeline.shards_spec.reader import stored_spectrogram
from avid_pipeline.shards_spec.sample import Sample, SampleRecord
from avid_pipeline.shards_spec.spectrogram import FLOOR_DB, NUM_FREQUENCIES, decode_spectrogram
from avid_pipeline.shards_spec.video import decode_frames, select_frames

FloatArray = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]

Decode = Literal["rgb", "frames", "later"]

# The start of a spectrogram's .npy file (format 1.0) as the pipeline writes it: length of the header, dtype, frames.
_NPY_START = re.compile(
    rb"\x93NUMPY\x01\x00(..)({'descr': '(\|u1|<f2)', 'fortran_order': False, 'shape': \((\d{1,9}), %d\), } *\n)"
    % NUM_FREQUENCIES,
    re.DOTALL,
)


_ROUNDING = 1e-3


@dataclass(frozen=True)
class TrainingChoice:
    """Clips are drawn at random: from the generator keyed by (seed, epoch, instance, visit)."""

    seed: int
    epoch: int
    augmentation: AugmentationSettings


@dataclass(frozen=True)
class EvaluationChoice:
    """Clips are spread evenly over the sample: visit ``v`` is clip ``v`` of ``clips_per_instance``."""

    clips_per_instance: int


ClipChoice = TrainingChoice | EvaluationChoice


@dataclass(frozen=True)
class HostClip:
    """A clip before augmentation.

    Attributes:
        index: the instance.
        label: its first label, -1 without one.
        picture: uint8 frames_THWC where decoded to RGB, or the encoded file as uint8 [bytes] where decoding comes
            later; None where there are ``frames`` instead or no picture is read.
        first_frame: of the clip, on its own frame grid.
        sound: float32 dB [frames, 257]; None where no sound is read.
        augmentation: what to do to it.
        frames: the T decoded frames, as coded; a frame that is shown again is there again. None unless asked for.
        labels: all labels.
    """

    index: int
    label: int
    picture: ByteArray | None
    first_frame: int
    sound: FloatArray | None
    augmentation: Augmentation
    frames: tuple[av.VideoFrame, ...] | None = None
    labels: tuple[int, ...] = ()

    def without_content(self) -> "HostClip":
        """The same without picture and sound, for what outlives them."""
        return replace(self, picture=None, sound=None, frames=None)


def read_clip(
    sample: Sample, instance: int, visit: int, settings: ClipSettings, choice: ClipChoice, decode: Decode
) -> HostClip:
    """Choose a clip of a sample, decode it and choose its augmentation.

    Args:
        sample: as stored.
        instance: its index.
        visit: which visit of the instance.
        settings: length and size of the clip, and its modalities (None: those that this sample has).
        choice: how times and augmentation are chosen.
        decode: the picture becomes ``rgb`` (``HostClip.picture``) or ``frames`` as coded (``HostClip.frames``);
            ``later`` leaves it encoded, for a GPU.

    Raises:
        ManifestError: the sample lacks a modality that is asked for.
        DecodeError: its video cannot be decoded.
        SampleError: its spectrogram is damaged.
    """
    record = sample.record
    wanted = settings.modalities or _modalities(sample)
    video = _member(sample.video if record.video else None, "video", wanted, record)
    spectrogram = _member(sample.spectrogram if record.audio else None, "audio", wanted, record)
    times, augmentation = _choose(record, instance, visit, settings, choice)
    picture, frames = None, None
    if video is not None and decode == "later":
        picture = np.frombuffer(video, dtype=np.uint8)
    elif video is not None and decode == "frames":
        frames = _decode_frames(video, times.first_video_frame, settings, record.key)
    elif video is not None:
        picture = _decode_rgb(video, times.first_video_frame, settings, record.key)
    sound = None
    if spectrogram is not None:
        count = num_audio_frames(record, settings)
        sound = _decode_sound(spectrogram, times.first_audio_frame, count, record.key)
    return HostClip(
        index=instance,
        label=record.labels[0] if record.labels else -1,
        picture=picture,
        first_frame=times.first_video_frame,
        sound=sound,
        augmentation=augmentation,
        frames=frames,
        labels=record.labels,
    )


def _modalities(sample: Sample) -> tuple[Modality, ...]:
    found: tuple[Modality, ...] = ("video",) if sample.video is not None else ()
    return (*found, "audio") if sample.spectrogram is not None else found


def _member(data: bytes | None, modality: Modality, wanted: tuple[Modality, ...], record: SampleRecord) -> bytes | None:
    """The encoded modality where it is wanted."""
    if modality not in wanted:
        return None
    if data is None:
        remedy = f"read the subset {WITH_AUDIO}, or no sound" if modality == "audio" else "read no picture"
        raise ManifestError(
            f"{record.key}: expected {' and '.join(wanted)}, but this sample has no {modality}; {remedy}"
        )
    return data


def _choose(
    record: SampleRecord, instance: int, visit: int, settings: ClipSettings, choice: ClipChoice
) -> tuple[ClipTimes, Augmentation]:
    height, width = (record.video.height, record.video.width) if record.video else (0, 0)
    if isinstance(choice, EvaluationChoice):
        times = spread_times(record, settings, visit, choice.clips_per_instance)
        return times, evaluation_augmentation(height, width)
    generator = clip_generator(choice.seed, choice.epoch, instance, visit)
    times = draw_times(record, settings, generator)
    return times, draw_augmentation(choice.augmentation, height, width, generator)


def _decode_rgb(video: bytes, first: int, settings: ClipSettings, key: str) -> ByteArray:
    """uint8 frames_THWC; the last frame stands still where the video ends early."""
    frames_THWC = decode_frames(video, first, settings.num_frames, settings.fps, key)
    missing = settings.num_frames - len(frames_THWC)
    return np.concatenate([frames_THWC, np.repeat(frames_THWC[-1:], missing, axis=0)]) if missing else frames_THWC


def _decode_frames(video: bytes, first: int, settings: ClipSettings, key: str) -> tuple[av.VideoFrame, ...]:
    frames = select_frames(video, first, settings.num_frames, settings.fps, key)
    return (*frames, *[frames[-1]] * (settings.num_frames - len(frames)))


def _decode_sound(spectrogram: bytes, first: int, count: int, key: str) -> FloatArray:
    """float32 dB [count, 257]; silence where the sound ends early."""
    heard = decode_spectrogram(_codes(spectrogram, key)[first : first + count])
    if len(heard) == count:
        return heard
    sound = np.full((count, NUM_FREQUENCIES), FLOOR_DB, dtype=np.float32)
    sound[: len(heard)] = heard
    return sound


def _codes(spectrogram: bytes, key: str) -> npt.NDArray[np.generic]:
    """The array inside ``KEY.spectrogram.npy``, without copying or parsing what a clip does not need."""
    if start := _NPY_START.match(spectrogram):
        dtype, frames = np.dtype(start[3].decode()), int(start[4])
        size = frames * NUM_FREQUENCIES * dtype.itemsize
        if int.from_bytes(start[1], "little") == len(start[2]) and len(spectrogram) == start.end() + size:
            return np.frombuffer(spectrogram, dtype, offset=start.end()).reshape(frames, NUM_FREQUENCIES)
    # Written by someone else, or damaged: numpy reads it or says what is wrong.
    return stored_spectrogram(spectrogram, key)


def check_size(clip: HostClip, height: int, width: int, where: str) -> None:
    """Check that decoded frames hold the crop that was drawn from the record.

    DALI would read beyond them memory that is not theirs, and the process may crash.

    Raises:
        DecodeError: the frames are smaller than the record says.
    """
    crop = clip.augmentation.crop
    bottom, right = crop.top + crop.height, crop.left + crop.width
    if min(crop.top, crop.left) < 0 or bottom > height + _ROUNDING or right > width + _ROUNDING:
        raise DecodeError(
            f"{where}: expected at least {right:g}x{bottom:g} pixels, as its record has it, found {width}x{height}"
        )
