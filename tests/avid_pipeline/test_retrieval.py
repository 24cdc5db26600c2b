import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner

from avid_pipeline.clips.settings import ClipSettings
from avid_pipeline.embedding import embed_dataset
from avid_pipeline.errors import ConfigError
from avid_pipeline.evaluate.cli import main
from avid_pipeline.models import AVModel
from avid_pipeline.retrieval import chance, retrieve
from avid_pipeline.shards_spec.reader import open_dataset
from avid_pipeline.train.config import TrainConfig
from avid_pipeline.train.trainer import train


def unit(*rows):
    return F.normalize(torch.tensor(rows, dtype=torch.float32), dim=1)


def test_by_hand():
    queries = unit([1, 0], [0, 1], [1, 1])
    candidates = unit([1, 0.1], [1, 0], [1, 0.9])
    # Ranks of the counterparts: query 0 finds candidate 1 first; query 1 has 1 and 0 last and before last.
    result = retrieve(queries, candidates, torch.tensor([0, 0, 1]))
    assert result.recall == {1: pytest.approx(1 / 3), 5: 1.0, 10: 1.0}
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
    assert result.recall == {1: 0, 5: 0, 10: 0}
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


@pytest.fixture(scope="module")
def trained(small_dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    config = TrainConfig.model_validate(
        {
            "epochs": 1,
            "model": {"video_depth": 10, "projection": (16, 8)},
            "clip": {"crop_size": 16, "audio_seconds": 0.3},
            "data": {"batch_size": 5, "workers": 1},
            "loss": {"num_negatives": 8},
            "optimizer": {"learning_rate": 1e-3},
        }
    )
    train(config, str(small_dataset), str(folder))
    return folder


def test_command_line(small_dataset, trained):
    arguments = ["retrieval", str(trained), "--data", str(small_dataset), "--clips", "2"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert "chance" in result.output
    content = json.loads((trained / "retrieval.json").read_text())
    assert content["instances"] == 10
    assert content["chance"]["recall"]["R@5"] == 0.5
    assert 0 <= content["video_to_audio"]["recall"]["R@1"] <= content["video_to_audio"]["recall"]["R@10"] <= 1
    again = json.loads((trained / "retrieval.json").read_text())
    CliRunner().invoke(main, arguments)
    assert json.loads((trained / "retrieval.json").read_text()) == again


def test_missing_checkpoint_is_one_clear_error(small_dataset, tmp_path):
    result = CliRunner().invoke(main, ["retrieval", str(tmp_path / "none"), "--data", str(small_dataset)])
    assert result.exit_code == 1
    assert "no such checkpoint" in result.output
    assert "Traceback" not in result.output


def test_perfect_and_reversed_vectors():
    vectors = torch.eye(20)
    assert retrieve(vectors, vectors).recall == {1: 1, 5: 1, 10: 1}
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
        assert found.recall == {k: pytest.approx(np.mean(np.array(ranks) <= k)) for k in (1, 5, 10)}
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
    assert chance(4).recall == {1: 0.25, 5: 1, 10: 1}
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


def test_every_name_of_a_checkpoint_gives_the_same_numbers(small_dataset, trained, tmp_path):
    # A weights file lies in a folder that says how it was trained; reading it at 224 pixels would be another result.
    folder = trained / (trained / "latest").read_text().strip()
    results = []
    for number, checkpoint in enumerate((trained, folder, folder / "model.safetensors")):
        output = tmp_path / f"{number}.json"
        arguments = [
            "retrieval",
            str(checkpoint),
            "--data",
            str(small_dataset),
            "--clips",
            "1",
            "--output",
            str(output),
        ]
        assert CliRunner().invoke(main, arguments).exit_code == 0
        content = json.loads(output.read_text())
        results.append({key: content[key] for key in ("video_to_audio", "audio_to_video", "chance")})
    assert results[0] == results[1] == results[2]


def test_other_names_are_clear_errors(small_dataset, trained, tmp_path):
    (tmp_path / "weights.pth.tar").write_bytes(b"no weights")
    for checkpoint, data, message in (
        (tmp_path / "weights.pth.tar", small_dataset, "weights.pth.tar"),
        (tmp_path, small_dataset, str(tmp_path)),
        (trained, tmp_path / "none", "does not exist"),
    ):
        result = CliRunner().invoke(main, ["retrieval", str(checkpoint), "--data", str(data)])
        assert result.exit_code == 1
        assert message in result.output
        assert "Traceback" not in result.output
