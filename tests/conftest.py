"""Fixtures that several rooms share: real files, made by ffmpeg."""

import subprocess
from pathlib import Path

import pytest

from avid_pipeline.preprocess.executors.local import LocalExecutor
from avid_pipeline.preprocess.ffmpeg import find_ffmpeg
from avid_pipeline.preprocess.job import run_job
from avid_pipeline.preprocess.sources.kinetics import list_kinetics
from avid_pipeline.shards_spec.manifest import Parameters, VideoParameters

REPOSITORY = Path(__file__).resolve().parents[1]


def make_video(
    path: Path,
    *,
    seconds: float = 1.6,
    size: str = "66x50",
    fps: int = 25,
    tone: int | None = 440,
    picture: bool = True,
) -> Path:
    """A small real video with ffmpeg's test picture and a sine tone (None: no sound)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    command = [find_ffmpeg(), "-hide_banner", "-loglevel", "error", "-y"]
    if picture:
        command += ["-f", "lavfi", "-i", f"testsrc2=size={size}:rate={fps}:duration={seconds}"]
    if tone is not None:
        command += ["-f", "lavfi", "-i", f"sine=frequency={tone}:sample_rate=44100:duration={seconds}"]
    command += [
        "-c:v",
        "libx264",
        "-preset",
        "ultrafast",
        "-pix_fmt",
        "yuv420p",
        "-c:a",
        "aac",
        "-f",
        "mp4",
        f"file:{path}",
    ]
    subprocess.run(command, check=True)
    return path


@pytest.fixture(scope="session")
def kinetics_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten small videos in three class folders."""
    root = tmp_path_factory.mktemp("kinetics")
    for number in range(10):
        make_video(root / f"class {number % 3}" / f"video{number:06d}.mp4", tone=300 + 100 * number)
    return root


@pytest.fixture(scope="session")
def small_dataset(kinetics_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten samples in three shards."""
    root = tmp_path_factory.mktemp("shards")
    parameters = Parameters(video=VideoParameters(short_side=48), samples_per_shard=4)
    run_job(list_kinetics(kinetics_tree), parameters, str(root), LocalExecutor(1))
    return root


@pytest.fixture(scope="session")
def real_clips() -> Path:
    """The real clips beside the repository, where there are any."""
    clips = REPOSITORY.parent / "shared" / "clips"
    if not clips.is_dir():
        pytest.skip("the real clips are not beside this checkout")
    return clips
