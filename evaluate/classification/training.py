"""The training loop that fine-tuning and linear probes share."""

import math
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from avid_pipeline.collectives import RankGroup
from avid_pipeline.errors import CheckpointError, ConfigError
from avid_pipeline.evaluate.classification.config import ClassificationConfig
from avid_pipeline.evaluate.classification.data import TrainingBatch
from avid_pipeline.evaluate.classification.learner import Learner, Source, Stage, autocast, weights_dtype
from avid_pipeline.evaluate.classification.progress import EvaluationFolder
from avid_pipeline.evaluate.classification.testing import Outcome
from avid_pipeline.models.batch_norm import group_batch_norms
from avid_pipeline.optimisation import make_optimizer

__all__ = ["Epoch", "Training", "train"]


@dataclass(frozen=True)
class Epoch:
    """What an epoch came to, by classifier.

    Attributes:
        stage: name of its stage.
        loss: mean over the training clips.
        training: share of the training clips that were recognised while training.
        clip: Clip@1 and Clip@5 of the test instances; empty where they were not tested.
        video: Video@1 and Video@5 likewise.
    """

    stage: str
    loss: dict[str, float]
    training: dict[str, float]
    clip: dict[str, tuple[float | None, float | None]] = field(default_factory=dict)
    video: dict[str, tuple[float | None, float | None]] = field(default_factory=dict)


@dataclass
class Training:
    """A training and where it stands.

    Attributes:
        config: its settings.
        learner: what is trained.
        source: where batches come from.
        test: classifies the test instances as the learner is now.
        folder: where progress is kept.
        group: the ranks.
        device: of the learner.
        say: is told of every epoch, on the first rank.
        stage: number of the stage under way.
        epoch: epochs of it that are done.
        step: steps of the next epoch that are done.
        history: all epochs that are done.
    """

    config: ClassificationConfig
    learner: Learner
    source: Source
    test: Callable[[], Outcome]
    folder: EvaluationFolder
    group: RankGroup
    device: torch.device
    say: Callable[[str], object]
    stage: int = 0
    epoch: int = 0
    step: int = 0
    history: list[Epoch] = field(default_factory=list)

    @property
    def epochs_done(self) -> int:
        """Epochs of all stages that are done."""
        return sum(stage.epochs for stage in self.learner.stages[: self.stage]) + self.epoch

    @property
    def epochs(self) -> int:
        """Epochs of all stages."""
        return sum(stage.epochs for stage in self.learner.stages)

    def save(self, optimizer: torch.optim.Optimizer, sums: Tensor | None) -> None:
        """Write the progress; every rank calls this.

        Args:
            optimizer: of the stage under way.
            sums: of the epoch under way, over all ranks; None between epochs.

        Raises:
            ConfigError: the weights are not finite.
            StorageError: the folder cannot be written.
        """
        module = self.learner.module
        if not all(bool(parameter.isfinite().all()) for parameter in module.parameters()):
            raise ConfigError(
                f"the weights hold NaN or infinite numbers after {self.epochs_done} epochs and {self.step} steps: "
                "not saved; lower optimizer.learning_rate or set optimizer.clip_gradients"
            )
        place = {"stage": self.stage, "epoch": self.epoch, "step": self.step}
        content: dict[str, Any] = {
            "module": module.state_dict(),
            "optimizer": optimizer.state_dict(),
            "sums": sums,
            "history": [vars(epoch) for epoch in self.history],
        }
        self.folder.write_progress(place, content)


def train(training: Training) -> None:
    """Train to the end, from where an interrupted training of the same folder stopped; every rank calls this.

    Batch norms take the clips of all ranks together, so all ranks have the same running statistics, and those are what
    is saved and tested.

    Raises:
        ConfigError: the loss is not finite, or the data are not labelled as they must be.
        CheckpointError: the progress that is there is damaged.
        AvidPipelineError: the data cannot be read.
    """
    share = training.config.data.batch_size // training.group.size
    group_batch_norms(training.learner.module, None, share)
    optimizer_state, sums = _restore(training)
    while training.stage < len(training.learner.stages):
        stage = training.learner.stages[training.stage]
        optimizer = make_optimizer(training.config.optimizer, stage.module.parameters())
        if optimizer_state is not None:
            _load(training, partial(optimizer.load_state_dict, optimizer_state))
        network = _distribute(stage.module, training.device) if training.epoch < stage.epochs else stage.module
        while training.epoch < stage.epochs:
            _train_epoch(training, stage, network, optimizer, sums)
            sums = None
        training.stage, training.epoch, optimizer_state = training.stage + 1, 0, None


def _train_epoch(
    training: Training, stage: Stage, network: nn.Module, optimizer: torch.optim.Optimizer, sums: Tensor | None
) -> None:
    """The rest of an epoch, its test and its save."""
    learner, every, steps = training.learner, training.config.save_every_steps, training.source.steps_per_epoch
    # Losses and recognised clips of each classifier, and clips: [classifiers + 1, 2].
    sums = torch.zeros(len(learner.names) + 1, 2, dtype=torch.float64) if sums is None else sums
    learner.module.eval()
    stage.module.train()
    hidden = training.group.rank > 0 or not sys.stderr.isatty()
    title = f"epoch {training.epochs_done + 1}/{training.epochs}"
    with (
        closing(training.source.batches(training.epochs_done, training.step)) as batches,
        tqdm(total=steps, initial=training.step, unit="step", disable=hidden, desc=title, leave=False) as bar,
    ):
        for batch in batches:
            sums += _step(training, stage, network, optimizer, batch)
            training.step += 1
            bar.update()
            if every and training.step % every == 0 and training.step < steps:
                sums = training.group.all_reduce_sum(sums)
                training.save(optimizer, sums)
                sums = sums if training.group.rank == 0 else torch.zeros_like(sums)
    epoch = _summary(stage, learner.names, training.group.all_reduce_sum(sums))
    training.epoch, training.step = training.epoch + 1, 0
    if training.epochs_done % training.config.test.every == 0 or training.epochs_done == training.epochs:
        epoch = _tested(epoch, training.test())
    training.history.append(epoch)
    training.save(optimizer, None)
    if training.group.rank == 0:
        training.say(_line(training, epoch))


