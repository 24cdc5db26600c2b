"""What the tests of whole training runs share: the smallest run that has everything."""

import json
import sys
from pathlib import Path

from avid_pipeline.train.config import TrainConfig
from avid_pipeline.train.run_log import read_metrics
from tests.ranks import run_ranks

SMALL = {
    "epochs": 2,
    "model": {"video_depth": 10, "projection": (16, 8)},
    "clip": {"crop_size": 16, "video_seconds": 0.25, "audio_seconds": 0.3},
    "data": {"batch_size": 5, "clips_per_instance": 1, "workers": 1},
    "loss": {"num_negatives": 8},
    "optimizer": {"learning_rate": 1e-3, "milestones": (1,)},
    "log_every": 1,
}
AGREEMENT = {"num_positives": 2, "num_within_negatives": 4, "resample_every": 1}


def settings(**changes):
    """The smallest run, with changes at the top level; 10 instances make two steps an epoch."""
    return TrainConfig.model_validate(SMALL | changes)


def losses(folder):
    """Step and loss of every line of a run's log."""
    return [(entry["step"], entry["loss/total"]) for entry in read_metrics(folder) if "loss/total" in entry]


def train_on_ranks(ranks: int, folder: Path, root: object, runs: dict[str, dict]) -> None:
    """Train several runs, one after the other, on so many ranks; see runs_worker.py.

    Args:
        ranks: their number.
        folder: for the runs' folders and what the ranks meet at.
        root: of the data.
        runs: name of each run's folder to its changes.
    """
    configs = {name: settings(**changes).model_dump_json() for name, changes in runs.items()}
    listed = [{"config": config, "data": str(root), "output": str(folder / name)} for name, config in configs.items()]
    (folder / "runs.json").write_text(json.dumps(listed))
    steps = run_ranks(Path(__file__).with_name("runs_worker.py"), ranks, folder, str(folder / "runs.json"))
    assert len(steps) == len(runs)


def command(folder: Path, root: object, output: object, /, *options: str, ranks: int | None = None, **changes):
    """The command line of a run, alone or under torchrun; its configuration is written into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "config.yaml"
    file.write_text(json.dumps(settings(**changes).model_dump(mode="json")))
    launcher = [sys.executable]
    if ranks is not None:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "--max-restarts=3"]
    module = ["-m", "avid_pipeline.train", str(file), "--data", str(root), "--output", str(output)]
    return [*launcher, *module, *options]
