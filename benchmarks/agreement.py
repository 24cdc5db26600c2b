"""Agreement search beside its matrix products alone: time, and memory, against the number of instances.

python benchmarks/agreement.py --threads 1 --plot docs/images/agreement.png

The floor is the matrix products of the same blocks for both modalities, into the same buffers, and nothing else. The
two are timed in turn, block by block, and the median ratio of the rounds counts, of wall and of CPU time (on a machine
with other work, use one thread and look at CPU time). Of many instances only some blocks of queries are timed, each
against all instances; the output says how many.
"""

import math
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import click
import torch
import torch.nn.functional as F  # noqa: N812 (the name everyone knows)
from tabulate import tabulate
from torch import Tensor

from avid_pipeline.train.nearest_rows import NearestRows, Rows, Tile, choose_tile

BLOCK_BYTES = 1 << 27
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """One line of the table: how many instances, of what kind, and how much of the search is timed."""

    instances: int
    dim: int
    k: int
    data: str
    dtype: str
    rounds: int
    most_blocks: int
    threads: int


@dataclass(frozen=True)
class Measured:
    """Seconds are medians of the rounds and for the timed queries alone."""

    queries: int
    floor_seconds: float
    search_seconds: float
    ratio: float
    cpu_ratio: float
    table_bytes: int
    rss_growth: int


