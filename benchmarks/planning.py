"""What planning an epoch costs: seconds, memory, the first batch at any step, and a batch; each beside its target.

Two million instances in 10, 1,000 and 100,000 shards, batches of 256. Each is measured in a process of its own. Memory
is the peak while an epoch is planned and its first batch made (tracemalloc), without the manifest itself. Reading and
checking the manifest's JSON, and its fingerprint, are shown beside it.

    python benchmarks/planning.py [--instances N] [--clips N]
"""

import argparse
import json
import multiprocessing
import sys
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import pairwise

import numpy as np
from tabulate import tabulate

from avid_pipeline.shards_spec.manifest import Manifest, Parameters, ShardInfo
from avid_pipeline.streams.plan import EpochPlan, plan

SHARDS = (10, 1_000, 100_000)
BATCH = 256
RANKS = 8


@dataclass(frozen=True)
class Figures:
    """What one manifest costs. Times are in seconds but where the name says otherwise, memory in 10^6 bytes."""

    manifest_megabytes: float
    read_manifest: float
    fingerprint: float
    plan: float
    plan_megabytes: float
    first_batch_milliseconds: float
    batch_milliseconds: float
    rank_batch_milliseconds: float
    visit_microseconds: float


# Name of a figure: its target, as the most it may be.
TARGETS = {"plan": 2.0, "plan_megabytes": 200.0, "first_batch_milliseconds": 100.0, "visit_microseconds": 50.0}


def manifest_json(num_instances: int, num_shards: int) -> bytes:
    """The manifest of shards of equal size, to one instance."""
    bounds = [number * num_instances // num_shards for number in range(num_shards + 1)]
    shards = tuple(
        ShardInfo(name=f"shard-{number:06d}.tar", samples=stop - start, bytes=2048, sha256="0" * 64, first_index=start)
        for number, (start, stop) in enumerate(pairwise(bounds))
    )
    return Manifest(
        dataset="made",
        split="train",
        parameters=Parameters(),
        parameters_fingerprint=Parameters().fingerprint(),
        modalities=("video",),
        classes=(),
        spectrogram_statistics=None,
        shards=shards,
        quarantined=0,
    ).to_json()


def measure(content: bytes, clips: int, steps: int = 300) -> Figures:
    """Measure in this process, which has not planned before."""
    began = time.perf_counter()
    manifest = Manifest.model_validate(json.loads(content))
    read = time.perf_counter() - began
    fingerprint = _seconds(manifest.fingerprint)
    began = time.perf_counter()
    epoch = plan(manifest, seed=0, epoch=0, clips_per_instance=clips, global_batch_size=BATCH)
    planned = time.perf_counter() - began
    places = (0, epoch.num_batches // 2, epoch.num_batches - 1)
    first = max(_seconds(lambda step=step: epoch.rank_batch(step, 0, RANKS)) for step in places)
    batch = _mean_milliseconds(epoch, steps, epoch.global_batch)
    tracemalloc.start()
    plan(manifest, seed=0, epoch=1, clips_per_instance=clips, global_batch_size=BATCH).global_batch(0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return Figures(
        manifest_megabytes=len(content) / 1e6,
        read_manifest=read,
        fingerprint=fingerprint,
        plan=planned,
        plan_megabytes=peak / 1e6,
        first_batch_milliseconds=first * 1000,
        batch_milliseconds=batch,
        rank_batch_milliseconds=_mean_milliseconds(epoch, steps, lambda step: epoch.rank_batch(step, 3, RANKS)),
        visit_microseconds=batch * 1000 / BATCH,
    )


def _mean_milliseconds(epoch: EpochPlan, steps: int, look_up: Callable[[int], object]) -> float:
    """Of batches at random steps, the slowest case for the processor's caches."""
    wanted = np.random.default_rng(0).integers(epoch.num_batches, size=steps).tolist()
    return _seconds(lambda: [look_up(step) for step in wanted]) / steps * 1000


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def main() -> None:
    """Measure, print, and say what misses its target."""
    parser = argparse.ArgumentParser(description="What planning an epoch costs.")
    parser.add_argument("--instances", type=int, default=2_000_000)
    parser.add_argument("--clips", type=int, default=10, help="visits of every instance")
    arguments = parser.parse_args()
    columns = []
    for shards in SHARDS:
        content = manifest_json(arguments.instances, shards)
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            columns.append(asdict(pool.submit(measure, content, arguments.clips).result()))
    rows = [
        [
            name.replace("_", " "),
            *(column[name] for column in columns),
            f"<= {TARGETS[name]:g}" if name in TARGETS else "",
        ]
        for name in columns[0]
    ]
    print(f"{arguments.instances:,} instances, {arguments.clips} clips of each, batches of {BATCH}, {RANKS} ranks\n")
    headers = ("", *(f"{shards:,} shards" for shards in SHARDS), "target")
    print(tabulate(rows, headers=headers, tablefmt="pipe", floatfmt=".3g"))
    missed = [name for name, most in TARGETS.items() if max(column[name] for column in columns) > most]
    if missed:
        sys.exit(f"missed: {', '.join(missed)}")


if __name__ == "__main__":
    main()
