"""Writing the demo videos: rendered here, encoded by ffmpeg, laid out as Kinetics is."""

import json
import os
import signal
import string
import subprocess
import tempfile
import wave
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Final

import ffmpeg
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from avid_pipeline.preprocess.demo.causes import CLASS_NAMES, keyed_generator, sample_causes
from avid_pipeline.preprocess.demo.picture import FRAMES_PER_SECOND, HEIGHT, WIDTH, render_frames
from avid_pipeline.preprocess.demo.sound import SAMPLES_PER_SECOND, synthesize
from avid_pipeline.preprocess.errors import PreprocessError
from avid_pipeline.preprocess.ffmpeg import find_ffmpeg

__all__ = ["SECONDS", "DemoSummary", "demo_names", "write_demo"]

SECONDS: Final = 3.0
_MARKER: Final = "demo.json"
_ID_LETTERS: Final = string.ascii_letters + string.digits
_VERSION: Final = 2


@dataclass(frozen=True)
class DemoSummary:
    """What was written: videos in train and in val, and the class names."""

    train: int
    val: int
    classes: tuple[str, ...]


def write_demo(
    out: Path,
    instances: int = 300,
    seed: int = 0,
    workers: int | None = None,
    *,
    val_fraction: float = 1 / 3,
    show_progress: bool = False,
) -> DemoSummary:
    """Write synthetic videos to ``OUT/train/<class>/`` and ``OUT/val/<class>/``; finished files are kept.

    Args:
        out: the folder.
        instances: videos in all.
        seed: every video depends on (seed, its number) and nothing else.
        workers: processes; by default one for each core this process may use.
        val_fraction: share of the videos held out, the last ones.
        show_progress: draw a progress bar.

    Raises:
        PreprocessError: a number is out of range, the folder holds something else (such as a demo made with other
            parameters), there is no ffmpeg, or it failed.
    """
    find_ffmpeg()
    names = demo_names(instances, seed, val_fraction)
    _claim(out, {"version": _VERSION, "instances": instances, "seed": seed, "val_fraction": val_fraction})
    waiting = [(number, name) for number, name in enumerate(names) if not (out / name).exists()]
    for _, name in waiting:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
    processes = workers or len(os.sched_getaffinity(0))
    with (
        tqdm(total=instances, initial=instances - len(waiting), unit="video", disable=not show_progress) as bar,
        ProcessPoolExecutor(processes, get_context("spawn"), initializer=_leave_interrupts_to_parent) as pool,
    ):
        futures = [pool.submit(_write_video, out / name, seed, number) for number, name in waiting]
        try:
            for future in as_completed(futures):
                future.result()
                bar.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    held_out = sum(name.startswith("val/") for name in names)
    return DemoSummary(instances - held_out, held_out, CLASS_NAMES)


def demo_names(instances: int, seed: int, val_fraction: float = 1 / 3) -> list[str]:
    """Relative file names of all videos: ``train/bouncing_circle/<11 characters>_000000_000003.mp4``.

    Raises:
        PreprocessError: the seed is negative, or the numbers leave train or val without a video.
    """
    if seed < 0:
        raise PreprocessError(f"demo: seed is {seed}; give 0 or more")
    num_val = max(1, round(instances * val_fraction))
    if not 0 < val_fraction < 1 or num_val >= instances:
        raise PreprocessError(
            f"demo: {instances} instances with a val_fraction of {val_fraction} leave train or val without a video; "
            "give at least 2 instances and a fraction between 0 and 1"
        )
    names = []
    for number in range(instances):
        letters = keyed_generator(seed, number, "name").integers(0, len(_ID_LETTERS), 11)
        video_id = "".join(_ID_LETTERS[letter] for letter in letters)
        split = "train" if number < instances - num_val else "val"
        names.append(f"{split}/{sample_causes(seed, number).class_name}/{video_id}_000000_{round(SECONDS):06d}.mp4")
    return names


def _claim(out: Path, parameters: dict[str, float]) -> None:
    """Note what the folder is for, or check that it is for the same."""
    marker = out / _MARKER
    remedy = "give another folder or remove this one"
    if marker.exists():
        try:
            found = json.loads(marker.read_text(encoding="utf-8"))
        except ValueError as error:
            raise PreprocessError(f"{marker}: not JSON ({error}); {remedy}") from error
        if found != parameters:
            raise PreprocessError(f"{out}: holds a demo made with {found}, not {parameters}; {remedy}")
        return
    partial = marker.with_name(f"{_MARKER}.partial")
    if out.exists() and (not out.is_dir() or any(path != partial for path in out.iterdir())):
        raise PreprocessError(f"{out}: exists and is not an empty folder or a demo (there is no {_MARKER}); {remedy}")
    out.mkdir(parents=True, exist_ok=True)
    partial.write_text(json.dumps(parameters) + "\n", encoding="utf-8")
    partial.replace(marker)


def _leave_interrupts_to_parent() -> None:
    """Ctrl-C reaches every process of a terminal; only the parent answers, by letting running videos finish."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _write_video(path: Path, seed: int, number: int) -> None:
    causes = sample_causes(seed, number)
    frames = render_frames(causes, SECONDS, keyed_generator(seed, number, "picture"))
    waveform = synthesize(causes, SECONDS, keyed_generator(seed, number, "sound"))
    with tempfile.TemporaryDirectory(prefix="avid-demo-") as folder:
        sound_file = Path(folder) / "sound.wav"
        _write_wave(sound_file, waveform)
        partial = path.with_name(f".{path.name}.partial")
        try:
            _encode(frames, sound_file, partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def _encode(frames_THWC: NDArray[np.uint8], sound_file: Path, out: Path) -> None:
    picture = ffmpeg.input(
        "pipe:0", format="rawvideo", pix_fmt="rgb24", s=f"{WIDTH}x{HEIGHT}", framerate=FRAMES_PER_SECOND
    )
    sound = ffmpeg.input(f"file:{sound_file}")
    command = (
        ffmpeg.output(
            picture,
            sound,
            f"file:{out}",
            format="mp4",
            vcodec="libx264",
            preset="superfast",
            crf=20,
            pix_fmt="yuv420p",
            threads=1,
            acodec="aac",
            audio_bitrate="96k",
            fflags="+bitexact",
            flags="+bitexact",
        )
        .global_args("-hide_banner", "-loglevel", "error")
        .overwrite_output()
        .compile(cmd=find_ffmpeg())
    )
    done = subprocess.run(command, input=frames_THWC.tobytes(), capture_output=True, check=False)
    if done.returncode != 0:
        words = " ".join(done.stderr.decode("utf-8", "replace").split())[-500:]
        raise PreprocessError(f"{out}: ffmpeg exit code {done.returncode}: {words}")


def _write_wave(path: Path, waveform: NDArray[np.float32]) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLES_PER_SECOND)
        file.writeframes((np.clip(waveform, -1, 1) * 32767).astype("<i2").tobytes())
