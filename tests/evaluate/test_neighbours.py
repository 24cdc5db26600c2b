"""Nearest neighbours, and how often they share a class, against plain counting and scikit-learn."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

from avid_pipeline.errors import ConfigError
from avid_pipeline.evaluate.feature_store import pack_labels
from avid_pipeline.evaluate.knn import knn_scores
from avid_pipeline.evaluate.neighbours import class_recall, class_recall_by_chance, nearest, share_a_class


def vectors(count, dim=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, dim, generator=generator), dim=1)


def bits(sets, classes=10):
    return torch.from_numpy(pack_labels(sets, -(-classes // 8)))


def test_nearest_is_that_of_scikit_learn():
    queries, gallery = vectors(1100), vectors(300, seed=1)  # more than a block of queries
    cosines, rows = nearest(queries, gallery, 7)
    distances, expected = NearestNeighbors(n_neighbors=7, metric="cosine").fit(gallery).kneighbors(queries)
    assert np.array_equal(rows.numpy(), expected)
    assert np.allclose(1 - cosines.numpy(), distances, atol=1e-5)


def test_the_own_instance_is_no_neighbour_and_few_are_all_there_is():
    gallery = vectors(1030)
    _, rows = nearest(gallery, gallery, 3, exclude_own=True)
    assert not (rows == torch.arange(1030)[:, None]).any()
    assert nearest(gallery, gallery, 1)[1].flatten().tolist() == list(range(1030))
    assert nearest(vectors(2), vectors(4), 9)[1].shape == (2, 4)
    assert nearest(vectors(4), vectors(4), 9, exclude_own=True)[1].shape == (4, 3)


def test_what_cannot_be_compared_is_a_clear_error():
    broken = vectors(4)
    broken[1, 2] = math.nan
    with pytest.raises(ConfigError, match="NaN or infinite"):
        nearest(vectors(4), broken, 1)
    with pytest.raises(ConfigError, match=r"expected queries \[Q, D\]"):
        nearest(vectors(4), vectors(4, dim=5), 1)
    with pytest.raises(ConfigError, match="with something to find"):
        nearest(vectors(1), vectors(1), 1, exclude_own=True)


def test_recall_by_class_by_hand():
    query_labels, gallery_labels = bits([(0,), (1, 2), (9,)]), bits([(2,), (0, 3), (4,)])
    rows = torch.tensor([[0, 1, 2], [2, 0, 1], [0, 1, 2]])
    shared = share_a_class(query_labels, gallery_labels, rows)
    assert shared.tolist() == [[False, True, False], [False, True, False], [False, False, False]]
    assert class_recall(shared, (1, 2)) == {1: 0, 2: pytest.approx(2 / 3)}


@pytest.mark.parametrize("exclude_own", [False, True])
def test_chance_is_what_random_orders_reach(exclude_own):
    generator = np.random.default_rng(0)
    sets = [tuple(sorted(set(generator.integers(0, 10, 2).tolist()))) for _ in range(40)]
    labels = bits(sets)
    expected = class_recall_by_chance(labels, labels, (1, 3, 100), exclude_own=exclude_own)
    found = []
    for _ in range(300):
        orders = np.stack(
            [generator.permutation([g for g in range(40) if g != q or not exclude_own]) for q in range(40)]
        )
        shared = share_a_class(labels, labels, torch.from_numpy(orders))
        found.append(class_recall(shared, (1, 3, 100)))
    for k in (1, 3, 100):
        assert np.mean([each[k] for each in found]) == pytest.approx(expected[k], abs=0.01)


def test_votes_are_those_of_scikit_learn():
    gallery, queries = vectors(200), vectors(50, seed=2)
    labels = torch.arange(200) % 5
    temperature = 0.1

    def weights(distances):
        return np.exp((1 - distances) / temperature)

    scores = knn_scores(queries, gallery, F.one_hot(labels, 5).bool(), 9, temperature)
    classifier = KNeighborsClassifier(9, metric="cosine", weights=weights).fit(gallery, labels)
    assert np.allclose(F.normalize(scores, p=1, dim=1), classifier.predict_proba(queries), atol=1e-4)


def test_a_voter_with_several_labels_votes_for_each():
    gallery = torch.eye(3)
    labels = torch.tensor([[True, True, False], [False, False, True], [False, False, True]])
    scores = knn_scores(torch.tensor([[1.0, 0, 0]]), gallery, labels, 2, temperature=1.0)
    assert scores[0].tolist() == pytest.approx([1, 1, math.exp(-1)])
    own = knn_scores(gallery, gallery, labels, 1, exclude_own=True)
    assert own[1].tolist() != [0, 0, 0]


def test_chance_with_many_queries_of_few_kinds():
    labels = bits([(n % 3,) for n in range(5000)])
    # 1,666 or 1,667 others of 4,999 are alike.
    assert class_recall_by_chance(labels, labels, (1,), exclude_own=True)[1] == pytest.approx(1 / 3, abs=1e-3)


@pytest.mark.parametrize(("k", "temperature"), [(0, 0.1), (3, 0.0)])
def test_impossible_votes_are_clear_errors(k, temperature):
    with pytest.raises(ConfigError, match="expected k >= 1 and a positive temperature"):
        knn_scores(vectors(2), vectors(3), torch.ones(3, 2, dtype=torch.bool), k, temperature)
