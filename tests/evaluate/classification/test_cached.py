"""Training on features that were computed once: the same clips, in an order that is a pure function."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from avid_pipeline.errors import ConfigError, StorageError
from avid_pipeline.evaluate.classification.cached import CachedSource, cached_order
from avid_pipeline.evaluate.classification.commands import linear
from avid_pipeline.evaluate.classification.config import LinearConfig
from avid_pipeline.evaluate.classification.data import Task, open_parts
from avid_pipeline.evaluate.classification.feature_cache import FeatureCache
from avid_pipeline.evaluate.classification.linear import LinearProbes
from avid_pipeline.evaluate.classification.testing import classify_clips
from avid_pipeline.evaluate.results import read_results
from avid_pipeline.shards_spec.storage import open_storage
from tests.evaluate.classification.labelled import (
    SMALL,
    StoppedError,
    alone,
    invoke,
    linear_config,
    probe,
    quiet,
    rewritten,
    small_evaluated,
    stop_after,
    storage,
    without_picture,
    write_config,
)


def make_cache(config: LinearConfig, evaluated, roots, output):
    task = Task(*open_parts(*map(str, roots), None), config.modality, config, evaluated.statistics, quiet)
    return task, FeatureCache(evaluated, task, config, storage(output), alone(), quiet, None)


@pytest.mark.parametrize(("dtype", "exact"), [("float32", 1e-5), ("float16", 2e-3)])
def test_clips_and_cached_features_are_the_same(splits, evaluated, tmp_path, dtype, exact):
    config = linear_config(cache={"dtype": dtype}, augmentation={"crop": "resize", "flip": 0.5, "hue": 0.2})
    task, cache = make_cache(config, evaluated, splits, tmp_path)
    probes = LinearProbes(config, evaluated.model, 3, 4)
    source = cache.training_source()
    cached = {}
    for batch in source.batches(0, 0):
        for row, label in zip(batch.inputs["conv5x"], batch.labels.tolist(), strict=True):
            cached.setdefault(label, []).append(row.float())
    fresh = {}
    for batch in task.training_batches(0, 0, alone()):
        for row, label in zip(probes._features(batch.inputs)["conv5x"], batch.labels.tolist(), strict=True):
            fresh.setdefault(label, []).append(row)
    assert cached.keys() == fresh.keys() == {0, 1, 2}
    for label, rows in fresh.items():
        # The same clips, in another order.
        ours, theirs = (torch.stack(sorted(group, key=lambda row: row.sum().item())) for group in (cached[label], rows))
        assert torch.allclose(ours, theirs, rtol=exact, atol=exact)


def test_cached_tests_give_what_clips_give(splits, evaluated, tmp_path):
    config = linear_config(test=SMALL["test"] | {"clips_per_instance": 3}, cache={"dtype": "float32"})
    task, cache = make_cache(config, evaluated, splits, tmp_path)
    probes = LinearProbes(config, evaluated.model, 3, 4)
    cached, fresh = cache.test(probes.classify)(), classify_clips(task, probes.names, probes.classify, 3, alone())
    assert torch.equal(cached.labels, fresh.labels)
    assert torch.equal(cached.found, fresh.found)
    for name in probes.names:
        assert torch.equal(cached.clip_places[name], fresh.clip_places[name])
        assert torch.equal(cached.predicted[name], fresh.predicted[name])


def test_it_learns_and_goes_on_bit_for_bit(splits, evaluated, tmp_path, monkeypatch):
    config = linear_config(epochs=3, save_every_steps=3)
    calm = probe(config, evaluated, splits, tmp_path / "calm", cache_features=True)
    assert min(row["Video@1"] for row in calm.tables[0].rows.values()) > 0.7
    assert calm.settings["cache_features"] is True
    with monkeypatch.context() as patch:
        # Within the second epoch.
        stop_after(patch, 3)
        with pytest.raises(StoppedError):
            probe(config, evaluated, splits, tmp_path / "stopped", cache_features=True)
    with monkeypatch.context() as patch:
        # The features are there: the network is needed for the final test alone.
        patch.setattr("avid_pipeline.evaluate.extraction._compute", None)
        resumed = probe(config, evaluated, splits, tmp_path / "stopped", cache_features=True)
    assert resumed.tables == calm.tables


def test_features_are_kept_for_other_classifiers_and_not_for_other_clips(splits, tmp_path):
    weights = small_evaluated(tmp_path).identity.path
    config = write_config(tmp_path / "config.yaml", linear_config(epochs=1))
    output = tmp_path / "output"
    arguments = (config, weights, "--data", splits[0], "--test-data", splits[1], "--output", output, "--cache-features")

    def run(*options):
        done = invoke(linear, *arguments, *options)
        assert done.exit_code == 0, done.output
        return {path.name for path in output.iterdir() if path.is_dir()}, done.output

    folders, _ = run()
    assert {name.rpartition("-")[0] for name in folders} == {"features-train", "features-test"}
    again, said = run("--overwrite", "--set", "optimizer.learning_rate=1e-2")
    assert again == folders
    assert said.count("parts of the features are there already") == 2
    assert read_results(open_storage(output)).settings["optimizer"]["learning_rate"] == 1e-2
    others, _ = run("--overwrite", "--set", "augmentation.flip=0.0")
    assert len(others) == 2
    assert len(others & folders) == 1


def test_clips_that_cannot_be_decoded_are_left_out(splits, evaluated, tmp_path):
    broken = rewritten(splits[0], tmp_path / "broken", lambda i, sample: without_picture(sample) if i == 2 else sample)
    _, cache = make_cache(linear_config(), evaluated, (broken, splits[1]), tmp_path / "output")
    source = cache.training_source()
    # 11 of 12 instances, two clips of each, in batches of 6.
    assert source.steps_per_epoch == 3
    assert all((batch.labels >= 0).all() for batch in source.batches(0, 0))
    small = linear_config(data=SMALL["data"] | {"batch_size": 23})
    with pytest.raises(ConfigError, match="only 22 have features"):
        CachedSource(source._store, small.features, cache.task.train, alone(), batch_size=23, seed=0, mixed=1)


def test_a_damaged_cache_is_named(splits, evaluated, tmp_path):
    probe(linear_config(epochs=1), evaluated, splits, tmp_path, cache_features=True)
    (train,) = tmp_path.glob("features-train-*")
    chunk = train / "features" / "video.conv5x" / "c" / "1" / "0" / "0"
    data = bytearray(chunk.read_bytes())
    data[100] ^= 255
    chunk.write_bytes(data)
    (tmp_path / "results.json").unlink()
    with pytest.raises(StorageError, match=r"features/video\.conv5x"):
        probe(linear_config(epochs=1), evaluated, splits, tmp_path, cache_features=True)


def blocks_of(sizes):
    ends = np.cumsum(sizes)
    return [np.arange(end - size, end) for end, size in zip(ends, sizes, strict=True)]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(0, 5), st.integers(0, 5), st.integers(1, 14))
def test_order_has_every_clip_once_and_needs_few_chunks_at_a_time(sizes, seed, epoch, mixed):
    blocks = blocks_of(sizes)
    clips, chunks = cached_order(blocks, seed, epoch, mixed)
    assert sorted(clips.tolist()) == list(range(sum(sizes)))
    owner = np.repeat(np.arange(len(sizes)), sizes)
    assert np.array_equal(owner[clips], chunks)
    again, _ = cached_order(blocks, seed, epoch, mixed)
    assert np.array_equal(clips, again)
    # Whatever the batch size, chunks that are still needed and have been read are no more than two groups.
    for end in range(len(chunks)):
        needed = set(chunks[: end + 1].tolist()) & set(chunks[end:].tolist())
        assert len(needed) <= mixed


def test_every_epoch_has_another_order():
    blocks = blocks_of([256] * 8)
    orders = [cached_order(blocks, 0, epoch, 4)[0] for epoch in range(2)]
    assert not np.array_equal(*orders)
    # Chunks are mixed: the first batch is not of one of them.
    assert len(set((orders[0][:64] // 256).tolist())) == 4


class OfSize:
    """One of several ranks, whose batches can be made without the others."""

    def __init__(self, rank, size):
        self.rank, self.size = rank, size


def test_ranks_share_the_batches_and_a_resumed_epoch_has_the_same(splits, evaluated, tmp_path):
    config = linear_config()
    task, cache = make_cache(config, evaluated, splits, tmp_path)
    store = cache.training_source()._store

    def batches(rank, size, first=0):
        source = CachedSource(store, config.features, task.train, OfSize(rank, size), batch_size=6, seed=1, mixed=1)
        return [batch.inputs["conv5x"] for batch in source.batches(3, first)]

    whole = batches(0, 1)
    assert len(whole) == 4
    for parts, batch in zip(zip(batches(0, 2), batches(1, 2), strict=True), whole, strict=True):
        assert torch.equal(torch.cat(parts), batch)
    for late, batch in zip(batches(0, 1, first=2), whole[2:], strict=True):
        assert torch.equal(late, batch)
