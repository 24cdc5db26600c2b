"""Cross-modal retrieval: does a video find its own sound among all others, and a sound its video?"""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from avid_pipeline.errors import ConfigError

RECALL_AT = (1, 5, 10, 20)
_QUERIES_PER_BLOCK = 1024


@dataclass(frozen=True)
class RetrievalResult:
    """How well queries find their own counterpart.

    Attributes:
        recall: k to the share of queries whose counterpart is among the k nearest.
        median_rank: of the counterparts, from 1.
        class_precision: share of queries whose nearest candidate, their own counterpart aside, has their class;
            None without labels.
    """

    recall: dict[int, float]
    median_rank: float
    class_precision: float | None

    def to_json(self) -> dict[str, object]:
        """Plain data."""
        return asdict(self) | {"recall": {f"R@{k}": value for k, value in self.recall.items()}}


def retrieve(queries: Tensor, candidates: Tensor, labels: Tensor | None = None) -> RetrievalResult:
    """Rank candidates by cosine for every query; the counterpart of query ``i`` is candidate ``i``.

    Of equally similar candidates the counterpart comes last, so that a collapsed model gains nothing.

    Args:
        queries: unit vectors [N, D].
        candidates: unit vectors [N, D].
        labels: int64 [N], -1 without a label; None where there are none.

    Raises:
        ConfigError: the shapes differ, there are fewer than two instances, or a vector is not finite.
    """
    if queries.shape != candidates.shape or len(queries) < 2:
        raise ConfigError(
            f"retrieval: expected as many queries as candidates and at least 2, found {list(queries.shape)} and "
            f"{list(candidates.shape)}"
        )
    if not (queries.isfinite().all() and candidates.isfinite().all()):
        raise ConfigError(
            "retrieval: the embeddings hold NaN or infinite numbers; the model's training diverged: take an earlier "
            "checkpoint"
        )
    ranks, same_class, labelled = [], 0, 0
    for first in range(0, len(queries), _QUERIES_PER_BLOCK):
        similarity = queries[first : first + _QUERIES_PER_BLOCK] @ candidates.T
        rows = torch.arange(len(similarity))
        own = similarity[rows, first + rows]
        ranks.append((similarity >= own[:, None]).sum(dim=1).clamp(min=1))
        if labels is not None:
            similarity[rows, first + rows] = -torch.inf
            expected, found = labels[first + rows], labels[similarity.argmax(dim=1)]
            has_label = expected >= 0
            labelled += int(has_label.sum())
            same_class += int((found == expected)[has_label].sum())
    rank = torch.cat(ranks).double()
    return RetrievalResult(
        recall={k: float((rank <= k).double().mean()) for k in RECALL_AT},
        median_rank=float(rank.quantile(0.5)),
        class_precision=same_class / labelled if labelled else None,
    )


def chance(num_instances: int, labels: Tensor | None = None) -> RetrievalResult:
    """What random vectors are expected to reach on a data set of this size and these labels."""
    precision = None
    if labels is not None and bool((labels >= 0).any()):
        counts = torch.bincount(labels[labels >= 0]).double()
        precision = float((counts * (counts - 1)).sum() / (counts.sum() * (num_instances - 1)))
    return RetrievalResult(
        recall={k: min(1.0, k / num_instances) for k in RECALL_AT},
        median_rank=(num_instances + 1) / 2,
        class_precision=precision,
    )
