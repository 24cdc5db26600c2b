"""Retrieval on held-out data while a run trains."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from avid_pipeline.clips.failures import Failure
from avid_pipeline.collectives import RankGroup
from avid_pipeline.embedding import embed_dataset
from avid_pipeline.errors import ConfigError, DecodeError, StorageError
from avid_pipeline.models import AVModel
from avid_pipeline.retrieval import RECALL_AT, chance, retrieve
from avid_pipeline.shards_spec.manifest import MANIFEST_NAME, SpectrogramStatistics
from avid_pipeline.shards_spec.reader import open_dataset
from avid_pipeline.shards_spec.shard_file import ShardWriter
from avid_pipeline.train.config import TrainConfig
from avid_pipeline.train.retrieval_hook import RetrievalHook
from tests.ranks import run_ranks

WORKER = Path(__file__).with_name("forward_worker.py")
STATISTICS = SpectrogramStatistics(mean=(-30.0,) * 257, std=(20.0,) * 257, frames=1)


def settings(root: Path | None, **changes: Any) -> TrainConfig:
    evaluation = None if root is None else {"data": str(root), "clips_per_instance": 2, "batch_size": 3}
    return TrainConfig.model_validate(
        {
            "epochs": 1,
            "clip": {"crop_size": 16, "audio_seconds": 0.3},
            "data": {"batch_size": 6, "workers": 1},
            "evaluation": evaluation,
            "optimizer": {"learning_rate": 1e-3},
        }
        | changes
    )


@pytest.fixture
def model() -> AVModel:
    return AVModel(10, (16, 8), torch.Generator().manual_seed(0))


def changed_manifest(dataset: Path, root: Path, **changes: Any) -> Path:
    copied = shutil.copytree(dataset, root)
    content = json.loads((copied / "manifest.json").read_text()) | changes
    (copied / "manifest.json").write_text(json.dumps(content))
    return copied


def test_numbers_are_those_of_retrieval(model: AVModel, small_dataset: Path) -> None:
    config = settings(small_dataset)
    found = RetrievalHook(config, STATISTICS).run(model, RankGroup())
    assert all(module.training for module in model.modules())
    reader = open_dataset(small_dataset)
    embeddings = embed_dataset(
        model, reader, config.clip, clips_per_instance=2, batch_size=3, statistics=STATISTICS, workers=1
    )
    video, audio, labels = embeddings.video, embeddings.audio, embeddings.labels
    expected = {"retrieval/instances": 10.0}
    for name, result in {
        "video_to_audio": retrieve(video, audio, labels),
        "audio_to_video": retrieve(audio, video, labels),
        "chance": chance(10, labels),
    }.items():
        assert result.class_precision is not None
        expected |= {f"retrieval/{name}_R@{k}": result.recall[k] for k in RECALL_AT}
        expected[f"retrieval/{name}_median_rank"] = result.median_rank
        expected[f"retrieval/{name}_class_precision"] = result.class_precision
    assert found == expected
    assert found["retrieval/chance_R@5"] == 0.5
    # Sound normalised with other statistics would give other vectors.
    own = embed_dataset(model, reader, config.clip, clips_per_instance=2, batch_size=3, workers=1)
    assert (own.audio - audio).abs().max() > 1e-4


def test_where_some_lack_sound_the_others_are_ranked(model: AVModel, small_dataset: Path, tmp_path: Path) -> None:
    subsets = {"with-audio": [[1, 4], [6, 8]]}
    root = changed_manifest(small_dataset, tmp_path / "data", modalities=["video"], subsets=subsets)
    hook = RetrievalHook(settings(root), STATISTICS)
    assert hook.instances.tolist() == [1, 2, 3, 6, 7]
    found = hook.run(model, RankGroup())
    assert found["retrieval/instances"] == 5
    assert found["retrieval/chance_R@1"] == 0.2


def test_what_cannot_be_decoded_is_not_ranked(model: AVModel, small_dataset: Path, tmp_path: Path) -> None:
    reader, shards = open_dataset(small_dataset), []
    for shard in reader.manifest.shards:
        with ShardWriter(tmp_path / shard.name) as writer:
            for place, sample in enumerate(reader.read_shard(shard)):
                writer.add(replace(sample, video=b"no video") if shard.first_index + place == 6 else sample)
            finished = writer.finish()
        (tmp_path / shard.index_name).write_bytes(finished.index.to_bytes())
        shards.append(shard.model_copy(update={"bytes": finished.bytes, "sha256": finished.sha256}))
    (tmp_path / MANIFEST_NAME).write_bytes(reader.manifest.model_copy(update={"shards": tuple(shards)}).to_json())
    hook, failures = RetrievalHook(settings(tmp_path), STATISTICS), list[Failure]()
    with pytest.raises(DecodeError):
        hook.run(model, RankGroup())
    found = hook.run(model, RankGroup(), failures.append)
    assert [failure.instance for failure in failures] == [6]
    assert found["retrieval/instances"] == 9
    assert found["retrieval/chance_median_rank"] == 5


def test_what_is_wrong_shows_before_training(small_dataset: Path, tmp_path: Path) -> None:
    silent = changed_manifest(small_dataset, tmp_path / "silent", modalities=["video"])
    with pytest.raises(ConfigError, match=r"evaluation\.data: .*silent.* needs picture and sound: .*found also audio"):
        RetrievalHook(settings(silent), STATISTICS)
    single = changed_manifest(
        small_dataset, tmp_path / "single", modalities=["video"], subsets={"with-audio": [[2, 3]]}
    )
    with pytest.raises(ConfigError, match="at least 2 instances with picture and sound, found 1"):
        RetrievalHook(settings(single), STATISTICS)
    with pytest.raises(StorageError, match="does not exist"):
        RetrievalHook(settings(tmp_path / "none"), STATISTICS)
    with pytest.raises(ConfigError, match="this run has none"):
        RetrievalHook(settings(None), STATISTICS)


def test_a_diverged_model_is_an_error(model: AVModel, small_dataset: Path) -> None:
    bias = model.video_proj.projection[-1].bias
    assert isinstance(bias, torch.Tensor)
    bias.data.fill_(torch.nan)
    with pytest.raises(ConfigError, match="NaN or infinite"):
        RetrievalHook(settings(small_dataset), STATISTICS).run(model, RankGroup())


@pytest.mark.slow
def test_ranks_share_the_work_and_agree(small_dataset: Path, tmp_path: Path) -> None:
    results = run_ranks(WORKER, 3, tmp_path, str(small_dataset))
    single = results["1"]["metrics"][0]
    assert {"retrieval/video_to_audio_R@1", "retrieval/audio_to_video_median_rank"} <= single.keys()
    for world_size in (2, 3):
        metrics = results[f"{world_size}"]["metrics"]
        assert metrics == [metrics[0]] * world_size
        assert metrics[0].keys() == single.keys()
        for name, value in metrics[0].items():
            # All pictures are alike here, so that last digits decide which of them a sound finds first.
            if "audio_to_video" not in name:
                assert value == pytest.approx(single[name]), name
