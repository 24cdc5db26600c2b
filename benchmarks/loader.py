"""What a training clip costs: 8 frames at 224x224 with all augmentation, and 200x257 of spectrogram.

On shards made from clips of Kinetics' size (340x256), the loader's CPU milliseconds per clip are shown beside

- the original implementation, which takes 167 ms per clip and core on a machine like the one this was written on:
  the target is a tenth of that;
- the raw decode floor, measured in the same run: PyAV decoding the same 8 frames and nothing else.

Then the same loader over loopback S3 (benchmarks/s3_server.py), and on data sets of 10, 1,000 and 100,000 shards, at
the beginning, the middle and the end of an epoch.

    python benchmarks/loader.py [--clips FOLDER] [--count 96]
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from example_clips import example_clips, make_tree
from tabulate import tabulate

from avid_pipeline.clips.augmentation import clip_generator
from avid_pipeline.clips.loader import ClipLoader
from avid_pipeline.clips.reading import TrainingChoice
from avid_pipeline.clips.settings import AugmentationSettings, ClipSettings
from avid_pipeline.clips.timing import draw_times
from avid_pipeline.preprocess.executors.local import LocalExecutor
from avid_pipeline.preprocess.job import run_job
from avid_pipeline.preprocess.sources.kinetics import list_kinetics
from avid_pipeline.shards_spec.manifest import MANIFEST_NAME, Manifest, Parameters
from avid_pipeline.shards_spec.reader import ShardReader, open_dataset
from avid_pipeline.shards_spec.video import select_frames
from avid_pipeline.streams.plan import EpochPlan, plan

ORIGINAL_MILLISECONDS = 167.0
TARGET_MILLISECONDS = ORIGINAL_MILLISECONDS / 10
TARGET_GIGABYTES = 1.5
BATCH_SIZE = 32
CLIP = ClipSettings()
CHOICE = TrainingChoice(seed=0, epoch=0, augmentation=AugmentationSettings())


@dataclass(frozen=True)
class Figures:
    """One pass: clips, CPU and wall seconds after the first two batches, bytes read, and peak memory in bytes."""

    clips: int
    cpu: float
    wall: float
    read: int
    peak: int

    @property
    def milliseconds(self) -> float:
        """CPU milliseconds per clip, which is milliseconds per clip and core."""
        return 1000 * self.cpu / self.clips


def epoch_plan(reader: ShardReader, clips_per_instance: int) -> EpochPlan:
    """The order of the benchmark."""
    return plan(
        reader.manifest,
        seed=0,
        epoch=0,
        clips_per_instance=clips_per_instance,
        global_batch_size=BATCH_SIZE,
    )


def load(root: str, endpoint: str, workers: int, operators: str, first: int, batches: int) -> Figures:
    """Load batches and throw them away; ``endpoint`` is of the S3 server, empty for a local root."""
    torch.set_num_threads(1)
    access = {"aws_region": "us-east-1", "aws_access_key_id": "any", "aws_secret_access_key": "any"}
    reader = open_dataset(root, {"aws_endpoint": endpoint, **access} if endpoint else None)
    visits = max(1, -(-(first + batches + 2) * BATCH_SIZE // len(reader)))
    order = epoch_plan(reader, visits).rank_batches(0, 1, first)[: batches + 2]
    loader = ClipLoader(reader, order, CLIP, CHOICE, workers=workers, operators=operators)  # type: ignore[arg-type]
    clips, cpu, wall = 0, 0.0, 0.0
    for number, batch in enumerate(loader):
        if number == 1:
            cpu, wall = time.process_time(), time.perf_counter()
        clips += len(batch["index"]) if number > 1 else 0
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    sizes = [_sample_bytes(reader, int(index)) for part in order[2:] for index in part.instances]
    return Figures(clips, cpu, wall, sum(sizes), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def _sample_bytes(reader: ShardReader, index: int) -> int:
    shard, place = reader.manifest.locate(index)
    return reader.index_of(shard).span(place)[1]


def decode_floor(root: Path, batches: int) -> Figures:
    """PyAV decodes the frames of the same clips, from memory, in one thread; nothing else is counted."""
    reader = open_dataset(root)
    clips, cpu, read = 0, 0.0, 0
    visits = max(1, -(-batches * BATCH_SIZE // len(reader)))
    for batch in epoch_plan(reader, visits).rank_batches(0, 1)[:batches]:
        for instance, visit in zip(batch.instances.tolist(), batch.visits.tolist(), strict=True):
            sample = reader.read(instance)
            assert sample.video is not None
            times = draw_times(sample.record, CLIP, clip_generator(0, 0, instance, visit))
            began = time.process_time()
            select_frames(sample.video, times.first_video_frame, CLIP.num_frames, CLIP.fps, "benchmark")
            cpu += time.process_time() - began
            clips += 1
            read += len(sample.video)
    return Figures(clips, cpu, cpu, read, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def alone(function: str, *arguments: object) -> Figures:
    """Call one of the functions above in a process of its own, for its memory."""
    command = [sys.executable, __file__, "--call", function, json.dumps([str(part) for part in arguments])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return Figures(**json.loads(done.stdout))


def call(function: str, arguments: list[str]) -> None:
    """The other end of :func:`alone`."""
    if function == "load":
        root, endpoint, workers, operators, first, batches = arguments
        figures = load(root, endpoint, int(workers), operators, int(first), int(batches))
    else:
        figures = decode_floor(Path(arguments[0]), int(arguments[1]))
    print(json.dumps(asdict(figures)))


def make_shards(clips: list[Path], count: int, folder: Path) -> Path:
    """Convert copies of the clips with default settings, eight to a shard."""
    make_tree(clips, count, folder / "tree")
    run_job(list_kinetics(folder / "tree"), Parameters(samples_per_shard=8), str(folder / "shards"), LocalExecutor())
    return folder / "shards"


def multiply(root: Path, shards: int, folder: Path) -> Path:
    """A data set of many shards, which are links to those of another."""
    manifest = open_dataset(root).manifest
    folder.mkdir()
    infos, first = [], 0
    for number in range(shards):
        info = manifest.shards[number % len(manifest.shards)]
        name = f"shard-{number:06d}"
        os.link(root / info.name, folder / f"{name}.tar")
        os.link(root / info.index_name, folder / f"{name}.index.npz")
        infos.append(info.model_copy(update={"name": f"{name}.tar", "first_index": first}))
        first += info.samples
    made = Manifest(**{**manifest.__dict__, "shards": tuple(infos)})
    (folder / MANIFEST_NAME).write_bytes(made.to_json())
    return folder


def show_speed(root: Path, batches: int) -> None:
    """Milliseconds per clip against the floor and the target."""
    floor = alone("decode_floor", root, batches)
    runs = {
        "loader, 1 thread": alone("load", root, "", 1, "opencv", 0, batches),
        "loader, 2 threads": alone("load", root, "", 2, "opencv", 0, batches),
        "loader with DALI's CPU operators, 2 threads": alone("load", root, "", 2, "dali", 0, batches),
    }
    rows = [("raw decode floor", floor.milliseconds, floor.clips / floor.wall, 1.0, None, None)]
    for name, run in runs.items():
        share = floor.milliseconds / run.milliseconds
        rows.append((name, run.milliseconds, run.clips / run.wall, share, run.read / run.wall / 1e6, run.peak / 1e9))
    headers = ("", "CPU ms/clip", "clips/s", "floor's share", "MB/s read", "peak GB")
    print(tabulate(rows, headers, floatfmt=("", ".1f", ".1f", ".2f", ".1f", ".2f")))
    worst = max(runs["loader, 1 thread"].milliseconds, runs["loader, 2 threads"].milliseconds)
    print(f"\n{worst:.1f} ms per clip and core; target at most {TARGET_MILLISECONDS:.1f}, a tenth of the original's")
    print(f"original / ours: {ORIGINAL_MILLISECONDS / worst:.1f} (at least 10)")
    print(f"peak memory {runs['loader, 2 threads'].peak / 1e9:.2f} GB (at most {TARGET_GIGABYTES})")


def show_object_storage(root: Path, batches: int) -> None:
    """Clips a second from a loopback S3 server in a process of its own beside those from disk."""
    command = [sys.executable, str(Path(__file__).with_name("s3_server.py")), str(root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        endpoint = server.stdout.readline().strip()
        try:
            pairs = [
                (
                    alone("load", root, "", 2, "opencv", 0, batches),
                    alone("load", "s3://bucket", endpoint, 2, "opencv", 0, batches),
                )
                for _ in range(3)
            ]
        finally:
            server.terminate()
    local, remote = (max(run.clips / run.wall for run in runs) for runs in zip(*pairs, strict=True))
    print(f"\nfrom disk {local:.1f} clips/s, over loopback S3 {remote:.1f}: ratio {remote / local:.2f} (at least 0.9)")


def show_scale(root: Path, folder: Path, batches: int) -> None:
    """Milliseconds per clip against the number of shards and the step resumed at."""
    rows = []
    for shards in (10, 1_000, 100_000):
        made = multiply(root, shards, folder / f"shards-{shards}")
        steps = epoch_plan(open_dataset(made), 4).num_batches
        places = (0, max(0, steps // 2 - batches), max(0, steps - batches - 2))
        rows.append(
            (f"{shards:,}", *(alone("load", made, "", 2, "opencv", first, batches).milliseconds for first in places))
        )
    print("\n" + tabulate(rows, ("shards", "ms/clip at the start", "middle", "end of an epoch"), floatfmt=".1f"))
    print(f"slowest / fastest: {max(max(row[1:]) for row in rows) / min(min(row[1:]) for row in rows):.2f}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=Path, help="folder with .mp4 files  [default: the real ones, else made ones]")
    parser.add_argument("--count", type=int, default=96, help="samples to make")
    parser.add_argument("--batches", type=int, default=24, help="of 32 clips, in every run")
    parser.add_argument("--call", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.call:
        call(arguments.call[0], json.loads(arguments.call[1]))
        return
    with tempfile.TemporaryDirectory(prefix="avid-benchmark-") as name:
        folder = Path(name)
        root = make_shards(example_clips(arguments.clips, folder), arguments.count, folder)
        show_speed(root, arguments.batches)
        show_object_storage(root, arguments.batches)
        show_scale(root, folder, max(4, arguments.batches // 4))


if __name__ == "__main__":
    main()
