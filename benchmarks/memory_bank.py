"""One loss step against the memory bank, beside a plain gather-and-bmm one; and the bank's memory per rank.

A step is drawing negatives, forward, backward and the update of the memories, on the CPU. The plain step is what one
would write without a second thought: all candidates' rows of a batch gathered, a batched matrix product, exp and log as
the paper has them, autograd, an update. Rounds of all kinds of steps are interleaved, and ratios are taken within a
round: their median is printed. Memory is that of real processes: the tensors that are alive after a step of AVID+CMA
(bank and positives), and by how much the process's peak of resident memory grew (which has the positives, as int64,
before they are stored).

    python benchmarks/memory_bank.py [--instances N] [--negatives K] [--batch B] [--rounds R] [--threads T]
"""

import argparse
import gc
import multiprocessing
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812 (the name everyone knows)
from tabulate import tabulate
from torch import Tensor

from avid_pipeline.train.losses import AVIDCMALoss, AVIDLoss
from avid_pipeline.train.memory_bank import MemoryBank

DIM, TEMPERATURE, PARTITION_FUNCTION = 128, 0.07, 1.7
POSITIVES, WITHIN_NEGATIVES = 32, 64
STEPS_PER_ROUND = 5
LIMIT = 0.6
WORLD_SIZES = (1, 2, 4)

Step = Callable[[Tensor, Tensor, Tensor], None]


@dataclass(frozen=True)
class Size:
    """What is measured: instances in the bank, negatives of a sample, samples of a batch."""

    instances: int
    negatives: int
    batch: int


