"""Decoding all of a sample and comparing what comes out with its record and the data set's parameters."""

import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction

import av
import numpy as np
import numpy.typing as npt

from avid_pipeline.shards_spec.manifest import SpectrogramStatistics, VideoParameters
from avid_pipeline.shards_spec.sample import VideoRecord
from avid_pipeline.shards_spec.spectrogram import FLOOR_DB, NUM_FREQUENCIES, decode_spectrogram

_BLOCK_FRAMES = 4096
# float16 is not clipped at the ceiling of the uint8 codes: sound that overshoots full scale is a little above it.
_LEAST_DB, _MOST_DB = FLOOR_DB - 0.1, 80.0
_MOST_DIFFERENCE_DB = 0.02
_DECODERS = {"h264": "h264", "hevc": "hevc", "vp9": "vp9", "mjpeg": "mjpeg"}


def video_problems(data: bytes, record: VideoRecord, parameters: VideoParameters, where: str) -> Iterator[str]:
    """Decode every frame of a stored video, one in memory at a time.

    Args:
        data: ``KEY.mp4``.
        record: what it should be.
        parameters: of the data set; with codec ``copy`` only what the record says is checked.
        where: shard and key, for the problems.

    Yields:
        One line for every kind of problem, with the first frame where it was seen.
    """
    try:
        # The format is given, for a playlist in the place of a video could name other files.
        with av.open(io.BytesIO(data), mode="r", format="mp4", metadata_errors="replace") as container:
            if len(container.streams) != 1 or not container.streams.video:
                kinds = ", ".join(stream.type for stream in container.streams) or "none"
                yield f"{where}: video: expected one video stream and nothing else, found {kinds}"
            if not container.streams.video:
                return
            stream = container.streams.video[0]
            context: object = stream.codec_context  # None where the codec is unknown, whatever its type says
            if context is None:
                yield f"{where}: video: expected a stream that can be decoded, found an unknown codec"
                return
            stream.codec_context.thread_count = 1
            # Without it the decoder conceals damage.
            stream.codec_context.options = {"err_detect": "explode"}
            yield from _stream_problems(stream, parameters, where)
            check = _FrameCheck(record, parameters, stream.time_base or Fraction(1, 1000))
            for frame in container.decode(stream):
                check.add(frame)
            yield from (f"{where}: video: {problem}" for problem in check.finish())
    except av.FFmpegError as error:
        yield f"{where}: video cannot be decoded: {error.strerror or error}"


def _stream_problems(stream: av.VideoStream, parameters: VideoParameters, where: str) -> Iterator[str]:
    if parameters.codec == "copy":
        return
    found = stream.codec_context.codec.canonical_name
    if found != _DECODERS[parameters.codec]:
        yield f"{where}: video: expected codec {parameters.codec}, found {found}"
    aspect = stream.sample_aspect_ratio
    if aspect and aspect != 1:
        yield f"{where}: video: expected square pixels, found pixels of {aspect.numerator}:{aspect.denominator}"


@dataclass
class _FrameCheck:
    """Takes frames in order of their time and notes the first of every kind of problem."""

    record: VideoRecord
    parameters: VideoParameters
    tick: Fraction
    count: int = 0
    first: int | None = None
    last_key: int = -1
    found: dict[str, str] = field(default_factory=dict)

    def add(self, frame: av.VideoFrame) -> None:
        number = self.count
        self.count += 1
        if frame.is_corrupt:
            self._note("corrupt", f"frame {number} is damaged")
        size = (frame.width, frame.height)
        if size != (self.record.width, self.record.height):
            expected = f"{self.record.width}x{self.record.height}"
            self._note("size", f"expected frames of {expected}, found {size[0]}x{size[1]} at frame {number}")
        if frame.pts is None:
            self._note("time", f"frame {number} has no time")
        elif self.first is None:
            self.first = frame.pts
        if self.parameters.codec != "copy":
            self._check_stored_form(frame, number)

    def _check_stored_form(self, frame: av.VideoFrame, number: int) -> None:
        expected = "yuvj420p" if self.parameters.codec == "mjpeg" else "yuv420p"
        if frame.format.name != expected:
            self._note("format", f"expected pixel format {expected}, found {frame.format.name} at frame {number}")
        if frame.pict_type == av.video.frame.PictureType.B:
            self._note("order", f"expected no B-frames, found one at frame {number}")
        if frame.key_frame:
            self.last_key = number
        if number == 0 and not frame.key_frame:
            self._note("key", "the first frame is no key frame")
        elif number - self.last_key >= self.parameters.gop:
            self._note("key", f"expected a key frame every {self.parameters.gop} frames, found none up to {number}")
        if frame.pts is not None and self.first is not None:
            seconds = (frame.pts - self.first) * self.tick
            if abs(seconds - number / Fraction(self.record.fps).limit_denominator(1001)) > self.tick:
                expected_time = number / self.record.fps
                self._note("time", f"expected frame {number} at {expected_time:.4f} s, found {float(seconds):.4f} s")

    def _note(self, kind: str, problem: str) -> None:
        self.found.setdefault(kind, problem)

    def finish(self) -> list[str]:
        if self.count != self.record.frames:
            self._note("count", f"expected {self.record.frames} frames as in the record, found {self.count}")
        return list(self.found.values())


@dataclass
class SpectrogramSums:
    """Sums over spectrogram frames, from which the statistics of the whole data set follow."""

    frames: int = 0
    total: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(NUM_FREQUENCIES))
    squares: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(NUM_FREQUENCIES))

    def add(self, other: "SpectrogramSums") -> None:
        """Take another part's sums in."""
        self.frames += other.frames
        self.total += other.total
        self.squares += other.squares


def spectrogram_problems(codes: npt.NDArray[np.generic], sums: SpectrogramSums, where: str) -> Iterator[str]:
    """Check that a stored spectrogram [frames, 257] is finite and within range; add it to the sums.

    Yields:
        At most one line, for the first frame with a bad value.
    """
    for first in range(0, len(codes), _BLOCK_FRAMES):
        decibels = decode_spectrogram(codes[first : first + _BLOCK_FRAMES]).astype(np.float64)
        # Written so that NaN is bad too.
        bad = ~((decibels >= _LEAST_DB) & (decibels <= _MOST_DB))
        if bad.any():
            frame, frequency = (int(place) for place in np.argwhere(bad)[0])
            yield (
                f"{where}: spectrogram: expected {_LEAST_DB:g} to {_MOST_DB:g} dB, "
                f"found {decibels[frame, frequency]} at frame {first + frame}, frequency {frequency}"
            )
            return
        sums.frames += len(decibels)
        sums.total += decibels.sum(axis=0)
        sums.squares += np.square(decibels).sum(axis=0)


def statistics_problems(statistics: SpectrogramStatistics, sums: SpectrogramSums) -> Iterator[str]:
    """Compare the manifest's statistics with those of all stored spectrograms."""
    if not sums.frames:
        return
    mean = sums.total / sums.frames
    std = np.sqrt(np.maximum(sums.squares / sums.frames - np.square(mean), 0))
    for name, computed, stated in (("mean", mean, statistics.mean), ("std", std, statistics.std)):
        difference = np.abs(computed - np.asarray(stated))
        worst = int(difference.argmax())
        if difference[worst] > _MOST_DIFFERENCE_DB:
            yield (
                f"manifest.json: spectrogram_statistics.{name}: expected {computed[worst]:.3f} dB at frequency "
                f"{worst} as in the stored spectrograms, found {stated[worst]:.3f}"
            )
