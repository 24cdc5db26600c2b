"""How far the order of an epoch is from a uniform shuffle, by block size and by number of streams; a plot.

Data sorted by class (classes of equal size, so shards are sorted by class too) are the worst case, and what is measured
here. Every figure stands beside that of a uniform shuffle, measured in the same way:

- same shard, same class: pairs in a global batch, as a ratio to their expectation in a uniform shuffle;
- variance of class counts in 1, 4, 16 and 64 batches in a row, as a ratio to that of a uniform shuffle: 1 is as good,
  less is more even, 8 is like drawing clips of one class eight at a time;
- neighbours: pairs of neighbouring instances of a shard whose visits lie at most so many batches apart;
- run: instances of a shard that a stream reads one after the other (mean), which storage reads at once;
- spread: largest difference between the distribution of the time of an instance's first visit and that of independent,
  uniform times (0 is none; pass after pass of 10 has 0.35).

    python benchmarks/shuffle.py [--plot docs/images/shuffle.png]
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tabulate import tabulate

from avid_pipeline.shards_spec.manifest import Manifest, Parameters, ShardInfo
from avid_pipeline.streams.plan import EpochPlan, plan

BATCH = 256
BLOCK_SIZES = (1, 4, 8, 16, 32, 128)
WINDOWS = (1, 4, 16, 64)
NEIGHBOURS = (1, 16, 64)
COLUMNS = (
    *("same shard", "same class"),
    *(f"variance, {window}" for window in WINDOWS),
    *(f"neighbours, {window}" for window in NEIGHBOURS),
    *("run", "spread"),
)

Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Case:
    """A data set."""

    name: str
    instances: int
    per_shard: int
    classes: int
    clips: int


CASES = (
    Case("Kinetics", 240_000, 256, 400, 10),
    Case("AudioSet", 1_800_000, 256, 527, 2),
    Case("small", 9_500, 256, 101, 10),
    Case("tiny", 1_500, 256, 50, 10),
)


@dataclass(frozen=True)
class Order:
    """An epoch: the instances and visit numbers in the order of their places, and of how many batches."""

    instances: Array
    visits: Array
    batch: int

    @property
    def batches(self) -> Array:
        """Instances, [batches, batch size]."""
        return self.instances.reshape(-1, self.batch)


def manifest_of(case: Case) -> Manifest:
    """The case's manifest."""
    shards = tuple(
        ShardInfo(
            name=f"shard-{number:06d}.tar",
            samples=min(case.per_shard, case.instances - first),
            bytes=2048,
            sha256="0" * 64,
            first_index=first,
        )
        for number, first in enumerate(range(0, case.instances, case.per_shard))
    )
    return Manifest(
        dataset=case.name,
        split="train",
        parameters=Parameters(),
        parameters_fingerprint=Parameters().fingerprint(),
        modalities=("video",),
        classes=(),
        spectrogram_statistics=None,
        shards=shards,
        quarantined=0,
    )


def planned(case: Case, **arguments: int) -> tuple[EpochPlan, Order]:
    """The epoch of a case as it is planned."""
    arguments = {"global_batch_size": BATCH} | arguments
    epoch = plan(manifest_of(case), seed=0, epoch=0, clips_per_instance=case.clips, **arguments)
    batches = [epoch.global_batch(step) for step in range(epoch.num_batches)]
    instances = np.concatenate([batch.instances for batch in batches])
    visits = np.concatenate([batch.visits for batch in batches])
    return epoch, Order(instances, visits, epoch.global_batch_size)