def _step(
    training: Training, stage: Stage, network: nn.Module, optimizer: torch.optim.Optimizer, batch: TrainingBatch
) -> Tensor:
    """One step; returns this rank's losses, recognised clips and number of clips, as ``_train_epoch`` adds them up."""
    learner, settings, device = training.learner, training.config.optimizer, training.device
    dtype = weights_dtype(training.config.compute)
    inputs = {name: values.to(device, dtype, non_blocking=True) for name, values in batch.inputs.items()}
    labels = batch.labels.to(device)
    steps = training.source.steps_per_epoch
    optimizer.zero_grad(set_to_none=True)
    with autocast(training.config.compute, device):
        logits = learner.logits(stage, network, inputs, training.epochs_done * steps + training.step)
    losses = {name: cross_entropy(of_name.to(dtype), labels) for name, of_name in logits.items()}
    total = torch.stack(list(losses.values())).sum()
    if not math.isfinite(float(total.detach())):
        raise ConfigError(
            f"the loss became {float(total.detach())} in step {training.step + 1} of epoch {training.epochs_done + 1}; "
            "lower optimizer.learning_rate or set optimizer.clip_gradients"
        )
    total.backward()  # type: ignore[no-untyped-call]
    if settings.clip_gradients is not None:
        nn.utils.clip_grad_norm_(stage.module.parameters(), settings.clip_gradients)
    for group in optimizer.param_groups:
        group["lr"] = stage.rate(training.epoch * steps + training.step)
    optimizer.step()
    count = len(labels)
    rows = [[float(losses[n].detach()) * count, int((logits[n].argmax(1) == labels).sum())] for n in learner.names]
    return torch.tensor([*rows, [count, count]], dtype=torch.float64)


def _summary(stage: Stage, names: Sequence[str], sums: Tensor) -> Epoch:
    *rows, (count, _) = sums.tolist()
    loss = {name: row[0] / count for name, row in zip(names, rows, strict=True)}
    return Epoch(stage.name, loss, {name: row[1] / count for name, row in zip(names, rows, strict=True)})


def _tested(epoch: Epoch, outcome: Outcome) -> Epoch:
    clip = {name: _at(outcome.clip_accuracy(name).at) for name in epoch.loss}
    video = {name: _at(outcome.video_accuracy(name).at) for name in epoch.loss}
    return Epoch(epoch.stage, epoch.loss, epoch.training, clip, video)


def _at(accuracy: dict[int, float | None]) -> tuple[float | None, float | None]:
    return accuracy[1], accuracy[5]


def _line(training: Training, epoch: Epoch) -> str:
    parts = []
    for name in epoch.loss:
        video = epoch.video[name][0] if name in epoch.video else None
        tested = "" if video is None else f", Video@1 {100 * video:.1f} %"
        parts.append(f"{name} loss {epoch.loss[name]:.3f}{tested}")
    return f"epoch {training.epochs_done}/{training.epochs} ({epoch.stage}): {'; '.join(parts)}"


def _distribute(module: nn.Module, device: torch.device) -> nn.Module:
    """Make a part ready for training in this process group."""
    if not (dist.is_available() and dist.is_initialized()):
        return module
    # Looking for unused parameters, of which there are none, keeps DDP from rearranging its buckets after the first
    # step: a resumed training would do that anew, and its sums would round differently.
    warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified")
    devices = None if device.type == "cpu" else [device.index]
    return DistributedDataParallel(module, device_ids=devices, broadcast_buffers=False, find_unused_parameters=True)


def _restore(training: Training) -> tuple[dict[str, Any] | None, Tensor | None]:
    """Take up progress that is there; returns the optimizer's state and the sums of the epoch under way."""
    content = training.folder.read_progress()
    if content is None:
        return None, None
    place = content["place"]

    def load() -> None:
        training.learner.module.load_state_dict(content["module"])
        training.history[:] = [Epoch(**epoch) for epoch in content["history"]]
        training.stage, training.epoch, training.step = (int(place[name]) for name in ("stage", "epoch", "step"))

    _load(training, load)
    if training.group.rank == 0:
        steps = f" and {training.step} steps" if training.step else ""
        done = f"{training.epochs_done} of {training.epochs} epochs{steps}"
        training.say(f"{training.folder.root.url}: goes on after {done}")
    sums: Tensor | None = content["sums"]
    # They are those of all ranks together.
    return content["optimizer"], sums if sums is None or training.group.rank == 0 else torch.zeros_like(sums)


def _load(training: Training, load: Callable[[], object]) -> None:
    try:
        load()
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{training.folder.root.url}: its progress does not fit what is trained here "
            f"({' '.join(str(error).split())[:200]}); give --overwrite to begin anew"
        ) from error
