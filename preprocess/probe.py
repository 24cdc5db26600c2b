"""Looking into a source before it is converted: which streams, what size, which clock."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import av
from av.audio.stream import AudioStream as PyavAudioStream
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream as PyavVideoStream

from avid_pipeline.preprocess.quarantine import SourceRejectedError
from avid_pipeline.preprocess.settings import Limits

# Only these containers are opened: a playlist that poses as a video must not reach other files or the network, and
# a text must not pass for a video (FFmpeg can render some).
_CONTAINERS = (
    "mov", "matroska", "avi", "mpegts", "mpeg", "mpegvideo", "flv", "asf", "ogg", "rm", "mxf", "nut", "gif",
    "wav", "w64", "aiff", "au", "caf", "amr", "mp3", "flac", "aac", "ac3",
)  # fmt: skip
_CONTAINERS_WITH_INDEX = frozenset({"mov", "matroska", "avi"})


@dataclass(frozen=True)
class VideoStream:
    """A source's video stream.

    Attributes:
        number: stream number in the file.
        width: in pixels as coded, before any rotation.
        height: in pixels as coded.
        fps: average frames a second; None where the file does not say.
        start: time of its first frame in seconds, on the file's clock.
        duration: seconds from its first frame to its stated end; None where the file does not say.
        frames: number of frames; None where the file does not say.
        codec: codec name.
    """

    number: int
    width: int
    height: int
    fps: float | None
    start: float
    duration: float | None
    frames: int | None
    codec: str


@dataclass(frozen=True)
class AudioStream:
    """A source's audio stream: number, start and duration in seconds on the file's clock, sample rate in Hz, codec."""

    number: int
    start: float
    duration: float | None
    sample_rate: int
    codec: str


@dataclass(frozen=True)
class Probe:
    """What a source holds.

    Attributes:
        video: None where there is no such stream.
        audio: None where there is no such stream.
        begin: seconds on the file's clock at which the file begins; segments count from there.
        duration: seconds from there to the stated end of the last stream; None where the file does not say.
        has_index: whether the container tells where key frames are, so that seeking is exact.
    """

    video: VideoStream | None
    audio: AudioStream | None
    begin: float = 0.0
    duration: float | None = None
    has_index: bool = True


_Stream = TypeVar("_Stream", VideoStream, AudioStream)


def input_options(limits: Limits) -> dict[str, str]:
    """Options for whatever opens a source: which containers and protocols, and how large a picture."""
    return {
        "protocol_whitelist": "file",
        "format_whitelist": ",".join(_CONTAINERS),
        "max_pixels": str(limits.pixels),
    }


def probe(path: Path, limits: Limits | None = None, timeout: float = math.inf) -> Probe:
    """Look into a source; of each stream only the first frame is decoded, whose time is the stream's start.

    Args:
        path: the file.
        limits: what it may cost.
        timeout: seconds that it may take.

    Raises:
        SourceRejectedError: the file is missing, empty, no media file, beyond a limit, or it takes too long.
    """
    limits = limits or Limits()
    try:
        if path.stat().st_size == 0:
            raise SourceRejectedError("empty_file", "the file has 0 bytes")
        options = input_options(limits)
        with av.open(str(path.absolute()), mode="r", options=options, metadata_errors="replace") as container:
            return _look(container, limits, _Deadline(timeout))
    except FileNotFoundError as error:
        raise SourceRejectedError("source_not_found", "the file does not exist (any more)") from error
    except av.ArgumentError as error:
        raise SourceRejectedError("unreadable", "no video container; expected mp4, mkv, webm, avi or alike") from error
    except OSError as error:
        raise SourceRejectedError("unreadable", f"no media file that FFmpeg can open: {error.strerror}") from error
    except (av.FFmpegError, ValueError) as error:
        raise SourceRejectedError("unreadable", f"no media file that FFmpeg can open: {error}") from error


class _Deadline:
    """When looking into a source has taken too long."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._end = time.monotonic() + seconds

    def check(self) -> None:
        if time.monotonic() > self._end:
            raise SourceRejectedError("timeout", f"reading it through took more than {self._seconds:g} s (--timeout)")


def _look(container: InputContainer, limits: Limits, deadline: _Deadline) -> Probe:
    video, audio = _best_video(container), _best_audio(container)
    begin = (container.start_time or 0) / av.time_base
    found = Probe(
        _describe_video(video) if video else None,
        _describe_audio(audio) if audio else None,
        begin=begin,
        # Some muxers count a file's duration from zero, others from its first frame: take the lesser.
        duration=max(0.0, container.duration / av.time_base - max(0.0, begin)) if container.duration else None,
        has_index=not _CONTAINERS_WITH_INDEX.isdisjoint(container.format.name.split(",")),
    )
    _check(found, limits)  # before anything is decoded
    streams = [stream for stream in (video, audio) if stream is not None]
    for stream in streams:
        stream.codec_context.options = {"max_pixels": str(limits.pixels)}
        stream.codec_context.thread_count = 1  # for one frame, threads cost more than they give
    starts = _first_times(container, streams, deadline)
    if found.audio is not None:
        found = replace(found, audio=_begin_at(found.audio, starts.get(found.audio.number)))
    if found.video is not None and video is not None:
        frames = found.video.frames or _count_packets(container, video, limits.frames, deadline)
        found = replace(found, video=replace(_begin_at(found.video, starts.get(found.video.number)), frames=frames))
        _check(found, limits)
    return found


