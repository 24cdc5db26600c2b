"""Clips of Kinetics' size for the benchmarks: real ones where there are any, else made by ffmpeg."""

import itertools
import shutil
import subprocess
from pathlib import Path

from avid_pipeline.preprocess.ffmpeg import find_ffmpeg

_REAL = Path(__file__).resolve().parents[2] / "shared" / "clips" / "kinetics400"


def example_clips(given: Path | None, folder: Path) -> list[Path]:
    """The .mp4 files below ``given``; without it the real clips, or made ones, which are written to ``folder``."""
    return sorted((given or _REAL).rglob("*.mp4")) or _make_clips(folder)


def make_tree(clips: list[Path], count: int, tree: Path) -> list[Path]:
    """``count`` files in a class folder, the clips in turn."""
    (tree / "class").mkdir(parents=True)
    files = []
    for number, clip in zip(range(count), itertools.cycle(clips), strict=False):
        files.append(Path(shutil.copy(clip, tree / "class" / f"clip{number:05d}.mp4")))
    return files


def _make_clips(folder: Path) -> list[Path]:
    """Two clips of Kinetics' size, 340x256 and 10 s at 30 frames a second: moving test pictures under noise."""
    clips = []
    for number in range(2):
        path = folder / f"made-{number}.mp4"
        picture = f"testsrc2=size=340x256:rate=30:duration=10,noise=alls=12:allf=t:all_seed={number}"
        sound = f"sine=frequency={300 * (number + 1)}:sample_rate=44100:duration=10"
        command = [find_ffmpeg(), "-v", "error", "-f", "lavfi", "-i", picture, "-f", "lavfi", "-i", sound]
        subprocess.run([*command, "-pix_fmt", "yuv420p", "-c:v", "libx264", "-c:a", "aac", path], check=True)
        clips.append(path)
    return clips