def shuffled(case: Case, batch: int = BATCH) -> Order:
    """A uniform shuffle of all visits of the case."""
    line = np.random.default_rng(1).permutation(case.instances * case.clips)
    line = line[: len(line) // batch * batch]
    return Order(line % case.instances, line // case.instances, batch)


def pair_ratio(order: Order, groups: Array) -> float:
    """Pairs of one group in a batch, relative to their expectation in a uniform shuffle of other instances."""
    sizes = np.bincount(groups).astype(float)
    expected = (sizes * (sizes - 1)).sum() / (len(groups) * (len(groups) - 1)) * order.batch * (order.batch - 1)
    sample = order.batches[:: max(1, len(order.batches) // 1000)]
    counts = [np.bincount(groups[batch]).astype(float) for batch in sample]
    return float(np.mean([(count * (count - 1)).sum() for count in counts]) / expected)


def variance_ratio(order: Order, classes: Array, window: int) -> float:
    """Variance of class counts in ``window`` batches in a row, relative to a uniform shuffle's."""
    number = len(order.batches) // window
    if number < 4:
        return float("nan")
    windows = classes[order.batches[: number * window]].reshape(number, -1)
    share = np.bincount(classes) / len(classes)
    expected = share * windows.shape[1]
    deviation = np.mean(
        [((np.bincount(each, minlength=len(share)) - expected) ** 2 / expected).sum() for each in windows]
    )
    return float(deviation / (len(share) - 1) / (1 - windows.shape[1] / len(order.instances)))


def distances(order: Order, case: Case) -> npt.NDArray[np.float64]:
    """Batches between the visits of two neighbours in a shard, for every visit number."""
    times = times_of(order, case)
    same_shard = np.arange(1, case.instances) // case.per_shard == np.arange(case.instances - 1) // case.per_shard
    apart = np.abs(np.diff(times, axis=0))[same_shard]
    return apart[~np.isnan(apart)]


def times_of(order: Order, case: Case) -> npt.NDArray[np.float64]:
    """The batch of each visit, [instances, clips]; nan for the dropped tail."""
    times = np.full((case.instances, case.clips), np.nan)
    times[order.instances, order.visits] = np.arange(len(order.instances)) // order.batch
    return times


def spread(order: Order, case: Case) -> float:
    """Kolmogorov-Smirnov distance of first visits from the earliest of independent uniform times."""
    first = np.sort(np.nanmin(times_of(order, case), axis=1)) / len(order.batches)
    seen = np.arange(1, len(first) + 1) / len(first)
    return float(np.abs(seen - (1 - (1 - first) ** case.clips)).max())


def mean_run(epoch: EpochPlan, order: Order, case: Case) -> float:
    """Mean number of neighbours of a shard that a stream reads one after the other."""
    followed = 0
    places = np.arange(len(order.instances))
    streams = places % case.instances % epoch.num_streams
    for stream in range(epoch.num_streams):
        line = order.instances[streams == stream]
        followed += int(((np.diff(line) == 1) & (np.diff(line // case.per_shard) == 0)).sum())
    return len(places) / (len(places) - followed)


def figures(order: Order, case: Case) -> list[float]:
    """All but the run."""
    classes = np.arange(case.instances) * case.classes // case.instances
    apart = distances(order, case)
    return [
        pair_ratio(order, np.arange(case.instances) // case.per_shard),
        pair_ratio(order, classes),
        *(variance_ratio(order, classes, window) for window in WINDOWS),
        *(float((apart <= near).mean()) for near in NEIGHBOURS),
    ]


def print_table(title: str, rows: list[list[object]], first: str) -> None:
    """Print a markdown table."""
    print(f"\n{title}\n")
    print(tabulate(rows, headers=(first, *COLUMNS), tablefmt="pipe", floatfmt=".2g"))


def measure(case: Case) -> None:
    """Print the figures of a case by block size."""
    rows: list[list[object]] = []
    for block_size in BLOCK_SIZES:
        epoch, order = planned(case, block_size=block_size)
        name = f"block size {block_size}" + ("" if epoch.block_size == block_size else f" ({epoch.block_size} used)")
        rows.append([name, *figures(order, case), mean_run(epoch, order, case), spread(order, case)])
    order = shuffled(case)
    rows.append(["uniform shuffle", *figures(order, case), 1.0, spread(order, case)])
    title = f"{case.name}: {case.instances:,} instances, {case.per_shard} in a shard, {case.classes} classes, "
    print_table(title + f"{case.clips} clips of each, batch {BATCH}", rows, "order")


def measure_streams(case: Case, batch: int) -> None:
    """Print the figures of a case by number of streams, at the default block size."""
    rows: list[list[object]] = []
    for streams in (64, 256, 512, 1024, 2048):
        epoch, order = planned(case, canonical_streams=streams, global_batch_size=batch)
        name = f"canonical_streams {streams}" + ("" if epoch.num_streams == streams else f" ({epoch.num_streams} used)")
        rows.append([name, *figures(order, case), mean_run(epoch, order, case), spread(order, case)])
    order = shuffled(case, batch)
    rows.append(["uniform shuffle", *figures(order, case), 1.0, spread(order, case)])
    print_table(f"{case.name}, batch {batch}", rows, "order")


def draw(case: Case, path: Path) -> None:
    """Draw variances by window, distances of neighbours, and times of visits."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.4), layout="constrained")
    classes = np.arange(case.instances) * case.classes // case.instances
    windows = [2**power for power in range(10)]
    lines = [(f"blocks of {size}", planned(case, block_size=size)[1]) for size in BLOCK_SIZES]
    lines.append(("uniform shuffle", shuffled(case)))
    for name, order in lines:
        style = {"color": "black", "linestyle": "--"} if name == "uniform shuffle" else {}
        style |= {"linewidth": 3} if name == "blocks of 8" else {}
        label = name + (" (default)" if name == "blocks of 8" else "")
        left.plot(windows, [variance_ratio(order, classes, window) for window in windows], label=label, **style)
        apart = np.sort(distances(order, case)[::50])
        middle.plot(np.maximum(apart, 0.5), np.arange(1, len(apart) + 1) / len(apart), label=label, **style)
    left.set(xscale="log", yscale="log", xlabel="batches in a row", ylabel="ratio to a uniform shuffle")
    left.set_title("Variance of class counts, data sorted by class")
    left.legend(fontsize=8)
    middle.set(xscale="log", xlabel="batches between the visits of two shard neighbours", ylabel="share of pairs")
    middle.set_title("Neighbours in a shard")
    bins = np.linspace(0, 1, 41)
    for name, order, style in (("default", lines[2][1], "-"), ("uniform shuffle", lines[-1][1], "--")):
        times = np.sort(times_of(order, case), axis=1) / len(order.batches)
        for visit, colour in ((0, "C0"), (case.clips // 2, "C1"), (case.clips - 1, "C2")):
            heights, _ = np.histogram(times[:, visit], bins, density=True)
            label = f"visit {visit + 1} of {case.clips}" if style == "-" else name if visit == 0 else None
            colour = colour if style == "-" else "black"
            right.plot((bins[1:] + bins[:-1]) / 2, heights, style, color=colour, label=label)
    right.set(xlabel="time in the epoch", ylabel="density")
    right.set_title("When an instance is visited")
    right.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)


def main() -> None:
    """Measure, and draw where wanted."""
    parser = argparse.ArgumentParser(description="How far the order of an epoch is from a uniform shuffle.")
    parser.add_argument("--plot", type=Path, help="draw the figures of Kinetics to this file")
    arguments = parser.parse_args()
    for case in CASES:
        measure(case)
    for batch in (BATCH, 32):
        measure_streams(CASES[0], batch)
    if arguments.plot:
        draw(CASES[0], arguments.plot)


if __name__ == "__main__":
    main()
