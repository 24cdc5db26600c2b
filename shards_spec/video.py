"""Decoding frames of a stored video on the CPU (PyAV)."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction

import av
import numpy as np
import numpy.typing as npt
from av.container import InputContainer

from avid_pipeline.shards_spec.errors import DecodeError

# A frame is the one shown at an instant; half a tick of rounding must not select its predecessor.
_CLOCK_TOLERANCE = Fraction(1, 2000)


@contextmanager
def open_video(data: bytes, where: str) -> Iterator[tuple[InputContainer, av.VideoStream]]:
    """A stored video, opened: the container and its video stream.

    Args:
        data: the encoded video file.
        where: shard and key, for messages.

    Raises:
        DecodeError: there is no video stream, or none that can be decoded.
        av.FFmpegError: the data is no video.
    """
    # The format is given, for a playlist that poses as a video could open other files.
    with av.open(io.BytesIO(data), mode="r", format="mp4", metadata_errors="replace") as container:
        if not container.streams.video:
            raise DecodeError(f"{where}: expected a video stream, found none")
        stream = container.streams.video[0]
        context: object = stream.codec_context  # None where the codec is unknown, whatever its type says
        if context is None:
            raise DecodeError(f"{where}: expected a video stream that can be decoded, found an unknown codec")
        yield container, stream


def decode_frames(data: bytes, first: int, count: int, fps: float, where: str) -> npt.NDArray[np.uint8]:
    """Decode consecutive frames to RGB; see :func:`select_frames`.

    Returns:
        uint8 RGB frames_THWC with T <= count; fewer only where the video ends.

    Raises:
        DecodeError: the data is no video, or not one frame could be decoded.
    """
    return np.stack([_rgb(frame) for frame in select_frames(data, first, count, fps, where)])


def select_frames(data: bytes, first: int, count: int, fps: float, where: str) -> list[av.VideoFrame]:
    """Decode consecutive frames, seeking to the key frame before them.

    Frame ``i`` is the one shown ``i / fps`` seconds after the video's first frame, so that videos of another or of
    a variable frame rate (codec ``copy``) work too.

    Args:
        data: the encoded video file.
        first: first frame, from 0.
        count: how many frames, at least 1.
        fps: frames a second that ``first`` and ``count`` are counted in.
        where: shard and key, for messages.

    Returns:
        At most ``count`` frames, as coded; fewer only where the video ends. A frame that is shown at several
        instants is there several times.

    Raises:
        DecodeError: the data is no video, or not one frame could be decoded.
    """
    rate = Fraction(fps).limit_denominator(1001)
    frames: list[av.VideoFrame] = []
    shown: av.VideoFrame | None = None
    try:
        with open_video(data, where) as (container, stream):
            stream.codec_context.thread_count = 1
            tick = stream.time_base or Fraction(1, 1000)
            origin = stream.start_time or 0
            for frame in _frames_from(container, stream, origin, origin + int(first / rate / tick)):
                instant = ((frame.pts or 0) - origin) * tick
                while len(frames) < count and (first + len(frames)) / rate < instant - _CLOCK_TOLERANCE:
                    frames.append(shown or frame)
                if len(frames) < count and (first + len(frames)) / rate <= instant + _CLOCK_TOLERANCE:
                    frames.append(frame)
                if len(frames) == count:
                    break
                shown = frame
            # The last frame stays until its duration is over, which a finer frame grid sees more than once.
            if shown is not None and shown.pts is not None:
                end = (shown.pts + (shown.duration or 0) - origin) * tick
                while len(frames) < count and (first + len(frames)) / rate < end - _CLOCK_TOLERANCE:
                    frames.append(shown)
    except av.FFmpegError as error:
        raise DecodeError(f"{where}: video cannot be decoded: {error}") from error
    if not frames:
        raise DecodeError(f"{where}: expected frames from number {first} on, found none")
    return frames


def _frames_from(
    container: InputContainer, stream: av.VideoStream, origin: int, target: int
) -> Iterator[av.VideoFrame]:
    """Frames with their times, beginning with one shown at ``target`` ticks or before."""
    back = 0
    while True:
        if target > origin:
            container.seek(max(origin, target - back), stream=stream, backward=True)
        frames = (frame for frame in container.decode(stream) if frame.pts is not None)
        head = next(frames, None)
        if head is None or head.pts is None or head.pts <= target or target - back <= origin:
            break
        # With reordered frames, a key frame's decoding time can lie before the target and its picture after it.
        back = 2 * back + head.pts - target
    if head is not None:
        yield head
        yield from frames


def _rgb(frame: av.VideoFrame) -> npt.NDArray[np.uint8]:
    return np.asarray(frame.to_ndarray(format="rgb24"), dtype=np.uint8)
