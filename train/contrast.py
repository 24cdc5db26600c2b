"""Noise-contrastive estimation against the memory bank, as partial sums over the rows that a rank owns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (the name everyone knows)
from torch import Tensor
from torch.autograd.function import once_differentiable

from avid_pipeline.errors import ConfigError
from avid_pipeline.train.memory_bank import MODALITIES, MemoryBank, Modality, OwnedCandidates

__all__ = ["Contrast", "contrastive_loss", "estimate_partition_function"]


@dataclass(frozen=True)
class Contrast:
    """One direction of noise-contrastive estimation: queries of one modality against one memory.

    The loss of a query with scores s = cosine / temperature and K negatives is (section 3 of Morgado et al., CVPR 2021)

        mean over positives of -log(e^s / (e^s + K*Z)) + sum over negatives of -log(K*Z / (e^s + K*Z))

    Attributes:
        name: Name of the term, for logs.
        query: Modality of the queries.
        memory: Modality of the memory they are scored against.
        positives: Columns of the candidate table that hold the positives.
        negatives: Columns of the candidate table that hold the negatives.
        weight: Share of this term in the loss.
    """

    name: str
    query: Modality
    memory: Modality
    positives: range
    negatives: range
    weight: float


@dataclass(frozen=True)
class _Job:
    """What :class:`_ContrastiveLoss` works on besides the queries; see :func:`contrastive_loss`."""

    bank: MemoryBank
    owned: OwnedCandidates
    contrasts: Sequence[Contrast]
    temperature: float
    partition_function: float


def contrastive_loss(
    bank: MemoryBank,
    local_queries: Tensor,
    queries: Tensor,
    owned: OwnedCandidates,
    contrasts: Sequence[Contrast],
    *,
    temperature: float,
    partition_function: float,
) -> tuple[Tensor, Tensor]:
    """Computes the weighted sum of contrasts over the global batch.

    Every rank scores all queries against the candidates it owns; the partial sums, one number per contrast, are
    added up over ranks. So traffic depends on neither the number of candidates nor that of instances, and no
    rank ever holds more than a small block of gathered rows.

    The loss is the mean over the global batch, equal on all ranks. Its gradient on a rank is that of the mean
    over this rank's own samples, with all other ranks' candidates in it: averaged over ranks, as
    ``DistributedDataParallel`` does, this is the gradient of the global batch's loss.

    Args:
        bank: The memory bank.
        local_queries: This rank's unit vectors, ``[B, 2, D]``, video then audio; gradients go to these.
        queries: All ranks' unit vectors in rank order, ``[W*B, 2, D]``, without gradient.
        owned: ``bank.find_owned(candidates)``, of the instances that each query is scored against.
        contrasts: The terms; their ranges point into the columns of ``candidates``.
        temperature: Divides the cosines.
        partition_function: Z, the mean of exp(score) over noise.

    Returns:
        The loss, a scalar, and every contrast's own loss before weighting, float64 ``[len(contrasts)]`` without
        gradient; the same on all ranks.
    """
    job = _Job(bank, owned, contrasts, temperature, partition_function)
    loss, terms = _ContrastiveLoss.apply(local_queries, queries, job)  # type: ignore[no-untyped-call]
    return loss, terms


@torch.no_grad()
def estimate_partition_function(
    bank: MemoryBank, queries: Tensor, owned: OwnedCandidates, contrast: Contrast, temperature: float
) -> float:
    """Computes Z, the mean of exp(score) over one contrast's negatives in the global batch.

    Args:
        bank: The memory bank.
        queries: All ranks' unit vectors, ``[W*B, 2, D]``.
        owned: ``bank.find_owned(candidates)``, as for :func:`contrastive_loss`.
        contrast: Its query, memory and negatives are used.
        temperature: Divides the cosines.

    Returns:
        Z, the same on all ranks.

    Raises:
        ConfigError: If Z is not a positive finite number.
    """
    total = queries.new_zeros((), dtype=torch.float64)
    place = MODALITIES.index(contrast.query)
    scaled_queries = queries[:, place : place + 1] / temperature
    for chunk, block, columns in bank.blocks(contrast.memory, owned):
        scores = _score(scaled_queries[chunk], block)[:, 0].double()
        if columns is None:
            total += scores[:, contrast.negatives.start : contrast.negatives.stop].exp().sum()
        else:
            is_negative = (columns >= contrast.negatives.start) & (columns < contrast.negatives.stop)
            total += scores[is_negative].exp().sum()
    mean = float(bank.group.all_reduce_sum(total)) / (len(queries) * len(contrast.negatives))
    if not 0 < mean < math.inf:
        raise ConfigError(
            f"the partition function would be {mean}: the first batch's embeddings or the memories are not "
            f"finite, or the temperature {temperature} is too small"
        )
    return mean


class _ContrastiveLoss(torch.autograd.Function):
    """Loss and gradient in one pass over the memory, for rows are gathered once and not kept for backward."""

    @staticmethod
    def forward(ctx: Any, local_queries: Tensor, queries: Tensor, job: _Job) -> tuple[Tensor, Tensor]:
        """Adds up this rank's partial sums, then all ranks'."""
        ctx.group = job.bank.group
        gradient = torch.zeros_like(queries) if ctx.needs_input_grad[0] else None
        totals = queries.new_zeros(len(job.contrasts), dtype=torch.float64)
        for memory in MODALITIES:
            _accumulate_memory(job, memory, queries, totals, gradient)
        if gradient is not None:
            # The mean over the global batch divides by W*B, but averaging gradients over W ranks divides by W again.
            ctx.save_for_backward(gradient.div_(job.temperature * len(local_queries)))
        terms = job.bank.group.all_reduce_sum(totals) / len(queries)
        loss = terms @ terms.new_tensor([contrast.weight for contrast in job.contrasts])
        ctx.mark_non_differentiable(terms)
        return loss.to(queries.dtype), terms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_gradient: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        """Sends every query's gradient back to the rank it came from, summed over the ranks that scored it."""
        (gradient,) = ctx.saved_tensors
        return ctx.group.reduce_scatter_sum(gradient) * loss_gradient, None, None


