"""One ffmpeg process per source: the picture becomes a short-GOP file, the sound a stream of samples."""

import errno
import os
import re
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NoReturn

import ffmpeg
import numpy as np

from avid_pipeline.preprocess.errors import PreprocessError
from avid_pipeline.preprocess.ffmpeg import find_ffmpeg
from avid_pipeline.preprocess.probe import Probe, input_options
from avid_pipeline.preprocess.quarantine import SourceRejectedError
from avid_pipeline.preprocess.settings import Settings
from avid_pipeline.preprocess.sources.base import Segment
from avid_pipeline.shards_spec.manifest import Parameters, VideoCodec, VideoParameters
from avid_pipeline.shards_spec.spectrogram import FloatArray

DEFAULT_QUALITY: dict[VideoCodec, int] = {"h264": 23, "hevc": 26, "vp9": 33, "mjpeg": 4, "copy": 0}

_SAMPLES_PER_READ = 1 << 18
_LAST_WORDS = 500
_SOURCE = "avid-pipeline-source"
# Seconds before a segment at which decoding begins where the container has no index; key frames are nearer than that.
_SEEK_MARGIN = 30.0
# Sound whose timestamps are further off than this, in seconds, is filled with silence or cut; the default is 0.1.
_LARGEST_SOUND_OFFSET = 0.03
_LONGEST_SOUND_GAP = 60


