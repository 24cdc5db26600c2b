"""One ffmpeg process per source: the picture becomes a short-GOP file, the sound a stream of samples."""

import errno
import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NoReturn

import ffmpeg
import numpy as np

from avid_pipeline.preprocess.errors import PreprocessError
from avid_pipeline.preprocess.ffmpeg import find_ffmpeg
from avid_pipeline.preprocess.probe import INPUT_OPTIONS, AudioStream, VideoStream
from avid_pipeline.preprocess.quarantine import SourceRejectedError
from avid_pipeline.shards_spec.manifest import AudioParameters, VideoCodec, VideoParameters
from avid_pipeline.shards_spec.spectrogram import FloatArray

DEFAULT_QUALITY: dict[VideoCodec, int] = {"h264": 23, "hevc": 26, "vp9": 33, "mjpeg": 4, "copy": 0}

_SAMPLES_PER_READ = 1 << 18
_LAST_WORDS = 500
_SOURCE = "avid-pipeline-source"


def transcode(
    source: Path,
    video: VideoStream | None,
    audio: AudioStream | None,
    video_parameters: VideoParameters,
    audio_parameters: AudioParameters,
    video_out: Path,
) -> Iterator[FloatArray]:
    """Run ffmpeg on a source: write the picture to ``video_out`` and yield the sound while it is decoded.

    Each stream begins at its own first frame or sample; their offsets are known from the probe. Gaps in the
    sound are filled with silence so that its clock holds.

    Args:
        source: the file.
        video: its video stream, or None to leave the picture out.
        audio: its audio stream, or None to leave the sound out.
        video_parameters: how to store the picture.
        audio_parameters: sample rate of the sound.
        video_out: the file to write.

    Yields:
        Blocks of mono float32 samples [n] at ``audio_parameters.sample_rate``.

    Raises:
        SourceRejectedError: ffmpeg failed; the detail has its last words.
        PreprocessError: ffmpeg failed for a reason that lies not in the source (killed, or the disk is full).
    """
    command = _command(source, video, audio, video_parameters, audio_parameters, video_out)
    with tempfile.TemporaryFile() as messages:
        # In a group of its own: Ctrl-C, which reaches the whole group of the terminal, must not make ffmpeg stop
        # early, or a sound source would be quarantined.
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=messages, process_group=0
        ) as process:
            try:
                assert process.stdout is not None
                while block := process.stdout.read(_SAMPLES_PER_READ * 4):
                    samples = np.frombuffer(block, dtype="<f4", count=len(block) // 4)
                    if not np.isfinite(samples).all():
                        raise SourceRejectedError("decode_error", "the sound has values that are no finite numbers")
                    yield samples
            except BaseException:
                process.kill()
                raise
        if process.returncode != 0:
            _refuse(process.returncode, _last_words(messages))


def _command(
    source: Path,
    video: VideoStream | None,
    audio: AudioStream | None,
    video_parameters: VideoParameters,
    audio_parameters: AudioParameters,
    video_out: Path,
) -> list[str]:
    # An absolute path with its protocol: no name can pass for an option or another protocol.
    stream = ffmpeg.input(_SOURCE, threads=1, **INPUT_OPTIONS)
    outputs = []
    if video is not None:
        outputs.append(_video_output(stream[str(video.number)], video_parameters, video_out))
    if audio is not None:
        sound = (
            stream[str(audio.number)]
            .filter("asetpts", "PTS-STARTPTS")
            .filter("aresample", audio_parameters.sample_rate, **{"async": 1})
        )
        outputs.append(ffmpeg.output(sound, "pipe:1", format="f32le", acodec="pcm_f32le", ac=1))
    merged = ffmpeg.merge_outputs(*outputs).global_args(
        "-nostdin", "-hide_banner", "-loglevel", "error", "-filter_complex_threads", "1"
    )
    arguments: list[str] = merged.overwrite_output().compile(cmd=find_ffmpeg())
    # Only now the name, for ffmpeg-python hashes its arguments as UTF-8 and file names may be any bytes.
    return [f"file:{source.absolute()}" if argument == _SOURCE else argument for argument in arguments]


def _video_output(stream: ffmpeg.Stream, parameters: VideoParameters, out: Path) -> ffmpeg.Stream:
    common = {"format": "mp4", "movflags": "+faststart", "map_metadata": "-1", "fflags": "+bitexact"}
    if parameters.codec == "copy":
        return ffmpeg.output(stream, f"file:{out}", vcodec="copy", **common)
    shown_width = "iw*sar"
    factor = f"min(1,{parameters.short_side}/min({shown_width},ih))"
    # Even sizes, rounded down so that nothing is upscaled; the small term absorbs floating-point noise.
    even = "max(2,2*trunc(({size}*" + factor + "+0.01)/2))"
    frames = (
        stream.filter("setpts", "PTS-STARTPTS")
        .filter("fps", parameters.fps)
        .filter("scale", even.format(size=shown_width), even.format(size="ih"), flags="bicubic")
        .filter("setsar", 1)
    )
    return ffmpeg.output(frames, f"file:{out}", threads=1, **common, **_encoder_options(parameters))


def _encoder_options(parameters: VideoParameters) -> dict[str, str | int]:
    gop, quality = parameters.gop, parameters.quality
    if parameters.codec == "h264":
        return {
            "vcodec": "libx264", "preset": parameters.preset, "crf": quality, "pix_fmt": "yuv420p",
            "g": gop, "keyint_min": gop, "sc_threshold": 0, "bf": 0, "flags": "+bitexact+cgop",
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


def _last_words(messages: IO[bytes]) -> str:
    size = messages.seek(0, 2)
    messages.seek(max(0, size - _LAST_WORDS))
    text = messages.read().decode("utf-8", "replace")
    # Without memory addresses the same source always gives the same line in the quarantine.
    return " ".join(re.sub(r" @ 0x[0-9a-f]+", "", text).split())
