"""Classification by the nearest neighbours of frozen features."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from avid_pipeline.errors import ConfigError
from avid_pipeline.evaluate.feature_store import FeatureStore
from avid_pipeline.evaluate.metrics import confusion_counts
from avid_pipeline.evaluate.neighbours import nearest
from avid_pipeline.evaluate.report import Confusion
from avid_pipeline.evaluate.results import Rows, Table
from avid_pipeline.evaluate.vectors import instance_vectors

__all__ = ["classify", "knn_scores"]

_TOP = (1, 5)


def knn_scores(
    queries: Tensor,
    gallery: Tensor,
    gallery_labels: Tensor,
    k: int,
    temperature: float = 0.07,
    *,
    exclude_own: bool = False,
) -> Tensor:
    """Let the k nearest of a gallery vote for their classes, each with weight exp(cosine / temperature).

    That is the weighted vote of Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination"
    (CVPR 2018), section 3.4. A neighbour with several labels votes for each of them.

    Args:
        queries: unit vectors [Q, D].
        gallery: unit vectors [G, D].
        gallery_labels: which labels each has, bool [G, C].
        k: voters; as many as there are where the gallery has fewer.
        temperature: of the weights; small, and only the nearest count.
        exclude_own: row ``i`` of the gallery is query ``i`` itself, which has no vote.

    Returns:
        Weights of every class, float32 [Q, C], relative to that of the query's nearest neighbour.

    Raises:
        ConfigError: there is nothing to ask, or vectors are not finite.
    """
    if k < 1 or temperature <= 0:
        raise ConfigError(f"k-NN: expected k >= 1 and a positive temperature, found {k} and {temperature}")
    return _votes(*nearest(queries, gallery, k, exclude_own=exclude_own), gallery_labels, temperature)


def _votes(cosines: Tensor, rows: Tensor, gallery_labels: Tensor, temperature: float) -> Tensor:
    # Relative to the nearest they cannot overflow, and votes are only compared within a query.
    weights = torch.exp((cosines - cosines[:, :1]) / temperature)
    scores = torch.zeros(len(rows), gallery_labels.shape[1])
    for place in range(rows.shape[1]):
        scores += weights[:, place, None] * gallery_labels[rows[:, place]]
    return scores


def classify(
    queries: FeatureStore,
    gallery: FeatureStore | None,
    classes: Sequence[str],
    ks: Sequence[int],
    temperature: float = 0.07,
) -> tuple[Table, tuple[Confusion, ...]]:
    """Classify instances by every feature of a store.

    A query counts as right where a class that it has is among the first 1 or 5; it may have several.

    Args:
        queries: features of the instances to classify.
        gallery: the same features of those that vote; None where the queries do, each but for itself.
        classes: of both.
        ks: numbers of voters, ascending.
        temperature: of the votes.

    Returns:
        Accuracies, a row for every feature; and, where instances have one class each, the confusions of the first
        feature by the most voters.

    Raises:
        ConfigError: no query, or no instance of the gallery, has a label, or vectors are not finite.
    """
    rows: Rows = {}
    confusions: tuple[Confusion, ...] = ()
    for name in queries.names:
        ours, our_labels = _labelled(queries, name, len(classes))
        theirs, their_labels = (ours, our_labels) if gallery is None else _labelled(gallery, name, len(classes))
        row: dict[str, float | None] = {}
        cosines, neighbours = nearest(ours, theirs, max(ks), exclude_own=gallery is None)
        for k in ks:
            scores = _votes(cosines[:, :k], neighbours[:, :k], their_labels, temperature)
            votes, order = scores.topk(min(max(_TOP), len(classes)), dim=1)
            # A class that nobody votes for is no answer.
            right = our_labels.gather(1, order) & (votes > 0)
            row |= {f"top-{top}, k={k}": float(right[:, :top].any(dim=1).double().mean()) for top in _TOP}
        rows[name] = row
        if not confusions and bool((our_labels.sum(dim=1) == 1).all()):
            counts = confusion_counts(order[:, 0], our_labels.int().argmax(dim=1), len(classes))
            confusions = (Confusion(f"{name}, {ks[-1]} neighbours", tuple(classes), counts.numpy()),)
    frequencies = their_labels.sum(dim=0)[None] - (our_labels.int() if gallery is None else 0)
    frequent = frequencies.expand(len(our_labels), -1).topk(min(max(_TOP), len(classes)), dim=1).indices
    guessed = our_labels.gather(1, frequent)
    rows["the most frequent classes"] = {
        f"top-{top}, k={k}": float(guessed[:, :top].any(dim=1).double().mean()) for k in ks for top in _TOP
    }
    note = f"weighted vote of the k nearest by cosine, temperature {temperature:g}"
    return Table(title="classification by nearest neighbours", rows=rows, note=note), confusions


def _labelled(store: FeatureStore, name: str, num_classes: int) -> tuple[Tensor, Tensor]:
    """Vectors of the instances that have labels and could be decoded, and their labels, bool [N, C]."""
    vectors, found = instance_vectors(store, name)
    bits = np.unpackbits(store.label_sets(), axis=1, count=num_classes).astype(np.bool_)
    labels = torch.from_numpy(bits)
    usable = found & labels.any(dim=1)
    if not bool(usable.any()):
        raise ConfigError(f"{store.storage.url}: no instance has a label, and classification needs labels")
    return vectors[usable], labels[usable]
