"""Accuracies of classifiers, as pure functions of scores and labels.

Ties are broken against the model: a class that scores as high as the true one stands before it, so that a constant
scorer gains nothing. What has no label (-1) or could not be read is left out, and counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "TopAccuracy",
    "accuracy_of_places",
    "confusion_counts",
    "label_places",
    "mean_class_accuracy",
    "predicted_classes",
    "top_k_accuracy",
    "video_scores",
]


@dataclass(frozen=True)
class TopAccuracy:
    """How often the true class was among the k highest scores.

    Attributes:
        at: k to the share of the counted; None where nothing was counted.
        counted: how many have a label and were found.
        left_out: how many have no label or were not found.
    """

    at: dict[int, float | None]
    counted: int
    left_out: int


def label_places(scores_NC: Tensor, labels_N: Tensor) -> Tensor:
    """The place of each true class among all classes, the highest score first.

    Args:
        scores_NC: float [N, C]; a score that is no number stands before the true class.
        labels_N: int64 [N], 0 to C - 1, or -1.

    Returns:
        int64 [N], from 1; 0 where there is no label.
    """
    true_N1 = scores_NC.gather(1, labels_N.clamp(min=0)[:, None])
    # "Not below" instead of "at least", so that NaN gains nothing either.
    places_N = (~(scores_NC < true_N1)).sum(1)
    return torch.where(labels_N < 0, 0, places_N)


def accuracy_of_places(places: Tensor, ks: Sequence[int]) -> TopAccuracy:
    """Top-k accuracies from what :func:`label_places` gives.

    Args:
        places: int64 of any shape; 0 for what does not count.
        ks: each at least 1.
    """
    counted = int((places > 0).sum())
    at = {k: int(((places > 0) & (places <= k)).sum()) / counted if counted else None for k in ks}
    return TopAccuracy(at, counted, places.numel() - counted)


def top_k_accuracy(
    scores_NC: Tensor, labels_N: Tensor, ks: Sequence[int] = (1, 5), found_N: Tensor | None = None
) -> TopAccuracy:
    """Share of instances whose true class has one of the k highest scores.

    Args:
        scores_NC: float [N, C].
        labels_N: int64 [N], -1 without label.
        ks: each at least 1; with k at least C, every instance counts as right.
        found_N: bool [N], False for what could not be read; None for all.
    """
    places_N = label_places(scores_NC, labels_N)
    return accuracy_of_places(places_N if found_N is None else places_N * found_N, ks)


def video_scores(clip_logits_NVC: Tensor, found_NV: Tensor | None = None) -> Tensor:
    """Scores of videos: the mean of the softmax of their clips (paper, section 5).

    Args:
        clip_logits_NVC: float [N, V, C], V clips of each video.
        found_NV: bool [N, V], False for a clip that could not be read, which does not count; None for all.

    Returns:
        float32 (float64 for such logits) [N, C]; zeros for a video without any clip.
    """
    precision = torch.promote_types(clip_logits_NVC.dtype, torch.float32)
    probabilities_NVC = clip_logits_NVC.to(precision).softmax(dim=2)
    if found_NV is None:
        return probabilities_NVC.mean(1)
    # Not a product: what could not be read may hold NaN.
    kept_NVC = probabilities_NVC.masked_fill(~found_NV[:, :, None], 0)
    return kept_NVC.sum(1) / found_NV.sum(1, keepdim=True).clamp(min=1)


def predicted_classes(scores_NC: Tensor, labels_N: Tensor) -> Tensor:
    """The class with the highest score; of equal ones, one that is not the true class.

    So a prediction is right exactly where :func:`label_places` is 1.

    Args:
        scores_NC: float [N, C].
        labels_N: int64 [N]; where it is -1, the first of equal classes is taken.

    Returns:
        int64 [N].
    """
    right_N = label_places(scores_NC, labels_N) == 1
    if scores_NC.shape[1] == 1:
        return torch.zeros_like(labels_N)
    is_true_NC = torch.arange(scores_NC.shape[1], device=labels_N.device) == labels_N[:, None]
    others_N = scores_NC.masked_fill(is_true_NC, -torch.inf).argmax(1)
    # Where all others are -inf, argmax may give the true class itself.
    others_N = torch.where(others_N == labels_N, (labels_N + 1) % scores_NC.shape[1], others_N)
    return torch.where(right_N, labels_N, others_N)


def confusion_counts(predicted_N: Tensor, labels_N: Tensor, num_classes: int) -> Tensor:
    """How often each true class was taken for each class.

    Args:
        predicted_N: int64 [N].
        labels_N: int64 [N]; those of -1 are left out.
        num_classes: C.

    Returns:
        int64 [C, C], rows the true class, columns the predicted one.
    """
    kept_N = labels_N >= 0
    cells = labels_N[kept_N] * num_classes + predicted_N[kept_N]
    return torch.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)


def mean_class_accuracy(counts_CC: Tensor) -> float | None:
    """Mean over classes of the share of their instances that were recognised.

    Args:
        counts_CC: of :func:`confusion_counts`.

    Returns:
        The mean over classes that have an instance; None where none has.
    """
    totals_C = counts_CC.sum(1)
    there_C = totals_C > 0
    if not bool(there_C.any()):
        return None
    return float((counts_CC.diagonal()[there_C].double() / totals_C[there_C]).mean())
