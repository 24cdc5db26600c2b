"""Embedding a data set on one rank and on several."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from avid_pipeline.clips.failures import Failure
from avid_pipeline.clips.settings import ClipSettings
from avid_pipeline.embedding import embed_dataset
from avid_pipeline.errors import ConfigError, DecodeError, SampleError
from avid_pipeline.models import AVModel
from avid_pipeline.shards_spec.reader import ShardReader, open_dataset
from tests.conftest import BROKEN
from tests.ranks import run_ranks

WORKER = Path(__file__).with_name("embedding_worker.py")
CLIP = ClipSettings(crop_size=16, audio_seconds=0.3)


@pytest.fixture(scope="module")
def model() -> AVModel:
    return AVModel(10, (16, 8), torch.Generator().manual_seed(0)).eval()


def test_the_model_and_the_generators_stay_as_they_were(model: AVModel, small_dataset: Path) -> None:
    reader = open_dataset(small_dataset)
    expected = embed_dataset(model, reader, CLIP, clips_per_instance=1, workers=1)
    model.train()
    model.audio_model.eval()
    modes = [module.training for module in model.modules()]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(1)
    state, numpy_state = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]
    found = embed_dataset(model, reader, CLIP, clips_per_instance=1, workers=1)
    assert torch.equal(found.video, expected.video)
    assert torch.equal(found.audio, expected.audio)
    assert found.audio.var(dim=0).max() > 1e-5
    assert [module.training for module in model.modules()] == modes
    assert any(modes)
    assert not all(modes)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # type: ignore[index]
    model.eval()


def test_the_mode_comes_back_after_an_error_too(model: AVModel, broken_dataset: Path) -> None:
    model.train()
    with pytest.raises(DecodeError):
        embed_dataset(model, open_dataset(broken_dataset), CLIP, clips_per_instance=1, workers=1)
    assert all(module.training for module in model.modules())
    model.eval()


def test_chosen_instances_come_in_the_order_given(model: AVModel, small_dataset: Path) -> None:
    reader = open_dataset(small_dataset)
    whole = embed_dataset(model, reader, CLIP, clips_per_instance=2, workers=1)
    chosen = [8, 0, 3, 8]
    some = embed_dataset(model, reader, CLIP, clips_per_instance=2, batch_size=3, workers=1, instances=chosen)
    torch.testing.assert_close(some.video, whole.video[chosen], rtol=0, atol=1e-5)
    torch.testing.assert_close(some.audio, whole.audio[chosen], rtol=0, atol=1e-5)
    assert torch.equal(some.labels, whole.labels[chosen])
    assert bool(whole.found.all())
    # All pictures are alike; the order shows in the sound.
    assert (whole.audio[8] - whole.audio[0]).abs().max() > 1e-4


def test_bfloat16_is_close_but_not_the_same(model: AVModel, small_dataset: Path) -> None:
    reader = open_dataset(small_dataset)
    full, half = (
        embed_dataset(model, reader, CLIP, clips_per_instance=1, workers=1, precision=precision)
        for precision in (None, torch.bfloat16)
    )
    assert half.video.dtype == torch.float32
    assert not torch.equal(full.video, half.video)
    torch.testing.assert_close(half.video, full.video, rtol=0, atol=0.05)
    torch.testing.assert_close(half.video.norm(dim=1), torch.ones(10), rtol=0, atol=1e-5)


def test_what_cannot_be_decoded_is_left_out_and_reported(
    model: AVModel, small_dataset: Path, broken_dataset: Path
) -> None:
    failures: list[Failure] = []
    whole = embed_dataset(model, open_dataset(small_dataset), CLIP, clips_per_instance=2, workers=1)
    found = embed_dataset(
        model, open_dataset(broken_dataset), CLIP, clips_per_instance=2, workers=1, on_failure=failures.append
    )
    left = [index for index in range(10) if index not in BROKEN]
    assert found.found.tolist() == [index in left for index in range(10)]
    torch.testing.assert_close(found.video[left], whole.video[left], rtol=0, atol=1e-5)
    torch.testing.assert_close(found.audio[left], whole.audio[left], rtol=0, atol=1e-5)
    assert not found.video[list(BROKEN)].any()
    assert found.labels[list(BROKEN)].tolist() == [-1, -1]
    assert sorted({failure.instance for failure in failures}) == list(BROKEN)


def test_too_many_failures_are_an_error(model: AVModel, broken_dataset: Path) -> None:
    with pytest.raises(SampleError, match=r"more than the allowed share of 0\.01"):
        embed_dataset(
            model, open_dataset(broken_dataset), CLIP, clips_per_instance=8, workers=1, on_failure=lambda failure: None
        )


def test_nothing_to_embed_and_missing_sound_are_errors(model: AVModel, small_dataset: Path) -> None:
    reader = open_dataset(small_dataset)
    with pytest.raises(ConfigError, match="no instance"):
        embed_dataset(model, reader, CLIP, instances=[])
    silent = ShardReader(reader.storage, reader.manifest.model_copy(update={"modalities": ("video",)}))
    with pytest.raises(ConfigError, match="found also audio"):
        embed_dataset(model, silent, CLIP)


@pytest.fixture(scope="module")
def results(small_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What four processes computed in groups of one to four of them; see embedding_worker.py."""
    return run_ranks(WORKER, 4, tmp_path_factory.mktemp("ranks"), str(small_dataset))


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_rank_gets_all_rows_of_one_process(results: dict[str, Any], world_size: int) -> None:
    # Ten instances divide into neither three nor four, and three leave the last of four ranks without any.
    alone, of_ranks = results["alone"], results[f"{world_size}"]
    assert len(of_ranks) == world_size
    for of_rank in of_ranks:
        for case, rows in (("all", list(range(10))), ("some", [7, 2, 5])):
            found = of_rank[case]
            torch.testing.assert_close(found["video"], alone["video"][rows], rtol=0, atol=1e-5)
            torch.testing.assert_close(found["audio"], alone["audio"][rows], rtol=0, atol=1e-5)
            assert torch.equal(found["labels"], alone["labels"][rows])
            assert bool(found["found"].all())
            assert all(torch.equal(found[name], of_ranks[0][case][name]) for name in found)
    assert (alone["audio"][7] - alone["audio"][2]).abs().max() > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "lengths"), [(1, [3]), (2, [2, 1]), (3, [1, 1, 1]), (4, [1, 1, 1, 0])])
def test_without_gathering_ranks_keep_their_own_rows(
    results: dict[str, Any], world_size: int, lengths: list[int]
) -> None:
    of_ranks = results[f"{world_size}"]
    assert [len(of_rank["own"]["video"]) for of_rank in of_ranks] == lengths
    for name in ("video", "audio", "labels", "found"):
        assert torch.equal(torch.cat([of_rank["own"][name] for of_rank in of_ranks]), of_ranks[0]["some"][name])
