"""Data sets whose classes are told apart by colour and pitch, and what evaluations of them share."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner, Result

from avid_pipeline.collectives import RankGroup
from avid_pipeline.evaluate.checkpoint import EvaluatedModel, open_checkpoint
from avid_pipeline.evaluate.classification.config import FinetuneConfig, LinearConfig
from avid_pipeline.evaluate.classification.data import open_parts
from avid_pipeline.evaluate.classification.finetune import run_finetune
from avid_pipeline.evaluate.classification.linear import run_linear
from avid_pipeline.evaluate.classification.training import Training
from avid_pipeline.evaluate.data import open_fold
from avid_pipeline.evaluate.results import Results
from avid_pipeline.preprocess.executors.local import LocalExecutor
from avid_pipeline.preprocess.ffmpeg import find_ffmpeg
from avid_pipeline.preprocess.job import run_job
from avid_pipeline.preprocess.sources.kinetics import list_kinetics
from avid_pipeline.preprocess.sources.ucf101 import list_ucf101
from avid_pipeline.shards_spec.manifest import MANIFEST_NAME, Parameters, VideoParameters
from avid_pipeline.shards_spec.reader import open_dataset
from avid_pipeline.shards_spec.sample import Sample
from avid_pipeline.shards_spec.shard_file import ShardWriter
from avid_pipeline.shards_spec.storage import Storage, open_storage
from tests.evaluate.saved_models import save_weights, small_model

CLASSES = {"Blue": ("0x1020e0", 300), "Green": ("0x10c030", 1500), "Red": ("0xd02010", 6000)}
PER_CLASS = 7
NUM_TEST = 7

CLIP = {"crop_size": 32, "video_seconds": 0.25, "audio_seconds": 0.3}
AUGMENTATION = {"area": (0.5, 1.0), "brightness": 0.1, "contrast": 0.1, "saturation": 0.1, "hue": 0.0}
SMALL: dict[str, Any] = {
    "epochs": 2,
    "clip": CLIP,
    "augmentation": AUGMENTATION,
    "data": {"batch_size": 6, "clips_per_instance": 2, "workers": 1},
    "optimizer": {"learning_rate": 1e-3, "milestones": (1,)},
    "test": {"clip_level_clips": 3, "video_level_clips": 2, "batch_size": 4},
}


def finetune_config(**changes: Any) -> FinetuneConfig:
    """Two epochs of four steps, after one of the classifier alone."""
    return FinetuneConfig.model_validate(SMALL | {"classifier_epochs": 1} | changes)


def linear_config(**changes: Any) -> LinearConfig:
    """Two epochs of four steps on the first and the last layer."""
    return LinearConfig.model_validate(SMALL | {"layers": ("conv2x", "conv5x")} | changes)


def make_coloured(path: Path, name: str, number: int, *, sound: bool, seconds: float = 1.0) -> None:
    """A video of one class, with noise of its own for every number."""
    colour, tone = CLASSES[name]
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = f"noise=all_seed={number + 1}:alls=40:allf=t"
    command = [find_ffmpeg(), "-hide_banner", "-loglevel", "error", "-y"]
    command += ["-f", "lavfi", "-i", f"color=c={colour}:size=66x50:rate=16:duration={seconds},{noise}"]
    if sound:
        command += ["-f", "lavfi", "-i", f"sine=frequency={tone + 20 * number}:sample_rate=24000:duration={seconds}"]
    command += ["-c:v", "libx264", "-preset", "ultrafast", "-pix_fmt", "yuv420p", "-c:a", "aac", f"file:{path}"]
    subprocess.run(command, check=True)


def _convert(listing: Any, root: Path) -> Path:
    parameters = Parameters(video=VideoParameters(short_side=48), samples_per_shard=8)
    run_job(listing, parameters, str(root), LocalExecutor(1))
    return root


def make_folds(folder: Path) -> Path:
    """A data set like UCF101: no sound, two folds; 14 instances for training and 7 for tests in each."""
    lists = folder / "source" / "ucfTrainTestlist"
    lists.mkdir(parents=True)
    names = {name: [f"{name}/v_{name}_g{number:02d}_c01.avi" for number in range(1, PER_CLASS + 1)] for name in CLASSES}
    for number, (name, files) in enumerate(names.items(), start=1):
        with (lists / "classInd.txt").open("a") as file:
            file.write(f"{number} {name}\n")
        for place, path in enumerate(files):
            make_coloured(folder / "source" / "UCF-101" / path, name, place, sound=False)
            for fold in (1, 2):
                # Three, two and two of the seven.
                is_test = (place + number + 3 * fold) % PER_CLASS < (3 if number == 1 else 2)
                with (lists / f"{'test' if is_test else 'train'}list0{fold}.txt").open("a") as file:
                    file.write(path + ("" if is_test else f" {number}") + "\n")
    return _convert(list_ucf101(folder / "source"), folder / "shards")


def make_splits(folder: Path) -> tuple[Path, Path]:
    """Training and test data with picture and sound, of two roots: 12 and 7 instances."""
    roots = []
    for split, counts in (("train", (4, 4, 4)), ("val", (3, 2, 2))):
        for name, count in zip(CLASSES, counts, strict=True):
            for number in range(count):
                # Shades of their own for the tests.
                place = number if split == "train" else 4 + number
                make_coloured(folder / split / name / f"{split}{name}{number}.mp4", name, place, sound=True)
        roots.append(_convert(list_kinetics(folder / split, split=split), folder / f"shards-{split}"))
    return roots[0], roots[1]


def rewritten(root: Path, target: Path, edit: Callable[[int, Sample], Sample]) -> Path:
    """A copy of a data set in which samples are edited, given their index; its checksums fit."""
    reader = open_dataset(root)
    target.mkdir(parents=True)
    shards = []
    for shard in reader.manifest.shards:
        with ShardWriter(target / shard.name) as writer:
            for place, sample in enumerate(reader.read_shard(shard)):
                writer.add(edit(shard.first_index + place, sample))
            finished = writer.finish()
        (target / shard.index_name).write_bytes(finished.index.to_bytes())
        shards.append(shard.model_copy(update={"bytes": finished.bytes, "sha256": finished.sha256}))
    manifest = reader.manifest.model_copy(update={"shards": tuple(shards)})
    (target / MANIFEST_NAME).write_bytes(manifest.to_json())
    return target


def with_labels(sample: Sample, *labels: int) -> Sample:
    """The same sample with other labels."""
    return replace(sample, record=sample.record.model_copy(update={"labels": labels}))


def without_picture(sample: Sample) -> Sample:
    """The same sample with a video that cannot be decoded."""
    assert sample.video is not None
    start = sample.video.index(b"mdat") + 4
    return replace(sample, video=sample.video[:start] + bytes(len(sample.video) - start))


def small_evaluated(folder: Path, seed: int = 0) -> EvaluatedModel:
    """The smallest model, as it is opened from weights on disk."""
    return open_checkpoint(str(save_weights(folder / f"weights-{seed}.safetensors", small_model(seed=seed))))


def storage(folder: Path) -> Storage:
    """An output, which is made."""
    return open_storage(folder, create=True)


def quiet(message: str) -> None:
    """Says nothing."""


def alone() -> RankGroup:
    """This process."""
    return RankGroup()


def write_config(path: Path, config: FinetuneConfig | LinearConfig) -> Path:
    """The configuration as a file."""
    path.write_text(json.dumps(config.model_dump(mode="json")))
    return path


def command(*arguments: object, ranks: int | None = None) -> list[str]:
    """``avid-evaluate ARGUMENTS`` in a process of its own, or under torchrun."""
    launcher = [sys.executable]
    if ranks is not None:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [*launcher, "-m", "avid_pipeline.evaluate", *map(str, arguments)]


def invoke(command: click.Command, *arguments: object) -> Result:
    """A command in this process."""
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def same_state(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    """Whether two state dicts are equal bit by bit."""
    return ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def fine_tune(
    config: FinetuneConfig, evaluated: EvaluatedModel, root: Path, output: Path, fold: int = 1, **options: Any
) -> Results:
    """Fine-tune on a fold, in this process."""
    parts = open_fold(str(root), fold)
    return run_finetune(config, evaluated, *parts, storage(output), alone(), say=quiet, **options)


def probe(
    config: LinearConfig, evaluated: EvaluatedModel, roots: tuple[Path, Path], output: Path, **options: Any
) -> Results:
    """Linear probes of training and test data, in this process."""
    parts = open_parts(str(roots[0]), str(roots[1]), None)
    return run_linear(config, evaluated, *parts, storage(output), alone(), say=quiet, **options)


class StoppedError(Exception):
    """Raised in the place where a process might be killed."""


def stop_after(monkeypatch: pytest.MonkeyPatch, saves: int) -> None:
    """Ends trainings behind so many saves."""
    save = Training.save
    counted = []

    def counting(self: Training, *arguments: Any) -> None:
        save(self, *arguments)
        counted.append(None)
        if len(counted) == saves:
            raise StoppedError

    monkeypatch.setattr(Training, "save", counting)
