"""How the weights of the networks start."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def unseen_by_global_generator(generator: torch.Generator | None) -> Iterator[None]:
    """Keep torch's global generator as it is while modules are built, if another generator is given.

    The constructors of ``nn.Conv3d`` and others draw weights that :func:`initialise` draws again.

    Args:
        generator: The generator that the weights will be drawn from; None for torch's global one, which is
            then left to move.
    """
    if generator is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        yield


def initialise(module: nn.Module, generator: torch.Generator | None = None) -> None:
    """Draw the weights of a network, in place and in the order of its modules.

    Convolutions: He's normal distribution over the fan-out, without bias. Linear layers: He's normal
    distribution over the fan-in, biases 0. Batch norms: weight 1, bias 0.

    Args:
        module: The network.
        generator: Where to draw from; None for torch's global generator.
    """
    for part in module.modules():
        if isinstance(part, nn.Conv2d | nn.Conv3d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu", generator=generator)
        elif isinstance(part, nn.Linear):
            nn.init.kaiming_normal_(part.weight, nonlinearity="relu", generator=generator)
            nn.init.zeros_(part.bias)
        elif isinstance(part, nn.BatchNorm2d | nn.BatchNorm3d):
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)
