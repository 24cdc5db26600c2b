"""The optimizer, and its learning rate as a pure function of the step."""

import math
from collections.abc import Iterable
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn

from avid_pipeline.config import Settings

__all__ = ["learning_rate", "make_optimizer"]


_DecayRate = Annotated[float, Field(ge=0, lt=1)]


class OptimizerSettings(Settings):
    """The optimizer and its rate over time.

    Attributes:
        name: ``adam`` (weight decay is an L2 penalty), ``adamw`` (weight decay is apart from the gradient) or ``sgd``.
        learning_rate: after the warm-up.
        weight_decay: its strength.
        betas: decay rates of Adam and AdamW.
        momentum: of SGD.
        schedule: ``multistep``, at milestones, or ``cosine``, to 0 at the end of the run.
        milestones: epochs after which the rate is multiplied by ``gamma``; none, and the rate is constant.
        gamma: that factor.
        warmup_epochs: epochs, or a part of one, in which the rate grows linearly from nearly 0.
        clip_gradients: largest norm of all gradients together; longer ones are scaled to it. None for no limit.
    """

    name: Literal["adam", "adamw", "sgd"] = "adam"
    learning_rate: float = Field(gt=0)
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[_DecayRate, _DecayRate] = (0.9, 0.999)
    momentum: _DecayRate = 0.9
    schedule: Literal["multistep", "cosine"] = "multistep"
    milestones: tuple[Annotated[int, Field(ge=1)], ...] = ()
    gamma: float = Field(0.1, gt=0, le=1)
    warmup_epochs: float = Field(0.0, ge=0)
    clip_gradients: float | None = Field(None, gt=0)


def make_optimizer(settings: OptimizerSettings, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer that the settings name, over all parameters alike."""
    rate, decay = settings.learning_rate, settings.weight_decay
    if settings.name == "sgd":
        return torch.optim.SGD(parameters, lr=rate, momentum=settings.momentum, weight_decay=decay)
    kind = torch.optim.Adam if settings.name == "adam" else torch.optim.AdamW
    return kind(parameters, lr=rate, betas=settings.betas, weight_decay=decay)


def learning_rate(settings: OptimizerSettings, step: int, steps_per_epoch: int, epochs: int) -> float:
    """The rate of a step.

    Args:
        settings: of the optimizer.
        step: from 0, over all epochs.
        steps_per_epoch: steps of every epoch.
        epochs: of the whole run; only ``cosine`` looks at it.
    """
    warmup = settings.warmup_epochs * steps_per_epoch
    rate = settings.learning_rate * min(1.0, (step + 1) / (warmup + 1))
    if settings.schedule == "cosine":
        share = (step - warmup) / max(1.0, epochs * steps_per_epoch - warmup)
        return rate * (1 + math.cos(math.pi * min(max(share, 0.0), 1.0))) / 2
    passed = sum(step >= milestone * steps_per_epoch for milestone in settings.milestones)
    return float(rate * settings.gamma**passed)
