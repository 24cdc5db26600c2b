"""Whatever stops a conversion, the same command finishes it with the same bytes."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


def contents(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in root.iterdir() if path.is_file()}


def command_for(tree: Path, out: Path, workers: int) -> list[str]:
    command = [sys.executable, "-m", "avid_pipeline.preprocess.cli", "kinetics", str(tree), str(out)]
    return [*command, "--short-side", "48", "--samples-per-shard", "4", "--workers", str(workers)]


def wait_for(path: Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.01)


def processes_with(text: str) -> list[int]:
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and text in (folder / "cmdline").read_bytes().decode("utf-8", "replace"):
                found.append(int(folder.name))
        except OSError:
            continue  # it has ended
    return found


def assert_all_end(text: str, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while left := processes_with(text):
        assert time.monotonic() < deadline, f"still running: {left}"
        time.sleep(0.05)


def test_finished_shards_are_kept(kinetics_tree: Path, small_dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = command_for(kinetics_tree, out, workers=1)
    process = subprocess.Popen(command, start_new_session=True, cwd=tmp_path)
    try:
        wait_for(out / "_progress" / "shard-000000.json")
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert not (out / "manifest.json").exists()
    kept = (out / "shard-000000.tar").stat()
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    assert contents(out) == contents(small_dataset)
    assert (out / "shard-000000.tar").stat().st_mtime_ns == kept.st_mtime_ns
    assert not list(out.glob(".building-*"))


@pytest.fixture(scope="module")
def larger_tree(kinetics_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty sources, so that there is time to be killed."""
    root = tmp_path_factory.mktemp("larger")
    for copy in range(6):
        for path in sorted(kinetics_tree.rglob("*.mp4")):
            (root / path.parent.name).mkdir(exist_ok=True)
            os.link(path, root / path.parent.name / f"{path.stem}-{copy}.mp4")
    return root


@pytest.fixture(scope="module")
def undisturbed(larger_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed")
    subprocess.run(command_for(larger_tree, out, workers=1), check=True, capture_output=True)
    return contents(out)


@pytest.mark.slow
@pytest.mark.parametrize("whole_group", [True, False], ids=["everything", "the parent alone"])
def test_killed_at_random_moments(
    larger_tree: Path, undisturbed: dict[str, bytes], tmp_path: Path, whole_group: bool
) -> None:
    out = tmp_path / "out"
    command = command_for(larger_tree, out, workers=2)
    moments = random.Random(7)
    killed_at_work = 0
    for _ in range(5):
        process = subprocess.Popen(command, start_new_session=True, cwd=tmp_path, stderr=subprocess.DEVNULL)
        try:
            wait_for(out / "_progress" / "job.json")
            deadline = time.monotonic() + 60
            while not list(out.glob(".building-*")) and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(moments.uniform(0.0, 0.6))
            killed_at_work += bool(list(out.glob(".building-*")))
        finally:
            (os.killpg if whole_group else os.kill)(process.pid, signal.SIGKILL)
            process.wait()
        assert_all_end(str(out))
    assert killed_at_work >= 2
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert contents(out) == undisturbed
    assert not list(out.glob(".building-*"))


def test_ctrl_c_leaves_no_process(kinetics_tree: Path, small_dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = command_for(kinetics_tree, out, workers=2)
    process = subprocess.Popen(command, start_new_session=True, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    wait_for(out / "_progress" / "job.json")
    deadline = time.monotonic() + 60
    while not list(out.glob(".building-*/sample")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) != 0
    assert process.stderr is not None
    assert "Traceback" not in process.stderr.read()
    assert_all_end(str(out))
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    assert contents(out) == contents(small_dataset)
