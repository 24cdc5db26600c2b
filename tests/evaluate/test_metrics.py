import numpy as np
import pytest
import sklearn.metrics
import torch
import torchmetrics.functional.classification as reference
from hypothesis import given
from hypothesis import strategies as st

from avid_pipeline.evaluate.metrics import (
    accuracy_of_places,
    confusion_counts,
    label_places,
    mean_class_accuracy,
    predicted_classes,
    top_k_accuracy,
    video_scores,
)

CLASSES = 7


def random_scores(seed, count=200, classes=CLASSES):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, classes, generator=generator), torch.randint(classes, (count,), generator=generator)


@pytest.mark.parametrize("seed", range(5))
def test_agrees_with_torchmetrics_and_scikit_learn(seed):
    scores, labels = random_scores(seed)
    found = top_k_accuracy(scores, labels, (1, 2, 5))
    assert (found.counted, found.left_out) == (200, 0)
    for k, accuracy in found.at.items():
        theirs = reference.multiclass_accuracy(scores, labels, CLASSES, top_k=k, average="micro")
        assert accuracy == pytest.approx(float(theirs))
        exact = sklearn.metrics.top_k_accuracy_score(labels.numpy(), scores.numpy(), k=k, labels=range(CLASSES))
        assert accuracy == pytest.approx(exact)
    predicted = predicted_classes(scores, labels)
    assert torch.equal(predicted, scores.argmax(1))
    counts = confusion_counts(predicted, labels, CLASSES)
    assert torch.equal(counts, reference.multiclass_confusion_matrix(scores, labels, CLASSES))
    assert np.array_equal(
        counts.numpy(), sklearn.metrics.confusion_matrix(labels.numpy(), predicted.numpy(), labels=range(CLASSES))
    )
    assert mean_class_accuracy(counts) == pytest.approx(
        sklearn.metrics.balanced_accuracy_score(labels.numpy(), predicted.numpy())
    )
    assert mean_class_accuracy(counts) == pytest.approx(
        float(reference.multiclass_accuracy(scores, labels, CLASSES, average="macro"))
    )


def test_video_accuracy_by_hand():
    # Two videos of two clips, three classes. Logits are logarithms of probabilities, so the softmax gives these back.
    clips = torch.tensor(
        [
            [[0.6, 0.3, 0.1], [0.1, 0.8, 0.1]],  # mean 0.35, 0.55, 0.10: class 1
            [[0.9, 0.05, 0.05], [0.4, 0.1, 0.5]],  # mean 0.65, 0.075, 0.275: class 0
        ]
    )
    scores = video_scores(clips.log())
    assert torch.allclose(scores, torch.tensor([[0.35, 0.55, 0.1], [0.65, 0.075, 0.275]]))
    labels = torch.tensor([1, 2])
    assert top_k_accuracy(scores, labels, (1, 2)).at == {1: 0.5, 2: 1.0}
    # The first clips alone are both of class 0, so no clip of the first video but the second is right.
    assert top_k_accuracy(clips.flatten(0, 1).log(), labels.repeat_interleave(2), (1,)).at == {1: 0.5}
    assert predicted_classes(scores, labels).tolist() == [1, 0]
    assert confusion_counts(predicted_classes(scores, labels), labels, 3).tolist() == [[0, 0, 0], [0, 1, 0], [1, 0, 0]]
    assert mean_class_accuracy(torch.tensor([[0, 0, 0], [0, 1, 0], [1, 0, 0]])) == 0.5


def test_clips_that_were_not_found_do_not_count():
    clips = torch.tensor([[[0.6, 0.4], [0.1, 0.9]], [[0.5, 0.5], [0.2, 0.8]]]).log()
    clips[0, 1] = torch.nan
    found = torch.tensor([[True, False], [False, False]])
    scores = video_scores(clips, found)
    assert torch.allclose(scores, torch.tensor([[0.6, 0.4], [0.0, 0.0]]))
    result = top_k_accuracy(scores, torch.tensor([0, 1]), (1,), found.any(1))
    assert (result.at, result.counted, result.left_out) == ({1: 1.0}, 1, 1)


def test_a_constant_scorer_gains_nothing():
    labels = torch.tensor([0, 1, 2, 3])
    for scores in (torch.zeros(4, 4), torch.full((4, 4), torch.nan), torch.full((4, 4), -torch.inf)):
        assert top_k_accuracy(scores, labels, (1, 3, 4)).at == {1: 0.0, 3: 0.0, 4: 1.0}
        predicted = predicted_classes(scores, labels)
        assert not (predicted == labels).any()
        assert mean_class_accuracy(confusion_counts(predicted, labels, 4)) == 0.0


def test_what_has_no_label_is_left_out_and_counted():
    scores = torch.eye(3)
    labels = torch.tensor([0, -1, 0])
    result = top_k_accuracy(scores, labels, (1,))
    assert (result.at, result.counted, result.left_out) == ({1: 0.5}, 2, 1)
    assert confusion_counts(predicted_classes(scores, labels), labels, 3).tolist() == [[1, 0, 1], [0] * 3, [0] * 3]
    nothing = top_k_accuracy(scores[:0], labels[:0])
    assert (nothing.at, nothing.counted) == ({1: None, 5: None}, 0)
    assert mean_class_accuracy(torch.zeros(3, 3, dtype=torch.int64)) is None


@given(
    st.lists(st.lists(st.sampled_from([-1.0, 0.0, 2.0]), min_size=4, max_size=4), min_size=1, max_size=6),
    st.randoms(use_true_random=False),
)
def test_places_and_predictions_say_the_same(rows, random):
    scores = torch.tensor(rows)
    labels = torch.tensor([random.randrange(-1, 4) for _ in rows])
    places = label_places(scores, labels)
    for row, label, place in zip(rows, labels.tolist(), places.tolist(), strict=True):
        assert place == (0 if label < 0 else sum(score >= row[label] for score in row))
    predicted = predicted_classes(scores, labels)
    assert torch.equal(predicted == labels, places == 1)
    assert torch.equal(scores.gather(1, predicted[:, None])[:, 0], scores.amax(1))
    assert accuracy_of_places(places, (4,)).at[4] in (None, 1.0)


def test_one_class():
    scores, labels = torch.zeros(2, 1), torch.tensor([0, -1])
    assert top_k_accuracy(scores, labels, (1,)).at == {1: 1.0}
    assert predicted_classes(scores, labels).tolist() == [0, 0]


def test_half_precision_logits_are_averaged_in_single():
    logits = torch.tensor([[[8.0, 0.0], [0.0, 8.0]]], dtype=torch.bfloat16)
    scores = video_scores(logits)
    assert scores.dtype == torch.float32
    assert torch.allclose(scores, torch.tensor([[0.5, 0.5]]))