def _accumulate_memory(job: _Job, memory: Modality, queries: Tensor, totals: Tensor, gradient: Tensor | None) -> None:
    """Adds to ``totals`` and ``gradient`` what the owned rows of one memory contribute.

    -log(e^s / (e^s + KZ)) = softplus(log KZ - s) and -log(KZ / (e^s + KZ)) = softplus(s - log KZ), whose slopes are
    sigmoids: no exponential can overflow. Sums are not yet divided by the batch size nor the temperature.
    """
    active = [(i, contrast) for i, contrast in enumerate(job.contrasts) if contrast.memory == memory]
    if not active:
        return
    # Both modalities' queries share one gathered block where both are scored against this memory.
    modalities = [modality for modality in MODALITIES if any(c.query == modality for _, c in active)]
    places = slice(MODALITIES.index(modalities[0]), MODALITIES.index(modalities[-1]) + 1)
    plans = [_TermPlan(term, contrast, job, modalities.index(contrast.query), queries) for term, contrast in active]
    scaled_queries = queries[:, places] / job.temperature
    for chunk, block, columns in job.bank.blocks(memory, job.owned):
        block = block.to(queries.dtype)  # Queries are float64 where gradients are compared with finite differences.
        scores = _score(scaled_queries[chunk], block)
        slopes = torch.zeros_like(scores)
        for plan in plans:
            signs, weights, slope_weights = plan.of_columns(columns)
            logits = (scores[:, plan.place, plan.span] - plan.offset) * signs
            totals[plan.term] += (F.softplus(logits) * weights).sum()
            slopes[:, plan.place, plan.span] += torch.sigmoid(logits) * slope_weights
        if gradient is not None:
            gradient[chunk, places] += torch.bmm(slopes, block)


class _TermPlan:
    """What one contrast does with every candidate.

    Attributes:
        term: Place of the contrast in the loss.
        place: Place of its queries among the scored ones.
        offset: log K*Z.
        span: The packed candidates that can be its positives and negatives; the others are left alone.
    """

    def __init__(self, term: int, contrast: Contrast, job: _Job, place: int, like: Tensor) -> None:
        self.term, self.place = term, place
        self.offset = math.log(len(contrast.negatives) * job.partition_function)
        self._table = _column_table(contrast, job.owned.num_columns, like)
        # Candidates are packed to the left in the order of their columns: none is to the right of its column.
        is_packed = job.owned.columns is not None
        first = 0 if is_packed else min(contrast.positives.start, contrast.negatives.start)
        self.span = slice(first, max(contrast.positives.stop, contrast.negatives.stop))

    def of_columns(self, columns: Tensor | None) -> Tensor:
        """The rows of :func:`_column_table` for the candidates in ``span``, ``[3, C]`` or ``[3, q, C]``."""
        return self._table[:, self.span] if columns is None else self._table[:, columns[:, self.span]]


def _column_table(contrast: Contrast, num_columns: int, like: Tensor) -> Tensor:
    """The weights of a contrast for every candidate column, ``[3, R + 1]``; the last stands for no candidate.

    Rows: the sign of the logit (-1 for positives), the weight of the column's term, and the weight of its slope.
    """
    signs, weights = like.new_ones(num_columns + 1), like.new_zeros(num_columns + 1)
    signs[contrast.positives.start : contrast.positives.stop] = -1
    weights[contrast.positives.start : contrast.positives.stop] = 1 / len(contrast.positives)
    weights[contrast.negatives.start : contrast.negatives.stop] = 1
    return torch.stack([signs, weights, signs * weights * contrast.weight])


def _score(scaled_queries: Tensor, block: Tensor) -> Tensor:
    """Scores queries ``[q, M, D]``, divided by the temperature, against rows ``[q, C, D]``: ``[q, M, C]``."""
    # In this orientation CPUs run it as a matrix product; [q, C, D] @ [q, D, 1] is several times slower.
    return torch.bmm(scaled_queries, block.transpose(1, 2))
