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


def draw_negatives(
    index: Tensor,
    num_negatives: int,
    num_instances: int,
    *,
    seed: int,
    step: int,
    positives: Tensor | None = None,
) -> Tensor:
    """Draws negatives uniformly, with replacement, from all instances but each sample's own and its positives.

    Negative ``k`` of an instance depends on (seed, step, instance, k) alone: it is output ``k`` of a SplitMix64
    generator keyed by the other three. So all ranks draw the same ones without talking to each other, on any
    device, however the global batch is ordered or divided (a ``torch.Generator`` promises neither). An instance
    that occurs twice in a batch gets the same negatives twice.

    A draw is a place among the instances that are left, never thrown away and repeated: time is O(B*K), with k
    positives O(B*K*log k), memory O(B*(K + k)).

    Args:
        index: Instances of the batch, int64 ``[B]``, each in ``[0, num_instances)``.
        num_negatives: K, negatives per sample.
        num_instances: N, at least 2.
        seed: Seed of the training run.
        step: Training step.
        positives: Instances that are no negatives of a sample either, int64 ``[B, k]``, in any order; an instance
            may be repeated.

    Returns:
        int64 ``[B, K]`` on the device of ``index``, each in ``[0, num_instances)`` and never the row's own index nor
        one of its positives.

    Raises:
        ConfigError: If there are fewer than two instances, or fewer than k + 2.
    """
    if num_instances < 2:
        raise ConfigError(f"negatives need at least 2 instances, but there are {num_instances}")
    if positives is not None and num_instances < positives.shape[1] + 2:
        raise ConfigError(
            f"an instance and its {positives.shape[1]} positives leave no negatives among {num_instances} instances; "
            f"use at most {num_instances - 2} positives"
        )
    key = derive_key(seed, "negatives", step)
    of_instance = _mix(index * _signed(_INCREMENT) + _signed(key))
    increments = torch.arange(1, num_negatives + 1, device=index.device) * _signed(_INCREMENT)
    bits = _mix(of_instance[:, None] + increments)
    drawn = _shift_right(bits, 1)
    if positives is None:
        drawn = drawn.remainder_(num_instances - 1)
        return drawn.add_(drawn >= index[:, None])
    return _of_the_rest(drawn, torch.cat([index[:, None], positives], dim=1), num_instances)


def _of_the_rest(drawn: Tensor, excluded: Tensor, num_instances: int) -> Tensor:
    """Turns random numbers ``[B, K]`` into instances that are not among the row's excluded ones ``[B, m]``.

    Below the i-th excluded instance e_i (ascending, from i = 0) lie e_i - i that are not excluded. So place j among
    the instances that are left is instance j plus the number of i with e_i - i <= j.
    """
    ascending = excluded.sort(dim=1).values
    is_first = ascending.diff(dim=1, prepend=ascending.new_full((len(ascending), 1), -1)) != 0
    left_below = (ascending - is_first.cumsum(dim=1) + 1).masked_fill(~is_first, num_instances).sort(dim=1).values
    places = drawn.remainder(num_instances - is_first.sum(dim=1, keepdim=True))
    return places + torch.searchsorted(left_below, places, right=True)


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