class Transcoder:
    """Runs ffmpeg on a source: writes its picture to a file while its sound is read.

    Each stream begins at its own first frame or sample, whose times the probe has; a segment's streams both begin at
    its start. Gaps in the sound are filled with silence so that its clock holds.

    Args:
        source: the file.
        found: which streams to convert; a stream that is None is left out.
        segment: the part to cut out; None for all of it.
        parameters: how to store picture and sound.
        settings: limits and timeout.
        video_out: the file to write the picture to.

    Attributes:
        complaints: ffmpeg's last words, set when the sound was read to its end; empty when all was well.
    """

    def __init__(
        self,
        source: Path,
        found: Probe,
        segment: Segment | None,
        parameters: Parameters,
        settings: Settings,
        video_out: Path,
    ) -> None:
        self._command = ffmpeg_command(source, found, segment, parameters, settings, video_out)
        self._timeout = settings.timeout
        self._max_samples = int(settings.limits.seconds * parameters.audio.sample_rate)
        self._seconds = settings.limits.seconds
        self.complaints = ""

    def sound(self) -> Iterator[FloatArray]:
        """Run ffmpeg; afterwards the picture is in its file.

        Yields:
            Blocks of mono float32 samples [n]; none where there is no sound to convert.

        Raises:
            SourceRejectedError: ffmpeg failed, took too long, or the sound is too long or no sound.
            PreprocessError: ffmpeg failed for a reason that lies not in the source (killed, or the disk is full).
        """
        # In a group of its own: Ctrl-C, which reaches the whole group of the terminal, must not make ffmpeg stop
        # early, or a sound source would be quarantined.
        with subprocess.Popen(
            self._command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, process_group=0
        ) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            words = _LastWords(process.stderr)
            watchdog = _Watchdog(process, self._timeout)
            try:
                yield from self._blocks(process.stdout)
                process.wait()
            except BaseException:
                process.kill()
                raise
            finally:
                watchdog.stop()
            self.complaints = words.text()
        if watchdog.barked:
            raise SourceRejectedError("timeout", f"its conversion took more than {self._timeout:g} s (--timeout)")
        if process.returncode != 0:
            _refuse(process.returncode, self.complaints)

    def _blocks(self, pipe: IO[bytes]) -> Iterator[FloatArray]:
        count = 0
        while block := pipe.read(_SAMPLES_PER_READ * 4):
            samples = np.frombuffer(block, dtype="<f4", count=len(block) // 4)
            count += len(samples)
            if count > self._max_samples:
                raise SourceRejectedError(
                    "limit_exceeded", f"its sound lasts more than {self._seconds:g} s (--max-seconds)"
                )
            if not np.isfinite(samples).all():
                raise SourceRejectedError("decode_error", "the sound has values that are no finite numbers")
            yield samples


class _Watchdog:
    """Kills a process that takes too long."""

    def __init__(self, process: subprocess.Popen[bytes], seconds: float) -> None:
        self.barked = False
        self._process = process
        self._timer = threading.Timer(seconds, self._bark)
        self._timer.daemon = True
        self._timer.start()

    def _bark(self) -> None:
        if self._process.poll() is None:
            self.barked = True
            self._process.kill()

    def stop(self) -> None:
        self._timer.cancel()


class _LastWords:
    """Reads a pipe to its end in the background and keeps the last bytes: damaged files can make ffmpeg very wordy."""

    def __init__(self, pipe: IO[bytes]) -> None:
        self._pipe = pipe
        self._kept = b""
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        while data := os.read(self._pipe.fileno(), 1 << 16):
            self._kept = (self._kept + data)[-_LAST_WORDS:]

    def text(self) -> str:
        self._thread.join()
        text = self._kept.decode("utf-8", "replace")
        # Without memory addresses the same source always gives the same line in the quarantine.
        return " ".join(re.sub(r" @ 0x[0-9a-f]+", "", text).split())


def ffmpeg_command(
    source: Path, found: Probe, segment: Segment | None, parameters: Parameters, settings: Settings, video_out: Path
) -> list[str]:
    """The arguments that ffmpeg is started with; the sound goes to standard output as float32."""
    # Pictures of another size in the middle go on through the same filters, and come out in the first one's size.
    options: dict[str, str | float | int | None] = {
        "threads": 1, "reinit_filter:v": 0, **input_options(settings.limits)
    }  # fmt: skip
    cut = None if segment is None else _cut(segment, found, parameters.video.codec)
    if cut is not None:
        # All pictures from the key frame on go to the filters, which find the one shown when the segment begins.
        options |= {"ss": f"{cut.seek:.6f}"} | ({} if parameters.video.codec == "copy" else {"noaccurate_seek": None})
    # A little more than is allowed, so that what is too long can be told from what just fits.
    longest = settings.limits.seconds + 1
    stream = ffmpeg.input(_SOURCE, **options)
    outputs = []
    if found.video is not None:
        picture = stream[str(found.video.number)]
        skip = found.video.start - found.begin if cut is None else cut.skip
        outputs.append(_video_output(picture, parameters.video, skip, cut, longest, video_out))
    if found.audio is not None:
        skip = found.audio.start - found.begin if cut is None else cut.skip
        sound = _sound_filters(stream[str(found.audio.number)], parameters.audio.sample_rate, skip, cut)
        outputs.append(ffmpeg.output(sound, "pipe:1", format="f32le", acodec="pcm_f32le", ac=1, t=longest))
    merged = ffmpeg.merge_outputs(*outputs).global_args(
        "-nostdin", "-hide_banner", "-loglevel", "error", "-filter_complex_threads", "1"
    )
    arguments: list[str] = merged.overwrite_output().compile(cmd=find_ffmpeg())
    # Only now the name, for ffmpeg-python hashes its arguments as UTF-8 and file names may be any bytes. An absolute
    # path with its protocol: no name can pass for an option or another protocol.
    return [f"file:{source.absolute()}" if argument == _SOURCE else argument for argument in arguments]


@dataclass(frozen=True)
class _Cut:
    """How a segment is cut out, in seconds: seek there, pass over so much, keep so much."""

    seek: float
    skip: float
    length: float


def _cut(segment: Segment, found: Probe, codec: VideoCodec) -> _Cut:
    # Without an index of key frames FFmpeg may arrive after the picture it looked for; then start earlier.
    exact = codec == "copy" or found.has_index
    seek = max(0.0, segment.start - (0.0 if exact else _SEEK_MARGIN))
    return _Cut(seek, segment.start - seek, segment.end - segment.start)


def _sound_filters(stream: ffmpeg.Stream, sample_rate: int, skip: float, cut: _Cut | None) -> ffmpeg.Stream:
    # No filter may count from the first sample that it sees: where channels or sample rate change in the middle,
    # ffmpeg builds all of them anew.
    fill: dict[str, float] = {"async": 1, "min_hard_comp": _LARGEST_SOUND_OFFSET}
    # The silence for a gap is held in memory: after a very long one the sound ends, with a complaint (print).
    gap = "(pts-prev_selected_pts)*TB"
    sound = stream.filter("asetpts", f"PTS-({skip:.6f})/TB")
    sound = sound.filter("aselect", f"if(gt({gap},{_LONGEST_SOUND_GAP}),0*print({gap},16),1)")
    if cut is not None:
        sound = sound.filter("atrim", start=0, end=f"{cut.length:.6f}")
        fill["first_pts"] = 0
    return sound.filter("aresample", sample_rate, **fill)


def _video_output(
    stream: ffmpeg.Stream, parameters: VideoParameters, skip: float, cut: _Cut | None, longest: float, out: Path
) -> ffmpeg.Stream:
    common = {"format": "mp4", "movflags": "+faststart", "map_metadata": "-1", "fflags": "+bitexact", "t": longest}
    if parameters.codec == "copy":
        if cut is not None:
            common["t"] = min(longest, cut.length)
        return ffmpeg.output(stream, f"file:{out}", vcodec="copy", **common)
    shown_width = "iw*sar"
    factor = f"min(1,{parameters.short_side}/min({shown_width},ih))"
    # Even sizes, rounded down so that nothing is upscaled; the small term absorbs floating-point noise.
    even = "max(2,2*trunc(({size}*" + factor + "+0.01)/2))"
    frames = stream.filter("setpts", f"PTS-({skip:.6f})/TB").filter("fps", parameters.fps, start_time=0)
    if cut is not None:
        frames = frames.filter("trim", end=f"{cut.length:.6f}")
    levels = "pc" if parameters.codec == "mjpeg" else "tv"
    sizes = [even.format(size=shown_width), even.format(size="ih")]
    frames = frames.filter("scale", *sizes, flags="bicubic", out_range=levels).filter("setsar", 1)
    return ffmpeg.output(frames, f"file:{out}", threads=1, **common, **_encoder_options(parameters))


def _encoder_options(parameters: VideoParameters) -> dict[str, str | int]:
    gop, quality = parameters.gop, parameters.quality
    if parameters.codec == "h264":
        return {
            "vcodec": "libx264", "preset": parameters.preset, "crf": quality, "pix_fmt": "yuv420p",
            "g": gop, "keyint_min": gop, "sc_threshold": 0, "bf": 0, "flags": "+bitexact+cgop",
            **({} if parameters.tune == "none" else {"tune": parameters.tune}),
        }  # fmt: skip
    if parameters.codec == "hevc":
        keys = f"keyint={gop}:min-keyint={gop}:scenecut=0:bframes=0:open-gop=0:pools=none:frame-threads=1"
        return {
            "vcodec": "libx265", "preset": parameters.preset, "crf": quality, "pix_fmt": "yuv420p",
            "x265-params": f"{keys}:log-level=error", "tag:v": "hvc1", "flags": "+bitexact",
        }  # fmt: skip
    if parameters.codec == "vp9":
        return {
            "vcodec": "libvpx-vp9", "crf": quality, "b:v": 0, "pix_fmt": "yuv420p", "g": gop, "keyint_min": gop,
            "deadline": "good", "cpu-used": 5, "auto-alt-ref": 0, "lag-in-frames": 0, "flags": "+bitexact",
        }  # fmt: skip
    return {"vcodec": "mjpeg", "q:v": quality, "pix_fmt": "yuvj420p", "flags": "+bitexact"}


def _refuse(code: int, last_words: str) -> NoReturn:
    if code == -signal.SIGKILL or os.strerror(errno.ENOSPC) in last_words:
        reason = "was killed (out of memory?)" if code < 0 else f"cannot write to {tempfile.gettempdir()}: disk full"
        raise PreprocessError(f"ffmpeg {reason}; make room and run the command again, finished shards are kept")
    raise SourceRejectedError("decode_error", f"ffmpeg exit code {code}: {last_words}")