@dataclass(frozen=True)
class RankMemory:
    """Memory of one rank, in 10^6 bytes: rows of the bank, all tensors alive, growth of the resident peak."""

    bank: float
    tensors: float
    peak_growth: float


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instances", type=int, default=1_784_108, help="rows of the bank (AudioSet's)")
    parser.add_argument("--negatives", type=int, default=1024, help="negatives of a sample")
    parser.add_argument("--batch", type=int, default=32, help="samples of a batch")
    parser.add_argument("--rounds", type=int, default=15, help=f"rounds of {STEPS_PER_ROUND} steps of each kind")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of the timed steps")
    options = parser.parse_args()
    size = Size(options.instances, options.negatives, options.batch)
    print_memory(size)
    torch.set_num_threads(options.threads)
    print_times(size, options.rounds)


def print_times(size: Size, rounds: int) -> None:
    """Time the steps in turn and print the medians."""
    bank = MemoryBank(size.instances, DIM)
    losses = {
        "AVID": AVIDLoss(bank, size.negatives, TEMPERATURE),
        "AVID+CMA, 32 positives": make_cma(bank, size),
    }
    steps: dict[str, Step] = {"plain AVID": plain_step(bank, size)}
    for name, criterion in losses.items():
        criterion.partition_function = PARTITION_FUNCTION
        steps[name] = step_of(criterion)
    seconds = measure(steps, size, rounds)
    table = []
    for name, times in seconds.items():
        ratios = [time / plain for time, plain in zip(times, seconds["plain AVID"], strict=True)]
        table.append((name, statistics.median(times) * 1e3, statistics.median(ratios), min(ratios), max(ratios)))
    headers = ("step", "ms", "ratio to plain", "least", "most")
    print(f"\nN={size.instances:,} D={DIM} K={size.negatives} B={size.batch}, {torch.get_num_threads()} threads")
    print(tabulate(table, headers=headers, floatfmt=("", ".2f", ".2f", ".2f", ".2f")))
    print(f"AVID ratio {table[1][2]:.2f} (limit {LIMIT}); AVID+CMA ratio {table[2][2]:.2f}")


def step_of(criterion: AVIDLoss | AVIDCMALoss) -> Step:
    """A step of ours."""

    def step(video: Tensor, audio: Tensor, index: Tensor) -> None:
        criterion(video, audio, index)[0].backward()  # type: ignore[no-untyped-call]

    return step


def plain_step(bank: MemoryBank, size: Size) -> Step:
    """A step of AVID, cross-modal, as one would write it; on the bank's own rows, which it updates too."""
    memories = bank.local()
    noise = size.negatives * PARTITION_FUNCTION

    def step(video: Tensor, audio: Tensor, index: Tensor) -> None:
        queries = [F.normalize(embeddings, dim=1) for embeddings in (video, audio)]
        drawn = torch.randint(0, size.instances - 1, (len(index), size.negatives))
        candidates = torch.cat([index[:, None], drawn + (drawn >= index[:, None])], dim=1)
        directions = []
        for query, memory in zip(queries, reversed(memories), strict=True):
            rows = memory.index_select(0, candidates.flatten()).view(*candidates.shape, DIM)
            exp_scores = torch.bmm(rows, query[:, :, None])[:, :, 0].div(TEMPERATURE).exp()
            positive = -(exp_scores[:, 0] / (exp_scores[:, 0] + noise)).log()
            negative = -(noise / (exp_scores[:, 1:] + noise)).log().sum(dim=1)
            directions.append((positive + negative).mean())
        ((directions[0] + directions[1]) / 2).backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for query, memory in zip(queries, memories, strict=True):
                memory[index] = F.normalize(bank.momentum * memory[index] + (1 - bank.momentum) * query, dim=1)

    return step


def measure(steps: dict[str, Step], size: Size, rounds: int) -> dict[str, list[float]]:
    """Seconds of a step of each kind in every round, after one round that is not counted."""
    generator = torch.Generator().manual_seed(0)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            batches = [make_batch(size, generator) for _ in range(STEPS_PER_ROUND)]
            started = time.perf_counter()
            for batch in batches:
                step(*batch)
            if number > 0:
                seconds[name].append((time.perf_counter() - started) / STEPS_PER_ROUND)
    return seconds


def make_batch(size: Size, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Random embeddings that need gradients, and distinct instances."""
    video, audio = (torch.randn(size.batch, DIM, generator=generator).requires_grad_() for _ in range(2))
    stride = size.instances // size.batch
    return video, audio, torch.arange(size.batch) * stride + int(torch.randint(stride, (), generator=generator))


def make_cma(bank: MemoryBank, size: Size) -> AVIDCMALoss:
    """AVID+CMA as in the published configurations, with random positives."""
    generator = torch.Generator().manual_seed(1)
    positives = torch.randint(0, size.instances, (len(bank.rows), POSITIVES), generator=generator)
    return AVIDCMALoss(bank, positives, size.negatives, min(WITHIN_NEGATIVES, size.negatives))


def print_memory(size: Size) -> None:
    """Run a step of AVID+CMA on 1, 2 and 4 ranks and print the memory of rank 0, which owns the most."""
    table = []
    for world_size in WORLD_SIZES:
        found = run_ranks(size, world_size)[0]
        table.append((world_size, found.bank, found.tensors, found.peak_growth))
    print(tabulate(table, headers=("ranks", "bank MB/rank", "all tensors MB", "peak RSS growth MB"), floatfmt=".1f"))


def run_ranks(size: Size, world_size: int) -> list[RankMemory]:
    """The memory of each rank, every one a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"file://{Path(folder) / 'meeting'}"
        tasks = [(size, rank, world_size, meeting) for rank in range(world_size)]
        with multiprocessing.get_context("spawn").Pool(world_size) as pool:
            return pool.starmap(measure_rank, tasks, chunksize=1)


def measure_rank(size: Size, rank: int, world_size: int, meeting: str) -> RankMemory:
    """One rank's memory around a step."""
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world_size)
    step_of(AVIDLoss(MemoryBank(64, DIM), 8))(*make_batch(Size(64, 8, 4), torch.Generator()))  # Libraries load.
    before, peak_before = tensor_bytes(), peak_resident_bytes()
    bank = MemoryBank(size.instances, DIM)
    criterion = make_cma(bank, size)
    step_of(criterion)(*make_batch(size, torch.Generator().manual_seed(rank)))
    growth = peak_resident_bytes() - peak_before
    held = tensor_bytes() - before
    rows = sum(memory.nbytes for memory in bank.local())
    dist.destroy_process_group()
    return RankMemory(rows / 1e6, held / 1e6, growth / 1e6)


def tensor_bytes() -> int:
    """Bytes of all tensors alive in this process."""
    gc.collect()
    storages = {}
    for found in gc.get_objects():
        if issubclass(type(found), Tensor) and found.device.type == "cpu":
            storage = found.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def peak_resident_bytes() -> int:
    """Most memory that this process ever had resident (Linux)."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        sys.exit("/proc/self/status has no VmHWM; measure on Linux")
    return int(found[1]) * 1024


if __name__ == "__main__":
    main()
