import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner

from avid_pipeline.evaluate.cli import main
from avid_pipeline.evaluate.retrieval import chance, retrieve
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


def test_command_line(small_dataset, tmp_path):
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
    train(config, str(small_dataset), str(tmp_path))
    arguments = ["retrieval", str(tmp_path), "--data", str(small_dataset), "--clips", "2"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert "chance" in result.output
    content = json.loads((tmp_path / "retrieval.json").read_text())
    assert content["instances"] == 10
    assert content["chance"]["recall"]["R@5"] == 0.5
    assert 0 <= content["video_to_audio"]["recall"]["R@1"] <= content["video_to_audio"]["recall"]["R@10"] <= 1
    again = json.loads((tmp_path / "retrieval.json").read_text())
    CliRunner().invoke(main, arguments)
    assert json.loads((tmp_path / "retrieval.json").read_text()) == again


def test_missing_checkpoint_is_one_clear_error(small_dataset, tmp_path):
    result = CliRunner().invoke(main, ["retrieval", str(tmp_path / "none"), "--data", str(small_dataset)])
    assert result.exit_code == 1
    assert "no such checkpoint" in result.output
    assert "Traceback" not in result.output
