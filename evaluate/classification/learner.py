"""What the training loop asks of what it trains, and of where batches come from."""

from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from avid_pipeline.evaluate.classification.config import ComputeSettings
from avid_pipeline.evaluate.classification.data import TrainingBatch

__all__ = ["Learner", "Source", "Stage", "autocast", "weights_dtype"]


@dataclass(frozen=True)
class Stage:
    """Epochs in which one part of a learner learns.

    Attributes:
        name: for messages.
        epochs: how many.
        module: the part.
        rate: the learning rate of a step of the stage, from 0.
    """

    name: str
    epochs: int
    module: nn.Module
    rate: Callable[[int], float]


class Learner(Protocol):
    """What is trained.

    Attributes:
        module: everything that learns in some stage; its state is saved.
        names: of the classifiers.
        stages: in their order.
    """

    module: nn.Module
    names: tuple[str, ...]
    stages: tuple[Stage, ...]

    def logits(self, stage: Stage, network: nn.Module, inputs: Mapping[str, Tensor], step: int) -> dict[str, Tensor]:
        """Classify this rank's clips in a training step.

        Args:
            stage: one of ``stages``.
            network: its module, as it is distributed over the ranks.
            inputs: of a :class:`~avid_pipeline.evaluate.classification.data.TrainingBatch`, on the device.
            step: over all epochs of all stages.

        Returns:
            Classifier to [B, C].
        """
        ...

    def classify(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Logits [B, C] by classifier, on the CPU, as everything is now and in evaluation mode."""
        ...


class Source(Protocol):
    """Where training batches come from."""

    @property
    def steps_per_epoch(self) -> int:
        """Global batches of every epoch."""
        ...

    def batches(self, epoch: int, first: int) -> Generator[TrainingBatch, None, None]:
        """This rank's batches of an epoch, counted over all stages, from step ``first`` of it on."""
        ...


def weights_dtype(compute: ComputeSettings) -> torch.dtype:
    """Of the weights, of what networks are given, and of losses."""
    return torch.float64 if compute.precision == "float64" else torch.float32


def autocast(compute: ComputeSettings, device: torch.device) -> AbstractContextManager[None]:
    """In which networks run."""
    context: AbstractContextManager[None] = torch.autocast(
        device.type, torch.bfloat16, enabled=compute.precision == "bfloat16"
    )
    return context
