"""From a stored sample to one clip on the host: decoded (or still encoded) picture, sound, and what to do to it."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from avid_pipeline.clips.augmentation import (
    Augmentation,
    clip_generator,
    draw_augmentation,
    evaluation_augmentation,
)
from avid_pipeline.clips.settings import AugmentationSettings, ClipSettings
from avid_pipeline.clips.timing import ClipTimes, draw_times, spread_times
from avid_pipeline.errors import DecodeError
from avid_pipeline.shards_spec.reader import stored_spectrogram
from avid_pipeline.shards_spec.sample import Sample
from avid_pipeline.shards_spec.spectrogram import FLOOR_DB, NUM_FREQUENCIES, decode_spectrogram
from avid_pipeline.shards_spec.video import decode_frames

FloatArray = npt.NDArray[np.float32]


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
        picture: uint8 frames_THWC where decoded here, else the encoded file as uint8 [bytes].
        first_frame: of the clip, on its own frame grid.
        sound: float32 dB [frames, 257].
        augmentation: what to do to it.
    """

    index: int
    label: int
    picture: npt.NDArray[np.uint8]
    first_frame: int
    sound: FloatArray
    augmentation: Augmentation


def read_clip(
    sample: Sample,
    instance: int,
    visit: int,
    settings: ClipSettings,
    choice: ClipChoice,
    decode: Literal["here", "later"],
) -> HostClip:
    """Choose a clip of a sample, decode it and choose its augmentation.

    Args:
        sample: with picture and sound.
        instance: its index.
        visit: which visit of the instance.
        settings: length and size of the clip.
        choice: how times and augmentation are chosen.
        decode: ``later`` leaves the picture encoded, for a GPU.

    Raises:
        DecodeError: the sample lacks a modality or cannot be decoded.
        SampleError: its spectrogram is damaged.
    """
    record = sample.record
    if sample.video is None or sample.spectrogram is None or record.video is None or record.audio is None:
        raise DecodeError(f"{record.key}: expected picture and sound, found only one; use a data set with both")
    times, augmentation = _choose(sample, instance, visit, settings, choice)
    if decode == "here":
        frames = decode_frames(sample.video, times.first_video_frame, settings.num_frames, settings.fps, record.key)
        picture = _repeat_last(frames, settings.num_frames)
    else:
        picture = np.frombuffer(sample.video, dtype=np.uint8)
    num_audio_frames = round(settings.audio_seconds * record.audio.frames_per_second)
    codes = stored_spectrogram(sample.spectrogram, record.key)
    sound = decode_spectrogram(codes[times.first_audio_frame : times.first_audio_frame + num_audio_frames])
    return HostClip(
        index=instance,
        label=record.labels[0] if record.labels else -1,
        picture=picture,
        first_frame=times.first_video_frame,
        sound=_pad_with_silence(sound, num_audio_frames),
        augmentation=augmentation,
    )


def _choose(
    sample: Sample, instance: int, visit: int, settings: ClipSettings, choice: ClipChoice
) -> tuple[ClipTimes, Augmentation]:
    video = sample.record.video
    assert video is not None
    if isinstance(choice, EvaluationChoice):
        times = spread_times(sample.record, settings, visit, choice.clips_per_instance)
        return times, evaluation_augmentation(video.height, video.width)
    generator = clip_generator(choice.seed, choice.epoch, instance, visit)
    times = draw_times(sample.record, settings, generator)
    return times, draw_augmentation(choice.augmentation, video.height, video.width, generator)


def _repeat_last(frames_THWC: npt.NDArray[np.uint8], count: int) -> npt.NDArray[np.uint8]:
    missing = count - len(frames_THWC)
    if missing <= 0:
        return frames_THWC
    return np.concatenate([frames_THWC, np.repeat(frames_THWC[-1:], missing, axis=0)])


def _pad_with_silence(sound: FloatArray, count: int) -> FloatArray:
    missing = count - len(sound)
    if missing <= 0:
        return sound
    return np.concatenate([sound, np.full((missing, NUM_FREQUENCIES), FLOOR_DB, dtype=np.float32)])
