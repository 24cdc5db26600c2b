"""Whatever stops a conversion, the same command finishes it with the same bytes."""

import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.processes import Started, run, started, wait_until


def contents(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in root.iterdir() if path.is_file()}


def command_for(tree: Path, out: Path, workers: int) -> list[str]:
    command = [sys.executable, "-m", "avid_pipeline.preprocess.cli", "kinetics", str(tree), str(out)]
    return [*command, "--short-side", "48", "--samples-per-shard", "4", "--workers", str(workers)]


def assert_all_end(process: Started) -> None:
    wait_until(lambda: not process.family(), describe=lambda: f"still running: {process.family()}")


def test_finished_shards_are_kept(kinetics_tree: Path, small_dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = command_for(kinetics_tree, out, workers=1)
    with started(*command, cwd=tmp_path) as process:
        process.wait_until((out / "_progress" / "shard-000000.json").exists)
        process.signal(signal.SIGKILL, group=True)
        assert process.wait() == -signal.SIGKILL
    assert not (out / "manifest.json").exists()
    kept = (out / "shard-000000.tar").stat()
    run(*command, cwd=tmp_path)
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
    run(*command_for(larger_tree, out, workers=1))
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
        with started(*command, cwd=tmp_path) as process:
            process.wait_until((out / "_progress" / "job.json").exists)
            wait_until(lambda process=process: list(out.glob(".building-*")) or not process.running)
            time.sleep(moments.uniform(0.0, 0.6))
            killed_at_work += bool(list(out.glob(".building-*")))
            if process.running:
                process.signal(signal.SIGKILL, group=whole_group)
                process.wait()
            assert_all_end(process)
    assert killed_at_work >= 2
    run(*command, cwd=tmp_path)
    assert contents(out) == undisturbed
    assert not list(out.glob(".building-*"))


def test_ctrl_c_leaves_no_process(kinetics_tree: Path, small_dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = command_for(kinetics_tree, out, workers=2)
    with started(*command, cwd=tmp_path) as process:
        process.wait_until(lambda: list(out.glob(".building-*/sample")))
        process.signal(signal.SIGINT, group=True)
        assert process.wait() != 0
        assert "Traceback" not in process.stderr
        assert_all_end(process)
    run(*command, cwd=tmp_path)
    assert contents(out) == contents(small_dataset)
