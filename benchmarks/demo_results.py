"""What random networks, AVID and AVID+CMA reach on the demo data, over several seeds: the table of docs/results.md.

Everything goes through the command lines, as a user would; what is finished is kept, so that the same command goes on.

    python benchmarks/demo_results.py --output demo-results     # some 40 minutes on two cores
"""

import argparse
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from avid_pipeline.evaluate.results import read_results
from avid_pipeline.shards_spec.storage import open_storage

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
METHODS = ("random", "avid", "cma")
# Row of the table: folder of the evaluation, number of the table in its results, row and column there.
FIGURES = {
    **{f"k-NN, {name}": ("knn", 0, name, "top-1, k=20") for name in ("video.pool", "audio.pool", "video", "audio")},
    **{f"linear, video {layer}": ("linear", 0, layer, "Video@1") for layer in ("conv2x", "conv3x", "conv4x", "conv5x")},
    **{f"linear, audio {layer}": ("linear-audio", 0, layer, "Video@1") for layer in ("conv4x", "conv5x")},
    **{
        f"{kind} {column}, {pair}": ("retrieval", table, pair, column)
        for table, kind, column in ((0, "instance", "R@1"), (0, "instance", "R@10"), (1, "class", "R@1"))
        for pair in ("video to audio", "audio to video", "video to video", "audio to audio")
    },
}


def run(module: str, *arguments: object) -> None:
    """Run a command of ours; its output goes to this one's."""
    command = [sys.executable, "-m", f"avid_pipeline.{module}", *map(str, arguments)]
    print("$", " ".join(command[2:]), flush=True)
    subprocess.run(command, check=True)


def make_data(root: Path) -> None:
    """The demo's videos and shards; see scripts/demo.sh."""
    run("preprocess.cli", "demo", root / "videos", "--instances", 300, "--seed", 0)
    for split in ("train", "val"):
        places = (root / "videos" / split, root / "shards" / split)
        run("preprocess.cli", "kinetics", *places, "--split", split, "--samples-per-shard", 25)


def train_and_evaluate(root: Path, seed: int) -> None:
    """Both methods with a seed, and all evaluations of them and of random weights."""
    train, val = root / "shards" / "train", root / "shards" / "val"
    avid, cma = root / f"avid-{seed}", root / f"cma-{seed}"
    seeded = ("--set", f"seed={seed}")
    run("train", CONFIGS / "demo.yaml", "--data", train, "--output", avid, *seeded, "--resume")
    start = ("--start-from", avid)
    run("train", CONFIGS / "demo-cma.yaml", "--data", train, "--output", cma, *start, *seeded, "--resume")
    for method in METHODS:
        chosen = (cma,) if method == "cma" else (avid,)
        if method == "random":
            chosen += ("--random-weights", seed)

        def out(name: str, method: str = method) -> tuple[str, Path]:
            return "--output", root / "evaluation" / f"{name}-{method}-{seed}"

        run("evaluate", "knn", *chosen, "--data", val, "--gallery", train, *out("knn"))
        run("evaluate", "retrieval", *chosen, "--data", val, *out("retrieval"))
        for name, config in (("linear", "demo.yaml"), ("linear-audio", "demo-audio.yaml")):
            places = ("--data", train, "--test-data", val, "--cache-features")
            run("evaluate", "linear", CONFIGS / "linear" / config, *chosen, *places, *seeded, *out(name))


def lines(root: Path, seeds: Sequence[int]) -> Iterator[str]:
    """The table in Markdown: means and standard deviations over the seeds, in per cent."""
    yield "| | " + " | ".join(METHODS) + " |"
    yield "|---|" + "---:|" * len(METHODS)
    for title, (folder, table, row, column) in FIGURES.items():
        cells = []
        for method in METHODS:
            found = [
                read_results(open_storage(root / "evaluation" / f"{folder}-{method}-{seed}")).tables[table]
                for seed in seeds
            ]
            values = [100 * _figure(each.rows[row][column]) for each in found]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}")
        yield f"| {title} | " + " | ".join(cells) + " |"


def _figure(value: float | None) -> float:
    assert value is not None, "nothing was counted"
    return value


def main() -> None:
    """Run everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    make_data(arguments.output)
    for seed in arguments.seeds:
        train_and_evaluate(arguments.output, seed)
    print("\n".join(lines(arguments.output, arguments.seeds)))


if __name__ == "__main__":
    main()
