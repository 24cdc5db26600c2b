"""When a clip begins: a random place for training, evenly spread places for evaluation."""

from dataclasses import dataclass

import numpy as np

from avid_pipeline.clips.settings import ClipSettings
from avid_pipeline.shards_spec.sample import SampleRecord


@dataclass(frozen=True)
class Span:
    """A stretch of time on a sample's clock, in seconds."""

    start: float
    length: float

    @property
    def end(self) -> float:
        """When it ends."""
        return self.start + self.length


@dataclass(frozen=True)
class ClipTimes:
    """Where a clip lies in its tracks.

    Attributes:
        first_video_frame: on the clip's frame grid, from the video's first frame; 0 where there is no picture.
        first_audio_frame: spectrogram frame; 0 where there is no sound.
    """

    first_video_frame: int
    first_audio_frame: int


def tracks(record: SampleRecord) -> tuple[Span | None, Span | None]:
    """When a sample's picture and sound are there: ``(video, audio)``."""
    video, audio = record.video, record.audio
    return (
        Span(video.start, video.frames / video.fps) if video else None,
        Span(audio.start, audio.frames / audio.frames_per_second) if audio else None,
    )


def draw_times(record: SampleRecord, settings: ClipSettings, generator: np.random.Generator) -> ClipTimes:
    """Draw the times of a training clip.

    The longer of picture and sound starts uniformly where it fits into its track and the shorter still has a
    place; then the shorter starts uniformly inside the longer's window, widened by ``max_offset`` at both ends. A
    track shorter than its clip is used from its start. Takes two uniform numbers from the generator.
    """
    video, audio = tracks(record)
    first, second = generator.random(2)
    if video is None or audio is None:
        track, length = (video, settings.video_seconds) if video else (audio, settings.audio_seconds)
        assert track is not None
        start = _between(_room(track, length), first)
        return _to_frames(record, settings, start if video else None, start if audio else None)
    video_is_longer = settings.video_seconds > settings.audio_seconds
    longer, shorter = (video, audio) if video_is_longer else (audio, video)
    long_length = max(settings.video_seconds, settings.audio_seconds)
    short_length = min(settings.video_seconds, settings.audio_seconds)
    reach_after = long_length + settings.max_offset - short_length
    short_room = _room(shorter, short_length)
    long_start = _between(
        _overlap(_room(longer, long_length), (short_room[0] - reach_after, short_room[1] + settings.max_offset)), first
    )
    short_start = _between(_overlap(short_room, (long_start - settings.max_offset, long_start + reach_after)), second)
    starts = (long_start, short_start) if video_is_longer else (short_start, long_start)
    return _to_frames(record, settings, *starts)


def spread_times(record: SampleRecord, settings: ClipSettings, number: int, clips: int) -> ClipTimes:
    """Times of evaluation clip ``number`` of ``clips``, spread evenly over the whole sample.

    Clips divide the room for a clip's centre into equal parts and sit in the middle of each; picture and sound have
    the same centre where their tracks allow it.
    """
    video, audio = tracks(record)
    share = (number + 0.5) / clips
    centres = [track.start + share * track.length for track in (video, audio) if track]
    centre = sum(centres) / len(centres)
    starts = []
    for track, length in ((video, settings.video_seconds), (audio, settings.audio_seconds)):
        starts.append(None if track is None else _nearest(_room(track, length), centre - length / 2))
    return _to_frames(record, settings, *starts)


def _room(track: Span, length: float) -> tuple[float, float]:
    """Earliest and latest start of a clip in a track; both the track's start where the clip is longer."""
    return track.start, max(track.start, track.end - length)


def _overlap(room: tuple[float, float], window: tuple[float, float]) -> tuple[float, float]:
    """The part of the room inside the window, or the room's point nearest to it."""
    return _nearest(room, window[0]), _nearest(room, window[1])


def _nearest(room: tuple[float, float], instant: float) -> float:
    return min(max(instant, room[0]), room[1])


def _between(room: tuple[float, float], uniform: float) -> float:
    return room[0] + float(uniform) * (room[1] - room[0])


def _to_frames(
    record: SampleRecord, settings: ClipSettings, video_start: float | None, audio_start: float | None
) -> ClipTimes:
    video_frame = audio_frame = 0
    if record.video is not None and video_start is not None:
        available = int(record.video.frames / record.video.fps * settings.fps + 1e-6)
        wanted = round((video_start - record.video.start) * settings.fps)
        video_frame = max(0, min(wanted, available - settings.num_frames))
    if record.audio is not None and audio_start is not None:
        rate = record.audio.frames_per_second
        wanted = round((audio_start - record.audio.start) * rate)
        audio_frame = max(0, min(wanted, record.audio.frames - round(settings.audio_seconds * rate)))
    return ClipTimes(video_frame, audio_frame)
