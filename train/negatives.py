"""Drawing the negatives of noise-contrastive estimation: a pure function of seed, step and instance."""

from __future__ import annotations

import torch
from torch import Tensor

from avid_pipeline.errors import ConfigError
from avid_pipeline.train.keys import derive_key

__all__ = ["draw_negatives"]

# SplitMix64: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
_INCREMENT = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_SHIFTS = (30, 27, 31)


def draw_negatives(index: Tensor, num_negatives: int, num_instances: int, *, seed: int, step: int) -> Tensor:
    """Draws negatives uniformly, with replacement, from all instances but each sample's own.

    Negative ``k`` of an instance depends on (seed, step, instance, k) alone: it is output ``k`` of a SplitMix64
    generator keyed by the other three. So all ranks draw the same ones without talking to each other, on any
    device, however the global batch is ordered or divided (a ``torch.Generator`` promises neither). An instance
    that occurs twice in a batch gets the same negatives twice. Time and memory are O(B*K).

    Args:
        index: Instances of the batch, int64 ``[B]``, each in ``[0, num_instances)``.
        num_negatives: K, negatives per sample.
        num_instances: N, at least 2.
        seed: Seed of the training run.
        step: Training step.

    Returns:
        int64 ``[B, K]`` on the device of ``index``, each in ``[0, num_instances)`` and never the row's own index.

    Raises:
        ConfigError: If there are fewer than two instances.
    """
    if num_instances < 2:
        raise ConfigError(f"negatives need at least 2 instances, but there are {num_instances}")
    key = derive_key(seed, "negatives", step)
    of_instance = _mix(index * _signed(_INCREMENT) + _signed(key))
    increments = torch.arange(1, num_negatives + 1, device=index.device) * _signed(_INCREMENT)
    bits = _mix(of_instance[:, None] + increments)
    drawn = _shift_right(bits, 1).remainder_(num_instances - 1)
    return drawn.add_(drawn >= index[:, None])


def _mix(state: Tensor) -> Tensor:
    """SplitMix64's output function, on the 64 bits of int64 numbers (products wrap around)."""
    for shift, multiplier in zip(_SHIFTS, _MULTIPLIERS, strict=False):
        state = (state ^ _shift_right(state, shift)) * _signed(multiplier)
    return state ^ _shift_right(state, _SHIFTS[-1])


def _shift_right(bits: Tensor, shift: int) -> Tensor:
    """Shifts to the right, filling with zeros; torch's own shift of int64 copies the sign bit."""
    return (bits >> shift).bitwise_and_((1 << (64 - shift)) - 1)


def _signed(unsigned: int) -> int:
    """The int64 with the same 64 bits."""
    return unsigned - (1 << 64) if unsigned >= 1 << 63 else unsigned
