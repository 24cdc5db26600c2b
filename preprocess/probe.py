"""Looking into a source before it is converted: which streams, what size, which clock."""

from dataclasses import dataclass
from pathlib import Path

import av
from av.container import InputContainer
from av.stream import Disposition

from avid_pipeline.preprocess.quarantine import SourceRejectedError

# Only these containers are opened: a playlist that poses as a video must not reach other files or the network, and
# a text must not pass for a video (FFmpeg can render some).
_CONTAINERS = (
    "mov", "matroska", "avi", "mpegts", "mpeg", "mpegvideo", "flv", "asf", "ogg", "rm", "mxf", "nut", "wav", "mp3",
    "flac", "aac",
)  # fmt: skip
INPUT_OPTIONS = {"protocol_whitelist": "file", "format_whitelist": ",".join(_CONTAINERS)}


@dataclass(frozen=True)
class VideoStream:
    """A source's video stream.

    Attributes:
        number: stream number in the file.
        width: in pixels as coded, before any rotation.
        height: in pixels as coded.
        fps: average frames a second; None where the file does not say.
        start: time of its first frame in seconds, on the file's clock.
        duration: in seconds; None where the file does not say.
        codec: codec name.
    """

    number: int
    width: int
    height: int
    fps: float | None
    start: float
    duration: float | None
    codec: str


@dataclass(frozen=True)
class AudioStream:
    """A source's audio stream: its number, start in seconds on the file's clock, sample rate in Hz and codec."""

    number: int
    start: float
    sample_rate: int
    codec: str


@dataclass(frozen=True)
class Probe:
    """What a source holds; ``video`` or ``audio`` is None where there is no such stream."""

    video: VideoStream | None
    audio: AudioStream | None


def probe(path: Path) -> Probe:
    """Look into a source without decoding it.

    Raises:
        SourceRejectedError: the file is missing, empty, or no media file.
    """
    try:
        if path.stat().st_size == 0:
            raise SourceRejectedError("empty_file", "the file has 0 bytes")
        options = dict(INPUT_OPTIONS)
        with av.open(str(path.absolute()), mode="r", options=options, metadata_errors="replace") as container:
            return Probe(_video(container), _audio(container))
    except FileNotFoundError as error:
        raise SourceRejectedError("source_not_found", "the file does not exist (any more)") from error
    except av.ArgumentError as error:
        raise SourceRejectedError("unreadable", "no video container; expected mp4, mkv, webm, avi or alike") from error
    except OSError as error:
        raise SourceRejectedError("unreadable", f"no media file that FFmpeg can open: {error.strerror}") from error
    except (av.FFmpegError, ValueError) as error:
        raise SourceRejectedError("unreadable", f"no media file that FFmpeg can open: {error}") from error


def _video(container: InputContainer) -> VideoStream | None:
    for stream in container.streams.video:
        if stream.disposition & Disposition.attached_pic or not stream.codec_context.width:
            continue
        tick = stream.time_base
        return VideoStream(
            number=stream.index,
            width=stream.codec_context.width,
            height=stream.codec_context.height,
            fps=float(stream.average_rate) if stream.average_rate else None,
            start=float(stream.start_time * tick) if stream.start_time is not None and tick else 0.0,
            duration=_duration(container, float(stream.duration * tick) if stream.duration and tick else None),
            codec=stream.codec_context.name,
        )
    return None


def _audio(container: InputContainer) -> AudioStream | None:
    for stream in container.streams.audio:
        if not stream.codec_context.sample_rate:
            continue
        tick = stream.time_base
        return AudioStream(
            number=stream.index,
            start=float(stream.start_time * tick) if stream.start_time is not None and tick else 0.0,
            sample_rate=stream.codec_context.sample_rate,
            codec=stream.codec_context.name,
        )
    return None


def _duration(container: InputContainer, of_stream: float | None) -> float | None:
    if of_stream is not None:
        return of_stream
    return container.duration / av.time_base if container.duration else None
