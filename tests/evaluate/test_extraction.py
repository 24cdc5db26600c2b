"""Computing features: the model's own, gone on with after an interruption, and the same on any number of ranks."""

import numpy as np
import pytest
import torch

from avid_pipeline.clips.loading import LoadingSettings
from avid_pipeline.clips.reading import TrainingChoice
from avid_pipeline.clips.settings import AugmentationSettings
from avid_pipeline.collectives import RankGroup
from avid_pipeline.embedding import embed_dataset
from avid_pipeline.errors import ConfigError, SampleError
from avid_pipeline.evaluate import feature_store
from avid_pipeline.evaluate.checkpoint import open_checkpoint
from avid_pipeline.evaluate.data import open_data
from avid_pipeline.evaluate.extraction import FeatureRequest, extract_features
from avid_pipeline.evaluate.vectors import instance_vectors
from avid_pipeline.shards_spec.storage import open_storage

LOADING = LoadingSettings(workers=1)


@pytest.fixture(scope="module")
def evaluated(trained_run):
    return open_checkpoint(str(trained_run))


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of four instances, so that ten have three."""
    monkeypatch.setattr(feature_store, "ROWS_PER_CHUNK", 4)


def extract(evaluated, root, folder, said=None, **changes):
    said = [] if said is None else said
    request = FeatureRequest(**{"names": ("video", "audio"), "clips": 2, "batch_size": 3} | changes)
    storage = open_storage(folder, create=True)
    return extract_features(
        evaluated, open_data(str(root)), request, storage, RankGroup(), loading=LOADING, say=said.append
    )


def test_vectors_are_those_of_embed_dataset(evaluated, small_dataset, tmp_path):
    data = open_data(str(small_dataset))
    store = extract(evaluated, small_dataset, tmp_path, clips=3)
    expected = embed_dataset(
        evaluated.model, data.reader, evaluated.clip, clips_per_instance=3, statistics=evaluated.statistics, workers=1
    )
    for name, vectors in (("video", expected.video), ("audio", expected.audio)):
        found, ok = instance_vectors(store, name)
        torch.testing.assert_close(found, vectors, rtol=0, atol=1e-5)
        assert bool(ok.all())
    assert store.labels().tolist() == expected.labels.tolist()
    with pytest.raises(ConfigError, match=r"clips \[2, 3\] of each instance are wanted, but there are 3"):
        instance_vectors(store, "video", range(2, 4))


def test_after_an_interruption_only_what_is_missing_is_computed(
    evaluated, small_dataset, tmp_path, small_chunks, monkeypatch
):
    whole = extract(evaluated, small_dataset, tmp_path / "whole")
    assert len(whole.blocks()) == 6
    write, written = feature_store.FeatureStore.write, []

    def failing(self, block, *rest):
        if len(written) == 4:
            raise KeyboardInterrupt
        write(self, block, *rest)
        written.append(block)

    monkeypatch.setattr(feature_store.FeatureStore, "write", failing)
    with pytest.raises(KeyboardInterrupt):
        extract(evaluated, small_dataset, tmp_path / "cut")
    said = []
    monkeypatch.setattr(feature_store.FeatureStore, "write", lambda self, block, *rest: write(self, block, *rest))
    again = extract(evaluated, small_dataset, tmp_path / "cut", said)
    assert said == [f"{tmp_path / 'cut'}: 4 of 6 parts of the features are there already"]
    for name in ("video", "audio"):
        for clip in range(2):
            assert np.array_equal(again.features(name, clip), whole.features(name, clip))


def test_a_finished_store_is_only_opened(evaluated, small_dataset, tmp_path):
    extract(evaluated, small_dataset, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    extract(evaluated, small_dataset, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before


def test_another_checkpoint_is_refused(evaluated, trained_run, small_dataset, tmp_path):
    extract(evaluated, small_dataset, tmp_path)
    other = open_checkpoint(str(trained_run), random_weights=1)
    with pytest.raises(ConfigError, match="holds features of something else: checkpoint was"):
        extract(other, small_dataset, tmp_path)


def test_augmented_clips_are_those_of_training(evaluated, small_dataset, tmp_path):
    plain = extract(evaluated, small_dataset, tmp_path / "plain")
    choice = TrainingChoice(0, 0, AugmentationSettings())
    drawn, again, other = (
        extract(evaluated, small_dataset, tmp_path / name, choice=TrainingChoice(seed, 0, AugmentationSettings()))
        for name, seed in (("drawn", 0), ("again", 0), ("other", 1))
    )
    assert choice.seed == 0
    for clip in range(2):
        assert np.array_equal(drawn.features("video", clip), again.features("video", clip))
        assert not np.array_equal(drawn.features("video", clip), plain.features("video", clip))
        assert not np.array_equal(drawn.features("video", clip), other.features("video", clip))
    with pytest.raises(ConfigError, match="augmented was"):
        extract(evaluated, small_dataset, tmp_path / "plain", choice=choice)


def test_half_precision(evaluated, small_dataset, tmp_path):
    full = extract(evaluated, small_dataset, tmp_path / "full", names=("video.pool",))
    half = extract(evaluated, small_dataset, tmp_path / "half", names=("video.pool",), dtype="float16")
    assert half.features("video.pool", 1).dtype == np.float16
    assert np.allclose(half.features("video.pool", 1), full.features("video.pool", 1), rtol=2e-3, atol=1e-3)


def test_a_diverged_model_is_an_error(evaluated, trained_run, small_dataset, tmp_path):
    broken = open_checkpoint(str(trained_run))
    with torch.no_grad():
        next(broken.model.audio_proj.parameters()).fill_(float("nan"))
    with pytest.raises(ConfigError, match="features audio: the network's features hold NaN"):
        extract(broken, small_dataset, tmp_path)


def test_what_cannot_be_decoded_is_left_out_and_told(evaluated, broken_dataset, small_dataset, tmp_path):
    said = []
    whole = extract(evaluated, small_dataset, tmp_path / "whole")
    store = extract(evaluated, broken_dataset, tmp_path / "broken", said)
    left = [row for row in range(10) if row not in (3, 4)]
    assert store.found().tolist() == [[row in left for row in range(10)]] * 2
    assert sum("left out" in message for message in said) == 2
    vectors, found = instance_vectors(store, "video")
    assert found.tolist() == [row in left for row in range(10)]
    assert not vectors[[3, 4]].any()
    torch.testing.assert_close(vectors[left], instance_vectors(whole, "video")[0][left], rtol=0, atol=1e-5)
    assert store.labels()[[3, 4]].tolist() == [-1, -1]


def test_too_many_of_them_are_an_error(evaluated, broken_dataset, tmp_path):
    with pytest.raises(SampleError, match=r"more than the allowed share of 0\.01"):
        extract(evaluated, broken_dataset, tmp_path, clips=8)
