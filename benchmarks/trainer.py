"""What the trainer adds to forward, backward and optimizer: its time a step against a bare loop over the same batches.

python benchmarks/trainer.py [--clips FOLDER] [--batch 4] [--steps 8] [--rounds 3] [--short-side 256] [--crop 224]

The floor is a loop of nothing but network, loss, backward and optimizer over batches that are in memory already. The
trainer runs as it always does: it reads shards, decodes and augments in threads on the same cores, logs every step and
agrees with other ranks on stopping. Starting and ending a run are left out: a step's time is the difference between a
run of few steps and one of more. Networks and clips are those of configs/avid/kinetics400.yaml.
"""

import statistics
import tempfile
import time
from pathlib import Path

import click
import torch
from example_clips import example_clips, make_tree
from tabulate import tabulate

from avid_pipeline.clips.batch import ClipBatch
from avid_pipeline.config import load_config
from avid_pipeline.preprocess.executors.local import LocalExecutor
from avid_pipeline.preprocess.job import run_job
from avid_pipeline.preprocess.sources.kinetics import list_kinetics
from avid_pipeline.shards_spec.manifest import Parameters, VideoParameters
from avid_pipeline.train.config import TrainConfig
from avid_pipeline.train.data import TrainingData
from avid_pipeline.train.state import distribute, divide_batch, make_bank, make_model, make_state
from avid_pipeline.train.step import train_step
from avid_pipeline.train.trainer import train

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "avid" / "kinetics400.yaml"
LIMIT = 1.05
FEW_STEPS = 2


@click.command()
@click.option("--clips", type=click.Path(exists=True, path_type=Path), help="Folder of .mp4 files to make shards of.")
@click.option("--batch", default=4, show_default=True, help="Clips in a step.")
@click.option("--steps", default=8, show_default=True, help="Steps that are timed in a round.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--short-side", default=256, show_default=True, help="Of the shards' frames.")
@click.option("--crop", default=224, show_default=True, help="Of the clips.")
@click.option("--depth", default=18, show_default=True, type=click.Choice(["10", "18"]), help="Of the video network.")
def main(clips: Path | None, batch: int, steps: int, rounds: int, short_side: int, crop: int, depth: str) -> None:
    """Print the table."""
    overrides = [f"data.batch_size={batch}", f"clip.crop_size={crop}", f"model.video_depth={depth}", "log_every=1"]
    overrides += ["epochs=1", "data.clips_per_instance=1", "loss.num_negatives=1024", "checkpoint.every_steps=null"]
    config = load_config(CONFIG, TrainConfig, overrides)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        few = make_shards(clips, FEW_STEPS * batch, short_side, folder / "few")
        more = make_shards(clips, (FEW_STEPS + steps) * batch, short_side, folder / "more")
        batches = load_batches(config, more)[:steps]
        bare, whole = [], []
        for number in range(rounds):
            bare.append(bare_loop(config, batches) / steps)
            seconds = [run(config, data, folder / f"run-{number}-{data.name}") for data in (few, more)]
            whole.append((seconds[1] - seconds[0]) / steps)
    floor, trainer = statistics.median(bare), statistics.median(whole)
    rows = [
        ("bare loop", floor, min(bare), max(bare), 1.0),
        ("avid-train", trainer, min(whole), max(whole), trainer / floor),
    ]
    print(tabulate(rows, headers=("", "s/step (median)", "least", "most", "ratio"), floatfmt=".3f"))
    print(f"ratio {trainer / floor:.3f} (limit {LIMIT}), {batch} clips a step, {torch.get_num_threads()} threads")


def make_shards(clips: Path | None, count: int, short_side: int, folder: Path) -> Path:
    """A data set of ``count`` samples."""
    folder.mkdir()
    make_tree(example_clips(clips, folder), count, folder / "videos")
    parameters = Parameters(video=VideoParameters(short_side=short_side), samples_per_shard=16)
    run_job(list_kinetics(folder / "videos"), parameters, str(folder / "shards"), LocalExecutor())
    return folder


def load_batches(config: TrainConfig, folder: Path) -> list[ClipBatch]:
    """All batches of the data set's first epoch."""
    clips = TrainingData(config, str(folder / "shards"))
    return list(clips.loader(0, 0, 0, 1, print))


def bare_loop(config: TrainConfig, batches: list[ClipBatch]) -> float:
    """Seconds for the batches, without anything around the step."""
    device = torch.device("cpu")
    model, bank = make_model(config, device), make_bank(config, 10_000, device)
    state = make_state(config, model, bank, None)
    divide_batch(model, config, bank.group)
    network = distribute(model, config, device).train()
    train_step(network, state, batches[0], batches[0]["index"], config, device, config.optimizer.learning_rate)
    began = time.perf_counter()
    for batch in batches:
        train_step(network, state, batch, batch["index"], config, device, config.optimizer.learning_rate)
    return time.perf_counter() - began


def run(config: TrainConfig, folder: Path, output: Path) -> float:
    """Seconds of a whole training run."""
    began = time.perf_counter()
    train(config, str(folder / "shards"), str(output))
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
