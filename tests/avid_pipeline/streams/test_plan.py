import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avid_pipeline.errors import PlanError
from avid_pipeline.shards_spec.manifest import Manifest, Parameters, ShardInfo
from avid_pipeline.streams.plan import plan


def manifest_of(sizes):
    first, shards = 0, []
    for number, size in enumerate(sizes):
        name = f"shard-{number:06d}.tar"
        shards.append(ShardInfo(name=name, samples=size, bytes=2048, sha256="0" * 64, first_index=first))
        first += size
    return Manifest(
        dataset="made",
        split="train",
        parameters=Parameters(),
        parameters_fingerprint=Parameters().fingerprint(),
        modalities=("video",),
        classes=(),
        spectrogram_statistics=None,
        shards=tuple(shards),
        quarantined=0,
    )


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    batch=st.integers(1, 64),
    clips=st.integers(1, 5),
    streams=st.sampled_from([1, 2, 4, 8, 12, 64]),
    block=st.integers(1, 20),
    seed=st.integers(0, 3),
)
def test_properties(sizes, batch, clips, streams, block, seed):
    manifest = manifest_of(sizes)
    count = manifest.num_samples
    batch = min(batch, count)
    epoch = plan(
        manifest,
        seed=seed,
        epoch=1,
        clips_per_instance=clips,
        global_batch_size=batch,
        canonical_streams=streams,
        block_size=block,
    )
    assert epoch.num_batches == count * clips // batch
    seen = set()
    for step in range(epoch.num_batches):
        whole = epoch.global_batch(step)
        assert len(set(whole.instances.tolist())) == batch, "an instance is at most once in a global batch"
        visits = set(zip(whole.instances.tolist(), whole.visits.tolist(), strict=True))
        assert not visits & seen, "no visit happens twice"
        seen |= visits
        for world_size in (1, 2, 3, 4):
            if batch % world_size == 0:
                parts = [epoch.rank_batch(step, rank, world_size) for rank in range(world_size)]
                assert {len(part) for part in parts} == {batch // world_size}
                joined = np.concatenate([part.instances for part in parts])
                assert sorted(joined.tolist()) == sorted(whole.instances.tolist())
    assert all(0 <= instance < count and 0 <= visit < clips for instance, visit in seen)
    assert len(seen) == count * clips // batch * batch


def order(**changes):
    arguments = {"seed": 0, "epoch": 0, "clips_per_instance": 2, "global_batch_size": 16} | changes
    epoch = plan(manifest_of([50] * 40), **arguments)
    return np.concatenate([epoch.global_batch(step).instances for step in range(epoch.num_batches)])


def test_same_arguments_same_order():
    assert np.array_equal(order(), order())
    assert not np.array_equal(order(), order(seed=1))
    assert not np.array_equal(order(), order(epoch=1))


def test_visits_are_spread_not_pass_after_pass():
    instances = order(clips_per_instance=4)
    first_pass = instances[: len(instances) // 4]
    share_seen = len(np.unique(first_pass)) / 2000
    # Uniformly spread visits leave (3/4)^4 = 32 % unseen after a quarter; pass after pass would leave none.
    assert 0.5 < share_seen < 0.85


def test_two_million_instances_are_planned_lazily():
    manifest = manifest_of([256] * 7813)
    tracemalloc.start()
    epoch = plan(manifest, seed=0, epoch=0, clips_per_instance=10, global_batch_size=256)
    epoch.rank_batch(70_000, 3, 8)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 200e6


def test_errors():
    with pytest.raises(PlanError, match="use at most 2000"):
        order(global_batch_size=2001)
    with pytest.raises(PlanError, match="clips_per_instance"):
        order(clips_per_instance=0)
    epoch = plan(manifest_of([50]), seed=0, epoch=0, clips_per_instance=1, global_batch_size=10)
    with pytest.raises(PlanError, match="expected 0 to 4"):
        epoch.global_batch(5)
    with pytest.raises(PlanError, match="divided by 3 ranks"):
        epoch.rank_batch(0, 0, 3)
    with pytest.raises(PlanError, match="rank 2"):
        epoch.rank_batch(0, 2, 2)


def visit_times(count, clips, **arguments):
    """When each visit happens, as a share of the epoch: [count, clips], ascending in each row."""
    epoch = plan(manifest_of([count // 20] * 20), seed=0, epoch=0, clips_per_instance=clips, **arguments)
    line = np.concatenate([epoch.global_batch(step).instances for step in range(epoch.num_batches)])
    assert len(line) == count * clips, "sizes in this test leave no tail"
    order = np.argsort(line, kind="stable")
    return order.reshape(count, clips) / len(line)


@pytest.mark.parametrize(("count", "batch"), [(200, 20), (12_800, 256)], ids=["few", "many"])
def test_the_visits_of_an_instance_lie_anywhere_in_the_epoch(count, batch):
    times = visit_times(count, clips=8, global_batch_size=batch)
    # As for independent uniform times. Pass after pass, every instance would be seen in every eighth of the epoch.
    seen_in_first_eighth = (times < 1 / 8).any(axis=1).mean()
    assert seen_in_first_eighth == pytest.approx(1 - (7 / 8) ** 8, abs=0.12)
    first, last = times[:, 0].mean(), times[:, -1].mean()
    assert first == pytest.approx(1 / 9, abs=0.04)
    assert last == pytest.approx(8 / 9, abs=0.04)


def test_a_rank_keeps_reading_the_same_streams():
    # 640 instances fill 64 streams evenly; whoever owns a stream owns its ten instances in all visits.
    epoch = plan(manifest_of([64] * 10), seed=0, epoch=0, clips_per_instance=3, global_batch_size=64)
    of_ranks = [
        set(np.concatenate([batch.instances for batch in epoch.rank_batches(rank, 4)]).tolist()) for rank in range(4)
    ]
    assert [len(instances) for instances in of_ranks] == [160] * 4
    assert len(set.union(*of_ranks)) == 640


def test_streams_read_runs_of_a_shard():
    # 2 streams x 8 blocks of 500 neighbours: a stream reads one block after the other.
    epoch = plan(
        manifest_of([8000]),
        seed=0,
        epoch=0,
        clips_per_instance=2,
        global_batch_size=2,
        canonical_streams=2,
        block_size=500,
    )
    line = np.concatenate([epoch.global_batch(step).instances for step in range(epoch.num_batches)])
    for stream in (line[0::2], line[1::2]):
        runs = stream.reshape(-1, 500)
        assert (runs.max(axis=1) - runs.min(axis=1) == 499).all()
        assert (np.diff(runs, axis=1) != 1).any(), "shuffled within a run"


@pytest.mark.parametrize("first", [0, 3, 5])
def test_rank_batches_go_on_from_a_step(first):
    epoch = plan(manifest_of([50]), seed=0, epoch=0, clips_per_instance=1, global_batch_size=10)
    batches = epoch.rank_batches(1, 2, first)
    assert len(batches) == 5 - first
    for number, batch in enumerate(batches):
        assert np.array_equal(batch.instances, epoch.rank_batch(first + number, 1, 2).instances)
