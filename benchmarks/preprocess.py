"""CPU seconds and wall time per clip of ``avid-preprocess``, against bare ffmpeg doing the same transcode.

The floor is ffmpeg alone, started once for each clip with the very arguments that avid-preprocess gives it, its sound
written to a file: no probing, spectrograms, checksums, shards. Both run two at a time.

    python benchmarks/preprocess.py [--clips FOLDER] [--count 64] [--workers 2]
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from example_clips import example_clips, make_tree
from tabulate import tabulate

from avid_pipeline.preprocess.ffmpeg import find_ffmpeg
from avid_pipeline.preprocess.probe import probe
from avid_pipeline.preprocess.settings import Settings
from avid_pipeline.preprocess.transcode import ffmpeg_command
from avid_pipeline.shards_spec.manifest import Parameters

TARGET_RATIO = 1.1
TARGET_CPU_SECONDS = 0.9
TARGET_START_SECONDS = 3.0


@dataclass(frozen=True)
class Cost:
    """CPU seconds of all processes, and seconds on the wall."""

    cpu: float
    wall: float


def measure(work: Callable[..., object], *arguments: object) -> Cost:
    """Cost of the child processes that ``work(*arguments)`` starts and waits for."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    work(*arguments)
    after, ended = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Cost(cpu, ended - began)


def bare_ffmpeg(files: list[Path], folder: Path, workers: int) -> None:
    """The same transcode, by ffmpeg alone."""
    parameters, settings = Parameters(), Settings()

    def command(place: int, file: Path) -> list[str]:
        out = folder / f"{place}.mp4"
        arguments = ffmpeg_command(file, probe(file), None, parameters, settings, out)
        return [f"file:{folder / str(place)}.f32" if part == "pipe:1" else part for part in arguments]

    commands = [command(place, file) for place, file in enumerate(files)]
    with ThreadPoolExecutor(workers) as pool:
        for done in pool.map(lambda arguments: subprocess.run(arguments, check=True), commands):
            assert done.returncode == 0


def avid_preprocess(tree: Path, out: Path, workers: int) -> None:
    """The whole conversion, as a user runs it."""
    command = [sys.executable, "-m", "avid_pipeline.preprocess.cli", "kinetics", str(tree), str(out)]
    subprocess.run([*command, "--workers", str(workers), "--samples-per-shard", "16"], check=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=Path, help="folder with .mp4 files  [default: the real ones, else made ones]")
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeat", type=int, default=2, help="rounds; the best of each is shown")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="avid-benchmark-") as name:
        folder = Path(name)
        clips = example_clips(arguments.clips, folder)
        files = make_tree(clips, arguments.count, folder / "tree")
        make_tree(clips[:1], 1, folder / "one")
        floors, costs = [], []
        for turn in range(arguments.repeat):
            bare = folder / f"bare-{turn}"
            bare.mkdir()
            floors.append(measure(bare_ffmpeg, files, bare, arguments.workers))
            costs.append(measure(avid_preprocess, folder / "tree", folder / f"out-{turn}", arguments.workers))
        again = measure(avid_preprocess, folder / "tree", folder / "out-0", arguments.workers)
        stored = sum(path.stat().st_size for path in (folder / "out-0").glob("*.tar")) / arguments.count
    floor, cost = min(floors, key=lambda found: found.cpu), min(costs, key=lambda found: found.cpu)
    rows = [
        ("bare ffmpeg", floor.cpu / arguments.count, floor.wall / arguments.count),
        ("avid-preprocess", cost.cpu / arguments.count, cost.wall / arguments.count),
    ]
    print(f"{arguments.count} clips ({len(clips)} different), {arguments.workers} at a time, {find_ffmpeg()}")
    print(tabulate(rows, headers=("", "CPU s/clip", "wall s/clip"), floatfmt=".3f"))
    print(f"CPU ratio {cost.cpu / floor.cpu:.3f} (target at most {TARGET_RATIO})")
    print(f"CPU seconds per clip {cost.cpu / arguments.count:.3f} (target below {TARGET_CPU_SECONDS})")
    print(f"wall ratio {cost.wall / floor.wall:.3f}; {stored / 1e3:,.0f} kB a sample")
    print(f"nothing left to do: {again.wall:.2f} s in all (target: start-up under {TARGET_START_SECONDS:g} s)")


if __name__ == "__main__":
    main()
