import numpy as np
import pytest
import torch
import torch.nn.functional as F

from avid_pipeline.clips.settings import ClipSettings
from avid_pipeline.embedding import embed_dataset
from avid_pipeline.errors import ConfigError
from avid_pipeline.models import AVModel
from avid_pipeline.retrieval import chance, retrieve
from avid_pipeline.shards_spec.reader import open_dataset


def unit(*rows):
    return F.normalize(torch.tensor(rows, dtype=torch.float32), dim=1)


def test_by_hand():
    queries = unit([1, 0], [0, 1], [1, 1])
    candidates = unit([1, 0.1], [1, 0], [1, 0.9])
    # Ranks of the counterparts: query 0 finds candidate 1 first; query 1 has 1 and 0 last and before last.
    result = retrieve(queries, candidates, torch.tensor([0, 0, 1]))
    assert result.recall == {1: pytest.approx(1 / 3), 5: 1.0, 10: 1.0, 20: 1.0}
    assert result.median_rank == 2
    assert result.class_precision == pytest.approx(1 / 3)


def test_blocks_and_ranks_against_sorting():
    generator = torch.Generator().manual_seed(0)
    queries, candidates = (F.normalize(torch.randn(1500, 8, generator=generator), dim=1) for _ in range(2))
    ordered = (queries @ candidates.T).argsort(dim=1, descending=True)
    ranks = (ordered == torch.arange(1500)[:, None]).double().argmax(dim=1) + 1
    result = retrieve(queries, candidates)
    assert result.median_rank == pytest.approx(float(ranks.double().quantile(0.5)), abs=1)
    assert result.recall[10] == pytest.approx(float((ranks <= 10).double().mean()))
    assert result.class_precision is None


def test_a_collapsed_model_gains_nothing():
    same = torch.ones(50, 4) / 2
    result = retrieve(same, same)
    assert result.recall == {1: 0, 5: 0, 10: 0, 20: 0}
    assert result.median_rank == 50


def test_chance_is_what_random_vectors_reach():
    generator, labels = torch.Generator().manual_seed(0), torch.arange(60) % 7
    found = [
        retrieve(*(F.normalize(torch.randn(60, 16, generator=generator), dim=1) for _ in range(2)), labels)
        for _ in range(200)
    ]
    expected = chance(60, labels)
    assert np.mean([r.recall[10] for r in found]) == pytest.approx(expected.recall[10], abs=0.01)
    assert np.mean([r.median_rank for r in found]) == pytest.approx(expected.median_rank, abs=1.5)
    assert np.mean([r.class_precision for r in found]) == pytest.approx(expected.class_precision, abs=0.01)


def test_perfect_and_reversed_vectors():
    vectors = torch.eye(20)
    assert retrieve(vectors, vectors).recall == {1: 1, 5: 1, 10: 1, 20: 1}
    assert retrieve(vectors, vectors).median_rank == 1
    assert retrieve(vectors, -vectors).median_rank == 20


def test_ranks_by_an_independent_count():
    # Both directions, in plain numpy, one query at a time.
    generator = np.random.default_rng(0)
    video, audio = (vectors / np.linalg.norm(vectors, axis=1)[:, None] for vectors in generator.normal(size=(2, 70, 6)))
    labels = generator.integers(-1, 4, 70)
    for queries, candidates in ((video, audio), (audio, video)):
        ranks, right = [], []
        for own, query in enumerate(queries):
            similarity = candidates @ query
            ranks.append(1 + sum(similarity[other] > similarity[own] for other in range(70) if other != own))
            if labels[own] >= 0:
                nearest = max((other for other in range(70) if other != own), key=lambda other: similarity[other])
                right.append(labels[nearest] == labels[own])
        found = retrieve(torch.tensor(queries), torch.tensor(candidates), torch.tensor(labels))
        assert found.recall == {k: pytest.approx(np.mean(np.array(ranks) <= k)) for k in (1, 5, 10, 20)}
        assert found.median_rank == np.median(ranks)
        assert found.class_precision == pytest.approx(np.mean(right))


def test_labels_of_some_or_none():
    queries = unit([1, 0], [0, 1], [1, 1])
    assert retrieve(queries, queries, torch.tensor([-1, -1, -1])).class_precision is None
    # Only query 1 has a label, and nobody shares it.
    assert retrieve(queries, queries, torch.tensor([-1, 3, -1])).class_precision == 0
    assert chance(3, torch.tensor([-1, 3, -1])).class_precision == 0
    assert chance(3, torch.tensor([-1, -1, -1])).class_precision is None
    # Of two labelled alike among three, each finds the other with probability 1/2.
    assert chance(3, torch.tensor([2, 2, -1])).class_precision == pytest.approx(1 / 2)


def test_chance_of_few_instances_is_at_most_certain():
    assert chance(4).recall == {1: 0.25, 5: 1, 10: 1, 20: 1}
    assert chance(4).median_rank == 2.5


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_diverged_model_scores_nothing(bad):
    vectors = torch.eye(4)
    broken = vectors.clone()
    broken[2, 1] = bad
    for arguments in ((vectors, broken), (broken, vectors)):
        with pytest.raises(ConfigError, match="NaN or infinite"):
            retrieve(*arguments)


@pytest.mark.parametrize(("queries", "candidates"), [((1, 4), (1, 4)), ((3, 4), (2, 4)), ((3, 4), (3, 5))])
def test_shapes_that_cannot_be_compared(queries, candidates):
    with pytest.raises(ConfigError, match="as many queries as candidates"):
        retrieve(torch.ones(queries), torch.ones(candidates))


def test_embeddings_depend_on_neither_batches_nor_workers(small_dataset):
    model = AVModel(10, (16, 8), torch.Generator().manual_seed(0)).eval()
    reader, clip = open_dataset(small_dataset), ClipSettings(crop_size=16, audio_seconds=0.3)
    one, other = (
        embed_dataset(model, reader, clip, clips_per_instance=3, batch_size=size, workers=workers)
        for size, workers in ((7, 1), (30, 2))
    )
    assert one.video.shape == one.audio.shape == (10, 8)
    assert torch.allclose(one.video.norm(dim=1), torch.ones(10), atol=1e-5)
    torch.testing.assert_close(one.video, other.video, rtol=0, atol=1e-4)
    torch.testing.assert_close(one.audio, other.audio, rtol=0, atol=1e-4)
    assert one.labels.tolist() == [reader.read(index).record.labels[0] for index in range(10)]
