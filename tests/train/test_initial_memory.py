"""``memory.init: forward``: the first memories as embeddings of the data."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from avid_pipeline.clips.failures import Failure
from avid_pipeline.embedding import embed_dataset
from avid_pipeline.errors import ConfigError, DecodeError
from avid_pipeline.models import AVModel
from avid_pipeline.shards_spec.manifest import MANIFEST_NAME, Manifest, read_manifest
from avid_pipeline.shards_spec.reader import open_dataset
from avid_pipeline.shards_spec.shard_file import ShardWriter
from avid_pipeline.shards_spec.storage import open_storage
from avid_pipeline.train.config import TrainConfig
from avid_pipeline.train.data import TrainingData
from avid_pipeline.train.initial_memory import fill_memory
from avid_pipeline.train.memory_bank import MemoryBank
from tests.ranks import run_ranks

WORKER = Path(__file__).with_name("forward_worker.py")
BROKEN = 4


def settings(**changes: Any) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "epochs": 1,
            "clip": {"crop_size": 16, "audio_seconds": 0.3},
            "data": {"batch_size": 6, "workers": 1},
            "optimizer": {"learning_rate": 1e-3},
        }
        | changes
    )


@pytest.fixture(scope="module")
def model() -> AVModel:
    return AVModel(10, (16, 8), torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def other_dataset(small_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small data set with a subset of four instances, and one video that cannot be decoded outside of it."""
    root, reader, shards = tmp_path_factory.mktemp("other"), open_dataset(small_dataset), []
    for shard in reader.manifest.shards:
        with ShardWriter(root / shard.name) as writer:
            for place, sample in enumerate(reader.read_shard(shard)):
                writer.add(replace(sample, video=b"no video") if shard.first_index + place == BROKEN else sample)
            finished = writer.finish()
        (root / shard.index_name).write_bytes(finished.index.to_bytes())
        shards.append(shard.model_copy(update={"bytes": finished.bytes, "sha256": finished.sha256}))
    subsets = {"some": ((1, 3), (7, 9))}
    manifest = Manifest(**{**reader.manifest.__dict__, "shards": tuple(shards), "subsets": subsets})
    (root / MANIFEST_NAME).write_bytes(manifest.to_json())
    return root


def centred(model: AVModel, root: Path) -> tuple[torch.Tensor, torch.Tensor]:
    found = embed_dataset(model, open_dataset(root), settings().clip, clips_per_instance=1, workers=1)
    return found.video, found.audio


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_the_embeddings_of_centred_clips(model: AVModel, small_dataset: Path, dtype: torch.dtype) -> None:
    config = settings()
    model.train()
    data, bank = TrainingData(config, str(small_dataset)), MemoryBank(10, 8, dtype=dtype)
    fill_memory(model, bank, data, config)
    assert all(module.training for module in model.modules())
    digits = 1e-5 if dtype == torch.float32 else 2**-8
    for memory, expected in zip(bank.full(), centred(model, small_dataset), strict=True):
        torch.testing.assert_close(memory, expected, rtol=0, atol=digits)
    assert bank.full()[1].var(dim=0).max() > 1e-5


def test_rows_of_a_subset_are_its_instances(model: AVModel, small_dataset: Path, other_dataset: Path) -> None:
    config = settings(data={"batch_size": 4, "workers": 1, "subset": "some"})
    data, bank = TrainingData(config, str(other_dataset)), MemoryBank(4, 8)
    fill_memory(model, bank, data, config)
    for memory, expected in zip(bank.full(), centred(model, small_dataset), strict=True):
        torch.testing.assert_close(memory, expected[[1, 2, 7, 8]], rtol=0, atol=1e-5)


def test_a_row_whose_clip_cannot_be_decoded_stays_random(
    model: AVModel, small_dataset: Path, other_dataset: Path
) -> None:
    config = settings()
    data, bank = TrainingData(config, str(other_dataset)), MemoryBank(10, 8, seed=5)
    before, failures = bank.full(), list[Failure]()
    with pytest.raises(DecodeError):
        fill_memory(model, bank, data, config)
    assert all(torch.equal(memory, old) for memory, old in zip(bank.full(), before, strict=True))
    fill_memory(model, bank, data, config, failures.append)
    assert [failure.instance for failure in failures] == [BROKEN]
    for memory, old, expected in zip(bank.full(), before, centred(model, small_dataset), strict=True):
        wanted = expected.clone()
        wanted[BROKEN] = old[BROKEN]
        torch.testing.assert_close(memory, wanted, rtol=0, atol=1e-5)


def test_a_bank_of_other_data_is_refused(model: AVModel, small_dataset: Path) -> None:
    config = settings()
    assert read_manifest(open_storage(str(small_dataset))).num_samples == 10
    with pytest.raises(ConfigError, match="the 10 instances trained on, found 9"):
        fill_memory(model, MemoryBank(9, 8), TrainingData(config, str(small_dataset)), config)


@pytest.fixture(scope="module")
def results(small_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What four processes computed in groups of one to four of them; see forward_worker.py."""
    return run_ranks(WORKER, 4, tmp_path_factory.mktemp("forward"), str(small_dataset))


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_rows_are_the_same_on_any_number_of_ranks(
    model: AVModel, small_dataset: Path, results: dict[str, Any], world_size: int
) -> None:
    expected = torch.stack(centred(model, small_dataset))
    torch.testing.assert_close(results[f"{world_size}"]["memories"], expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_embeddings_that_are_no_numbers_are_an_error_on_all_ranks(results: dict[str, Any]) -> None:
    assert len(results["errors"]) == 4
    for error in results["errors"]:
        assert "memory.init: forward: the network's embeddings hold NaN" in error
