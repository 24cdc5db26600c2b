"""Nearest neighbours by cosine, and how often they share a class with the query."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from avid_pipeline.errors import ConfigError

__all__ = ["class_recall", "class_recall_by_chance", "nearest", "share_a_class"]

_QUERIES_PER_BLOCK = 1024


def nearest(queries: Tensor, gallery: Tensor, k: int, *, exclude_own: bool = False) -> tuple[Tensor, Tensor]:
    """The k nearest of a gallery for every query, nearest first.

    Args:
        queries: unit vectors [Q, D].
        gallery: unit vectors [G, D].
        k: neighbours; as many as there are where the gallery has fewer.
        exclude_own: row ``i`` of the gallery is query ``i`` itself (or its counterpart) and is none of its neighbours.

    Returns:
        Cosines, float32 [Q, k], and rows of the gallery, int64 [Q, k].

    Raises:
        ConfigError: there is nothing to find, the dimensions differ, or a vector is not finite.
    """
    available = len(gallery) - int(exclude_own)
    if available < 1 or queries.ndim != 2 or queries.shape[1:] != gallery.shape[1:]:
        raise ConfigError(
            f"neighbours: expected queries [Q, D] and a gallery [G, D] with something to find, found "
            f"{list(queries.shape)} and {list(gallery.shape)}"
        )
    if not (queries.isfinite().all() and gallery.isfinite().all()):
        raise ConfigError(
            "neighbours: the vectors hold NaN or infinite numbers; the model's training diverged: take an earlier "
            "checkpoint"
        )
    k = min(k, available)
    cosines, rows = [], []
    for first in range(0, len(queries), _QUERIES_PER_BLOCK):
        block = queries[first : first + _QUERIES_PER_BLOCK] @ gallery.T
        if exclude_own:
            places = torch.arange(len(block))
            block[places, first + places] = -torch.inf
        found = block.topk(k, dim=1)
        cosines.append(found.values)
        rows.append(found.indices)
    return torch.cat(cosines), torch.cat(rows)


def share_a_class(query_labels: Tensor, gallery_labels: Tensor, rows: Tensor) -> Tensor:
    """Whether neighbours have a class in common with their query, bool [Q, k].

    Args:
        query_labels: sets of labels as bits, uint8 [Q, W], see :func:`numpy.packbits`.
        gallery_labels: likewise, uint8 [G, W].
        rows: of the gallery, int64 [Q, k].
    """
    return ((query_labels[:, None] & gallery_labels[rows]) != 0).any(dim=2)


def class_recall(shared: Tensor, ks: Sequence[int]) -> dict[int, float]:
    """R@k by class: the share of queries with a neighbour of their class among the first k.

    Args:
        shared: of :func:`share_a_class`, bool [Q, k], queries without labels left out.
        ks: numbers of neighbours.
    """
    return {k: float(shared[:, :k].any(dim=1).double().mean()) for k in ks}


def class_recall_by_chance(
    query_labels: Tensor, gallery_labels: Tensor, ks: Sequence[int], *, exclude_own: bool = False
) -> dict[int, float]:
    """What a random order of the gallery is expected to reach in :func:`class_recall`.

    Of G candidates, n of them with a class of the query, k drawn without repetition miss all n with probability
    C(G - n, k) / C(G, k).

    Args:
        query_labels: uint8 [Q, W].
        gallery_labels: uint8 [G, W].
        ks: numbers of neighbours.
        exclude_own: as for :func:`nearest`.
    """
    size = len(gallery_labels) - int(exclude_own)
    # Queries with the same labels share a pass over the gallery.
    distinct, times = torch.unique(query_labels, dim=0, return_counts=True)
    matching = [int(((labels & gallery_labels) != 0).any(dim=1).sum()) - int(exclude_own) for labels in distinct]
    result = {}
    for k in ks:
        hits = sum(int(n) * (1 - _missed(size, of, min(k, size))) for n, of in zip(times, matching, strict=True))
        result[k] = hits / len(query_labels)
    return result


def _missed(size: int, matching: int, drawn: int) -> float:
    if drawn > size - matching:
        return 0.0

    def log_factorial(n: int) -> float:
        return math.lgamma(n + 1)

    def log_choose(n: int, k: int) -> float:
        return log_factorial(n) - log_factorial(k) - log_factorial(n - k)

    return math.exp(log_choose(size - matching, drawn) - log_choose(size, drawn))
