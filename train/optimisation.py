"""The optimizer, and its learning rate as a pure function of the step."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from avid_pipeline.train.config import OptimizerSettings

__all__ = ["learning_rate", "make_optimizer"]


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
