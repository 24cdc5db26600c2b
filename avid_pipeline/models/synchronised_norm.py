"""Batch normalisation over the clips of several ranks, on any device."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["group_statistics", "normalise_together"]


def group_statistics(input_BC: Tensor, process_group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Mean and variance of every channel over the clips of all ranks of a process group.

    Chan's combination of the ranks' means and variances, in rank order and in float64, so that every rank gets the
    same numbers and large means cancel nothing. Ranks have inputs of one shape.

    Args:
        input_BC: this rank's clips, [B, C, ...].
        process_group: the ranks whose clips are normalised together.

    Returns:
        Mean and biased variance, [C] each; float64 for inputs of float64, else float32.
    """
    precision = torch.float64 if input_BC.dtype == torch.float64 else torch.float32
    # Buffers of this type make torch compute in it for inputs of lower precision.
    unused = torch.zeros(2, input_BC.shape[1], dtype=precision, device=input_BC.device)
    own = torch.stack(torch.batch_norm_update_stats(input_BC.detach(), unused[0], unused[1], 0.0)).double()
    size = dist.get_world_size(process_group)
    of_ranks = own.new_empty(size * 2, own.shape[1])
    dist.all_gather_single(of_ranks, own, group=process_group)
    means, variances = of_ranks.view(size, 2, -1).unbind(1)
    variance = variances.mean(0) + means.var(0, correction=0)
    return means.mean(0).to(precision), variance.to(precision)


def normalise_together(
    input_BC: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    eps: float,
    process_group: dist.ProcessGroup,
) -> Tensor:
    """Normalises with the statistics of :func:`group_statistics`; gradients flow through these too.

    All ranks of the group must run backward, and it holds one all-reduce. Weight and bias get the gradient of this
    rank's clips alone, as everywhere under ``DistributedDataParallel``.

    Args:
        input_BC: this rank's clips, [B, C, ...].
        weight: scale of every channel, [C]; None for 1.
        bias: offset of every channel, [C]; None for 0.
        mean: of the whole group, [C].
        variance: of the whole group, biased, [C].
        eps: added to the variance.
        process_group: the ranks whose clips are normalised together.

    Returns:
        The normalised clips, of the input's shape, type and memory format.
    """
    arguments = (input_BC, weight, bias, mean, variance, eps, process_group)
    output: Tensor = _NormaliseTogether.apply(*arguments)  # type: ignore[no-untyped-call]
    return output


class _NormaliseTogether(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input_BC: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        variance: Tensor,
        eps: float,
        process_group: dist.ProcessGroup,
    ) -> Tensor:
        scale = torch.ones_like(mean) if weight is None else weight
        ctx.save_for_backward(input_BC, scale, mean, variance)
        ctx.eps, ctx.process_group = eps, process_group
        offset = torch.zeros_like(mean) if bias is None else bias
        return _scale_and_shift(input_BC, scale, offset, mean, variance, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BC: Tensor) -> tuple[Tensor | None, ...]:
        input_BC, scale, mean, variance = ctx.saved_tensors
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        inverse_deviation = (variance.double() + ctx.eps).rsqrt().to(variance.dtype)
        # The native kernel subtracts the mean gradients of this rank's clips; the difference to those of the whole
        # group, which are known only after it, is subtracted below.
        grad_input, grad_scale, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad_BC, input_BC, scale, None, None, mean, inverse_deviation, True, ctx.eps, [needs_input, True, True]
        )
        if needs_input:
            own = torch.stack([grad_scale, grad_bias]).double()
            total = own.clone()
            dist.all_reduce(total, group=ctx.process_group)
            ranks = dist.get_world_size(ctx.process_group)
            excess = (own - total / ranks) * (input_BC.shape[1] / input_BC.numel()) * inverse_deviation * scale
            excess_scale, excess_offset = excess.to(scale.dtype)
            grad_input += _scale_and_shift(input_BC, excess_scale, excess_offset, mean, variance, ctx.eps)
        none = (None,) * 4
        return grad_input, grad_scale if needs_weight else None, grad_bias if needs_bias else None, *none


def _scale_and_shift(
    input_BC: Tensor, scale: Tensor, offset: Tensor, mean: Tensor, variance: Tensor, eps: float
) -> Tensor:
    """(input - mean) / sqrt(variance + eps) * scale + offset, by torch's kernel of evaluation mode."""
    output: Tensor = torch.native_batch_norm(input_BC, scale, offset, mean, variance, False, 0.0, eps)[0]
    return output