class Stopwatch:
    """Adds up wall and CPU seconds of what it is entered for."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0

    def __enter__(self) -> None:
        self._start = time.perf_counter(), time.process_time()

    def __exit__(self, *_: object) -> None:
        self.wall += time.perf_counter() - self._start[0]
        self.cpu += time.process_time() - self._start[1]


def make_memories(case: Case) -> tuple[Tensor, Tensor]:
    """Unit vectors: uniform, or around shared class centres, 500 instances to a class, as a trained network's are."""
    generator = torch.Generator().manual_seed(0)
    memories = torch.randn(2, case.instances, case.dim, generator=generator)
    if case.data == "classes":
        centres = torch.randn(max(1, case.instances // 500), case.dim, generator=generator)
        labels = torch.randint(0, len(centres), (case.instances,), generator=generator)
        for memory in memories:
            memory.mul_(0.5).add_(centres[labels])
    for memory in memories:
        F.normalize(memory, dim=1, out=memory)
    video, audio = memories.to(DTYPES[case.dtype])
    return video, audio


def multiply_alone(queries: Rows, memories: Rows, tile: Tile, buffers: list[Tensor]) -> None:
    """The matrix products of one block of queries."""
    for start in range(0, len(memories[0]), tile.columns):
        for query, memory, buffer in zip(queries, memories, buffers, strict=True):
            columns = memory[start : start + tile.columns].float()
            similarity = buffer[: len(query) * len(columns)].view(len(query), len(columns))
            torch.mm(query.float(), columns.T, out=similarity)


def measure(case: Case) -> Measured:
    """Times one case; runs in a process of its own, whose peak memory it reads."""
    torch.set_num_threads(case.threads)
    memories = make_memories(case)
    tile = choose_tile(BLOCK_BYTES, case.instances, case.k)
    buffers = [torch.zeros(tile.rows * tile.columns) for _ in memories]
    margin = 2 * 1.05 * (case.dim + 4) * 2.0**-24
    warm_up = range(0, tile.rows)
    multiply_alone(tuple(m[warm_up.start : warm_up.stop] for m in memories), memories, tile, buffers)
    before, rounds = reset_peak_memory(), []
    for _ in range(case.rounds):
        search = NearestRows(memories, 0, case.k, "consensus", margin, tile)
        blocks = list(search.blocks())
        chosen = blocks[:: math.ceil(len(blocks) / case.most_blocks)]
        floor, searched = Stopwatch(), Stopwatch()
        for block in chosen:
            with floor:
                multiply_alone(tuple(m[block.start : block.stop] for m in memories), memories, tile, buffers)
            with searched:
                search.add(block, memories, 0)
        table_bytes = search.matches().nbytes
        del search  # the next round makes its own
        rounds.append((floor.wall, searched.wall, searched.wall / floor.wall, searched.cpu / floor.cpu))
    floors, searches, ratios, cpu_ratios = zip(*rounds, strict=True)
    return Measured(
        queries=sum(map(len, chosen)),
        floor_seconds=median(floors),
        search_seconds=median(searches),
        ratio=median(ratios),
        cpu_ratio=median(cpu_ratios),
        table_bytes=table_bytes,
        rss_growth=peak_memory() - before,
    )


def reset_peak_memory() -> int:
    """Makes the kernel forget the largest resident size so far; returns the present one in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_memory()


def peak_memory() -> int:
    """Largest resident size in bytes."""
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) * 1024


def plot(measured: dict[int, Measured], path: Path) -> None:
    """Time per query and memory against instances, both axes logarithmic."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (time_axes, memory_axes) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    instances = list(measured)
    for label, seconds in (("search", "search_seconds"), ("matrix products alone", "floor_seconds")):
        per_query = [1e3 * getattr(of, seconds) / of.queries for of in measured.values()]
        time_axes.plot(instances, per_query, marker="o", label=label)
    memory_axes.plot(instances, [of.rss_growth / 1e6 for of in measured.values()], marker="o", label="peak growth")
    memory_axes.plot(instances, [of.table_bytes / 1e6 for of in measured.values()], marker="o", label="the result")
    matrix = [4 * count**2 / 1e6 for count in instances]
    memory_axes.plot(instances, matrix, linestyle=":", color="grey", label="a similarity matrix (not made)")
    for axes, title in ((time_axes, "ms per query"), (memory_axes, "MB")):
        axes.set(xscale="log", yscale="log", xlabel="instances", title=title)
        axes.set_xticks(instances, [f"{count // 1000}k" if count >= 1000 else str(count) for count in instances])
        axes.xaxis.minorticks_off()
        axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


def run(case: Case) -> Measured:
    """Measures in a fresh process."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure, case).result()


def to_row(case: Case, of: Measured) -> tuple[object, ...]:
    """A line of the table; memory in MB."""
    row_bytes = 2 * case.instances * case.dim * DTYPES[case.dtype].itemsize
    timed = "all" if of.queries == case.instances else f"{of.queries:,}"
    megabytes = (round(size / 1e6) for size in (row_bytes, of.table_bytes, of.rss_growth))
    return (f"{case.instances:,}", timed, of.floor_seconds, of.search_seconds, of.ratio, of.cpu_ratio, *megabytes)


@click.command(help=__doc__)
@click.option("--instances", default="25000,50000,100000,200000,400000", show_default=True, help="N, with commas.")
@click.option("--dim", default=128, show_default=True)
@click.option("--k", default=32, show_default=True)
@click.option("--data", type=click.Choice(["uniform", "classes"]), default="uniform", show_default=True)
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="float32", show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--blocks", default=98, show_default=True, help="Most blocks of queries to time.")
@click.option("--threads", default=torch.get_num_threads(), help="For torch; as many as it would take by default.")
@click.option("--plot", "picture", type=click.Path(path_type=Path), help="Write a picture here.")
def main(
    instances: str,
    dim: int,
    k: int,
    data: str,
    dtype: str,
    rounds: int,
    blocks: int,
    threads: int,
    picture: Path | None,
) -> None:
    """Print the table."""
    cases = [Case(int(count), dim, k, data, dtype, rounds, blocks, threads) for count in instances.split(",")]
    measured = {case.instances: run(case) for case in cases}
    rows = [to_row(case, measured[case.instances]) for case in cases]
    print(f"D={dim}, k={k}, consensus, {data} {dtype} rows, {threads} threads, {rounds} rounds")
    headers = (
        "instances",
        "timed",
        "products s",
        "search s",
        "ratio",
        "CPU ratio",
        "rows MB",
        "result MB",
        "growth MB",
    )
    print(tabulate(rows, headers=headers, floatfmt=".2f"))
    if picture:
        plot(measured, picture)


if __name__ == "__main__":
    main()
