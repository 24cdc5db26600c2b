"""Real processes: finding those that a job started, and waiting for them to appear or end."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from avid_pipeline.preprocess.job import plan_tasks
from avid_pipeline.preprocess.sources.kinetics import list_kinetics
from avid_pipeline.shards_spec.manifest import Parameters, VideoParameters
from tests.conftest import make_video
from tests.processes import Started, descendants, processes, started

TRIES = 8
SMALL = Parameters(video=VideoParameters(short_side=48), samples_per_shard=4)


def make_tasks(tree: Path, root: Path):
    """Shard tasks of a tree; four samples each."""
    root.mkdir(exist_ok=True)
    return plan_tasks(list_kinetics(tree), SMALL, str(root))


def files(root: Path) -> dict[str, bytes]:
    """Every file below a root, those of ``_progress`` too."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def converters(pid: int, tree: Path) -> dict[int, int]:
    """The ffmpeg processes below a process that read a tree: theirs and their parents' ids."""
    table = processes()
    return {child: table[child][0] for child in descendants(pid, table) if _reads(table[child][1], tree)}


def ffmpegs(tree: Path) -> list[int]:
    """All ffmpeg processes that read a tree, orphans too."""
    return [pid for pid, (_, command) in processes().items() if _reads(command, tree)]


def _reads(command: str, tree: Path) -> bool:
    return f"file:{tree}" in command and "ffmpeg" in command.split(" ")[0]


@dataclass
class Killer:
    """Kills workers with SIGKILL while their ffmpeg runs, as soon as ``ready`` says so.

    A busy machine may have no time for it until they are done: whoever needs a worker killed tries again.

    Attributes:
        killed: the workers' process ids.
    """

    tree: Path
    ready: Callable[[], bool]
    most: int
    killed: list[int] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> "Killer":
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(60)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        while len(self.killed) < self.most and not self._stop.wait(0.01):
            workers = set(converters(os.getpid(), self.tree).values()) - set(self.killed) if self.ready() else set()
            for worker in sorted(workers)[:1]:
                assert worker != os.getpid()
                os.kill(worker, signal.SIGKILL)
                self.killed.append(worker)


@pytest.fixture(scope="session")
def slow_tree(tmp_path_factory) -> Path:
    """Eight videos that take long enough to be caught at it: two shards of four."""
    root = tmp_path_factory.mktemp("slow")
    for number in range(8):
        make_video(root / "c" / f"video{number}.mp4", seconds=6, size="320x240", tone=300 + 100 * number)
    return root


@pytest.fixture(scope="session")
def endless_tree(tmp_path_factory) -> Path:
    """Two videos without sound whose conversion would last longer than any test."""
    root = tmp_path_factory.mktemp("endless")
    first = make_video(root / "c" / "video0.mp4", seconds=150, size="320x240", tone=None)
    (root / "c" / "video1.mp4").hardlink_to(first)
    return root


@pytest.fixture
def start_job(endless_tree, tmp_path) -> Iterator[Callable[..., Started]]:
    """Starts ``avid-preprocess`` on the endless tree; gives the process when two ffmpeg run."""

    def start(*arguments: object, **options: object) -> Started:
        command = [sys.executable, "-m", "avid_pipeline.preprocess.cli", "kinetics", endless_tree, tmp_path / "out"]
        command += ["--missing-audio", "keep", "--preset", "veryslow", "--samples-per-shard", "1", "--workers", "2"]
        process = stack.enter_context(started(*command, *arguments, **options))
        process.wait_until(lambda: len(converters(process.pid, endless_tree)) == 2)
        return process

    with ExitStack() as stack:
        yield start