def _begin_at(stream: _Stream, start: float | None) -> _Stream:
    """The stream with the time of its first frame; its end stays where the header says."""
    if start is None:
        return stream
    duration = None if stream.duration is None else max(0.0, stream.start + stream.duration - start)
    return replace(stream, start=start, duration=duration)


def _best_video(container: InputContainer) -> PyavVideoStream | None:
    """The stream that FFmpeg would choose, among those that are moving pictures."""
    streams = [
        stream
        for stream in container.streams.video
        if _has_decoder(stream) and not stream.disposition & Disposition.attached_pic and stream.codec_context.width
    ]
    best = container.streams.best("video")
    return next((stream for stream in streams if stream is best), streams[0] if streams else None)


def _best_audio(container: InputContainer) -> PyavAudioStream | None:
    streams = [
        stream for stream in container.streams.audio if _has_decoder(stream) and stream.codec_context.sample_rate
    ]
    best = container.streams.best("audio")
    return next((stream for stream in streams if stream is best), streams[0] if streams else None)


def _has_decoder(stream: PyavVideoStream | PyavAudioStream) -> bool:
    return stream.codec_context is not None


def _first_times(
    container: InputContainer, streams: Sequence[PyavVideoStream | PyavAudioStream], deadline: _Deadline
) -> dict[int, float]:
    """Stream number to the time, in seconds, of the first frame that its decoder gives.

    Headers are no help: they count what decoders drop, such as priming samples and pictures before a key frame.
    """
    starts: dict[int, float] = {}
    if not streams:
        return starts
    # AVI has no presentation times; those that PyAV makes up for it are wrong where frames are reordered.
    by_decoding = "avi" in container.format.name.split(",")
    for packet in container.demux(list(streams)):
        deadline.check()
        stream = packet.stream
        if stream.index not in starts:
            try:
                frames = packet.decode()
            except av.FFmpegError:
                continue  # ffmpeg passes over such packets too, and complains when nothing is left
            for frame in frames:
                if not isinstance(frame, (av.VideoFrame, av.AudioFrame)):
                    continue
                ticks = frame.dts if by_decoding and frame.dts is not None else frame.pts
                if ticks is not None and frame.time_base is not None:
                    starts.setdefault(stream.index, float(ticks * frame.time_base))
        if len(starts) == len(streams):
            break
    return starts


def _count_packets(container: InputContainer, stream: PyavVideoStream, limit: int, deadline: _Deadline) -> int | None:
    """The number of frames, at most one more than the limit; None where the file cannot be read through."""
    count = 0
    try:
        container.seek(0)
        for packet in container.demux(stream):
            deadline.check()
            count += packet.size > 0
            if count > limit:
                break
    except av.FFmpegError:
        return None
    return count


def _describe_video(stream: PyavVideoStream) -> VideoStream:
    return VideoStream(
        number=stream.index,
        width=stream.codec_context.width,
        height=stream.codec_context.height,
        fps=float(stream.average_rate) if stream.average_rate else None,
        start=_seconds(stream, stream.start_time) or 0.0,
        duration=_seconds(stream, stream.duration),
        frames=stream.frames or None,
        codec=stream.codec_context.name,
    )


def _describe_audio(stream: PyavAudioStream) -> AudioStream:
    return AudioStream(
        number=stream.index,
        start=_seconds(stream, stream.start_time) or 0.0,
        duration=_seconds(stream, stream.duration),
        sample_rate=stream.codec_context.sample_rate,
        codec=stream.codec_context.name,
    )


def _seconds(stream: PyavVideoStream | PyavAudioStream, ticks: int | None) -> float | None:
    return float(ticks * stream.time_base) if ticks is not None and stream.time_base else None


def _check(found: Probe, limits: Limits) -> None:
    video = found.video
    measured: list[tuple[str, float | None, float, str]] = [
        ("seconds", found.duration, limits.seconds, "--max-seconds"),
        ("seconds of picture", video.duration if video else None, limits.seconds, "--max-seconds"),
        ("seconds of sound", found.audio.duration if found.audio else None, limits.seconds, "--max-seconds"),
        ("frames", video.frames if video else None, limits.frames, "--max-frames"),
        ("pixels a frame", video.width * video.height if video else None, limits.pixels, "--max-pixels"),
    ]
    for what, value, limit, option in measured:
        if value is not None and value > limit:
            raise SourceRejectedError(
                "limit_exceeded", f"it has {value:,.0f} {what}, the limit is {limit:,.0f} ({option})"
            )
