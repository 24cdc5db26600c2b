"""When a clip begins: a random place for training, evenly spread places for evaluation."""

import math
from dataclasses import dataclass

import numpy as np

from avid_pipeline.clips.settings import ClipSettings
from avid_pipeline.shards_spec.sample import SampleRecord

# Clocks are floats: a frame this much (in frames) outside of a window counts as inside.
_TOLERANCE = 1e-6


@dataclass(frozen=True)
class ClipTimes:
    """Where a clip lies in its tracks.

    Attributes:
        first_video_frame: on the clip's frame grid, from the video's first frame; 0 where no picture is read.
        first_audio_frame: spectrogram frame; 0 where no sound is read.
    """

    first_video_frame: int
    first_audio_frame: int


@dataclass(frozen=True)
class _Track:
    """Where a clip can begin in a track: at ``start`` seconds on the sample's clock or up to ``room`` frames later."""

    start: float
    rate: float
    room: int

    def instant(self, frame: int) -> float:
        return self.start + frame / self.rate

    def draw(self, uniform: float, earliest: float = -math.inf, latest: float = math.inf) -> int:
        """A frame from a uniform number, each between two instants being as likely as any other.

        Where none lies there, it is the nearest.
        """
        low = self._nearest((earliest - self.start) * self.rate)
        high = self._nearest((latest - self.start) * self.rate)
        first, last = math.ceil(low - _TOLERANCE), math.floor(high + _TOLERANCE)
        if first > last:
            return round((low + high) / 2)
        return first + int(uniform * (last - first + 1))

    def _nearest(self, place: float) -> float:
        return min(max(place, 0), self.room)


def draw_times(record: SampleRecord, settings: ClipSettings, generator: np.random.Generator) -> ClipTimes:
    """Draw the times of a training clip.

    The longer of picture and sound starts uniformly where it fits into its track and the shorter still has a
    place; then the shorter starts uniformly inside the longer's window, widened by ``max_offset`` at both ends. A
    track shorter than its clip is used from its start. Takes two uniform numbers from the generator.
    """
    video, audio = _tracks(record, settings)
    first, second = generator.random(2).tolist()
    if video is None or audio is None:
        return ClipTimes(video.draw(first) if video else 0, audio.draw(first) if audio else 0)
    video_is_longer = settings.video_seconds > settings.audio_seconds
    longer, shorter = (video, audio) if video_is_longer else (audio, video)
    reach_after = abs(settings.video_seconds - settings.audio_seconds) + settings.max_offset
    long_frame = longer.draw(first, shorter.start - reach_after, shorter.instant(shorter.room) + settings.max_offset)
    long_start = longer.instant(long_frame)
    short_frame = shorter.draw(second, long_start - settings.max_offset, long_start + reach_after)
    return ClipTimes(long_frame, short_frame) if video_is_longer else ClipTimes(short_frame, long_frame)


def spread_times(record: SampleRecord, settings: ClipSettings, number: int, clips: int) -> ClipTimes:
    """Times of evaluation clip ``number`` of ``clips``, spread evenly over the whole sample.

    The first clip begins with its track, the last ends with it, and starts are equally far apart; a single clip is
    in the middle. Picture and sound are spread each over its own track, so that all of both is seen: where the tracks
    are equally long, the shorter clip lies inside the longer.
    """
    share = number / (clips - 1) if clips > 1 else 0.5
    video, audio = _tracks(record, settings)
    return ClipTimes(round(share * video.room) if video else 0, round(share * audio.room) if audio else 0)


def num_audio_frames(record: SampleRecord, settings: ClipSettings) -> int:
    """Spectrogram frames of a clip; 0 where the sample has no sound."""
    return max(1, round(settings.audio_seconds * record.audio.frames_per_second)) if record.audio else 0


def _tracks(record: SampleRecord, settings: ClipSettings) -> tuple[_Track | None, _Track | None]:
    """Picture and sound, None where there is none or it is not read."""
    video, audio = None, None
    if record.video is not None and settings.modalities != ("audio",):
        available = int(record.video.frames / record.video.fps * settings.fps + _TOLERANCE)
        video = _Track(record.video.start, settings.fps, max(0, available - settings.num_frames))
    if record.audio is not None and settings.modalities != ("video",):
        room = max(0, record.audio.frames - num_audio_frames(record, settings))
        audio = _Track(record.audio.start, record.audio.frames_per_second, room)
    return video, audio
