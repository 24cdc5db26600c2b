"""Linear probes on features that are computed once: seconds an epoch against those of training on clips.

python benchmarks/linear_cache.py [--data ROOT --test-data ROOT] [--checkpoint CHECKPOINT] [--batch 16] [--epochs 3]

Both train the four classifiers of configs/linear/kinetics.yaml with the same batches and no tests between epochs; on
clips, every epoch reads, decodes and augments anew and runs the frozen network. The first epoch on cached features
includes computing them, those of the test data too. Without --data, shards are made of example clips, with two to
test and as many classes as Kinetics-400 has, for the classifiers' share of the time; without --checkpoint, the
network, R(2+1)D-18, has random weights, which are as slow as any.
"""

import itertools
import statistics
import tempfile
import time
from pathlib import Path

import click
import safetensors.torch
import torch
from example_clips import example_clips, make_tree
from tabulate import tabulate

from avid_pipeline.collectives import RankGroup
from avid_pipeline.config import load_config
from avid_pipeline.evaluate.checkpoint import open_checkpoint
from avid_pipeline.evaluate.classification.config import LinearConfig
from avid_pipeline.evaluate.classification.data import open_parts
from avid_pipeline.evaluate.classification.linear import run_linear
from avid_pipeline.models import AVModel
from avid_pipeline.preprocess.executors.local import LocalExecutor
from avid_pipeline.preprocess.job import run_job
from avid_pipeline.preprocess.sources.kinetics import list_kinetics
from avid_pipeline.shards_spec.manifest import MANIFEST_NAME, Parameters, read_manifest
from avid_pipeline.shards_spec.storage import open_storage

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "linear" / "kinetics.yaml"
CLASSES = 400


@click.command()
@click.option("--data", help="Root of labelled shards; made of example clips without it.")
@click.option("--test-data", help="Root of test data, for --data.")
@click.option("--checkpoint", help="Whose network is probed; random weights without it.")
@click.option("--clips", type=click.Path(exists=True, path_type=Path), help="Folder of .mp4 files to make shards of.")
@click.option("--instances", default=64, show_default=True, help="Samples of the shards that are made.")
@click.option("--batch", default=16, show_default=True, help="Clips in a step.")
@click.option("--epochs", default=3, show_default=True, help="Epochs that are timed.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a setting.")
def main(
    data: str | None,
    test_data: str | None,
    checkpoint: str | None,
    clips: Path | None,
    instances: int,
    batch: int,
    epochs: int,
    overrides: tuple[str, ...],
) -> None:
    """Print the table."""
    # One epoch more than is timed, for the last is followed by a test.
    changes = [f"data.batch_size={batch}", f"epochs={epochs + 1}", "test.every=1000000", "save_every_steps=null"]
    changes += ["test.clip_level_clips=1", "test.video_level_clips=1", f"test.batch_size={batch}", *overrides]
    config = load_config(CONFIG, LinearConfig, changes)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        roots = (data, test_data or data) if data else make_shards(clips, instances, folder)
        weights = checkpoint or make_weights(folder)
        fresh = run(config, roots, weights, folder / "fresh", cached=False)
        cached = run(config, roots, weights, folder / "cached", cached=True)
        features = next((folder / "cached").glob("features-train-*"))
        size = sum(path.stat().st_size for path in features.rglob("*") if path.is_file())
    ratio = statistics.median(fresh[1:]) / statistics.median(cached[1:])
    rows = [(name, s[0], statistics.median(s[1:]), min(s[1:]), max(s[1:])) for name, s in
            (("on clips", fresh), ("on cached features", cached))]  # fmt: skip
    print(tabulate(rows, headers=("", "first epoch (s)", "s/epoch (median)", "least", "most"), floatfmt=".3f"))
    whole = sum(fresh) / sum(cached)
    print(f"an epoch is {ratio:.1f} times as fast, {len(fresh)} epochs with computing the features {whole:.1f} times")
    print(f"features: {size / 1e6:.1f} MB; {torch.get_num_threads()} threads")


def make_shards(clips: Path | None, count: int, folder: Path) -> tuple[str, str]:
    """Data sets of Kinetics' size: ``count`` samples to train on, and two for tests."""
    roots = []
    for name, size in (("train", count), ("test", 2)):
        make_tree(example_clips(clips, folder), size, folder / name / "videos")
        run_job(list_kinetics(folder / name / "videos"), Parameters(), str(folder / name / "shards"), LocalExecutor())
        manifest = read_manifest(open_storage(folder / name / "shards"))
        classes = manifest.classes + tuple(f"class {number}" for number in range(2, CLASSES + 1))
        named = manifest.model_copy(update={"classes": classes})
        (folder / name / "shards" / MANIFEST_NAME).write_bytes(named.to_json())
        roots.append(str(folder / name / "shards"))
    return roots[0], roots[1]


def make_weights(folder: Path) -> str:
    """Random weights of R(2+1)D-18."""
    path = folder / "weights.safetensors"
    safetensors.torch.save_file(AVModel(18, generator=torch.Generator().manual_seed(0)).state_dict(), path)
    return str(path)


def run(config: LinearConfig, roots: tuple[str, str], weights: str, output: Path, *, cached: bool) -> list[float]:
    """Seconds of every epoch but the last; computing the features is part of the first."""
    moments = [time.perf_counter()]

    def say(message: str) -> None:
        if message.startswith("epoch "):
            moments.append(time.perf_counter())

    run_linear(
        config,
        open_checkpoint(weights),
        *open_parts(*roots, None),
        open_storage(output, create=True),
        RankGroup(),
        say=say,
        cache_features=cached,
    )
    return [after - before for before, after in itertools.pairwise(moments[:-1])]


if __name__ == "__main__":
    main()
