"""Examples; that the order has its properties for any data is in test_plan_properties.py."""

import hashlib
import tracemalloc

import numpy as np
import pytest

from avid_pipeline.errors import ManifestError, PlanError
from avid_pipeline.shards_spec.manifest import Manifest, Parameters, ShardInfo
from avid_pipeline.streams.plan import plan
from avid_pipeline.streams.state import ORDER_VERSION


def manifest_of(sizes, subsets=None):
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
        subsets=subsets or {},
    )


def line_of(epoch):
    return np.concatenate([epoch.global_batch(step).instances for step in range(epoch.num_batches)])


def order(**changes):
    arguments = {"seed": 0, "epoch": 0, "clips_per_instance": 2, "global_batch_size": 16} | changes
    return line_of(plan(manifest_of([50] * 40), **arguments))


def test_same_arguments_same_order():
    assert np.array_equal(order(), order())
    assert not np.array_equal(order(), order(seed=1))
    assert not np.array_equal(order(), order(epoch=1))


def test_the_order_is_that_of_its_version():
    # A run may be resumed with a newer release, of ours or of numpy: another order must have another version.
    digest = hashlib.sha256()
    for count, clips, batch, block in [(2000, 3, 48, 8), (700, 4, 32, 1), (100, 5, 33, 8)]:
        epoch = plan(
            manifest_of([30] * (count // 30) + [count % 30]),
            seed=3,
            epoch=2,
            clips_per_instance=clips,
            global_batch_size=batch,
            block_size=block,
        )
        digest.update(line_of(epoch).astype("<i8").tobytes())
    assert (ORDER_VERSION, digest.hexdigest()[:16]) == (1, "44f6c1ef2961a375")


def test_two_million_instances_need_little_memory():
    manifest = manifest_of([256] * 7813)
    tracemalloc.start()
    epoch = plan(manifest, seed=0, epoch=0, clips_per_instance=10, global_batch_size=256)
    epoch.rank_batch(70_000, 3, 8)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 200e6


def test_errors():
    with pytest.raises(PlanError, match=r"the data set has 2000 instances.*use at most 2000, for at most 2000 ranks"):
        order(global_batch_size=2001)
    for name, least in [("clips_per_instance", 1), ("canonical_streams", 1), ("block_size", 1), ("seed", 0)]:
        with pytest.raises(PlanError, match=f"{name}: expected at least {least}, found {least - 1}"):
            order(**{name: least - 1})
    epoch = plan(manifest_of([50]), seed=0, epoch=0, clips_per_instance=1, global_batch_size=10)
    for step in (-1, 5):
        with pytest.raises(PlanError, match=f"step {step} of the epoch: expected 0 to 4"):
            epoch.global_batch(step)
    with pytest.raises(PlanError, match="rank 2: expected 0 to 1"):
        epoch.rank_batch(0, 2, 2)
    with pytest.raises(PlanError, match="first step 6 of the epoch: expected 0 to 5"):
        epoch.rank_batches(0, 2, 6)
    assert len(epoch.rank_batches(0, 2, 5)) == 0


@pytest.mark.parametrize(
    ("world_size", "message"),
    [
        (0, "expected at least 1"),
        (4, "largest possible number is 10, and below 4 it is 2; or use a batch size .* multiple of 4, such as 12"),
        (16, "largest possible number is 10; or use a batch size that is a multiple of 16, such as 16"),
        (60, "largest possible number is 10; the data have 50 instances"),
        (40, "largest possible number is 10; or .* such as 40"),
    ],
)
def test_too_many_ranks_are_an_error_that_says_the_largest_number(world_size, message):
    epoch = plan(manifest_of([50]), seed=0, epoch=0, clips_per_instance=1, global_batch_size=10)
    for look in (epoch.check_world_size, lambda size: epoch.rank_batches(0, size)):
        with pytest.raises(PlanError, match=message):
            look(world_size)


def test_the_largest_possible_numbers_are_possible():
    epoch = plan(manifest_of([50]), seed=0, epoch=0, clips_per_instance=1, global_batch_size=10)
    for world_size in (1, 2, 5, 10):
        epoch.check_world_size(world_size)
        assert {len(epoch.rank_batch(2, rank, world_size)) for rank in range(world_size)} == {10 // world_size}


def test_a_subset_keeps_its_indices():
    manifest = manifest_of([10, 1, 30, 9], {"fold": ((3, 5), (9, 12), (38, 50)), "none": ()})
    arguments = {"seed": 0, "epoch": 0, "clips_per_instance": 2, "subset": "fold"}
    line = line_of(plan(manifest, global_batch_size=2, **arguments))
    assert sorted(line.tolist()) == sorted(2 * [3, 4, 9, 10, 11, *range(38, 50)])
    with pytest.raises(PlanError, match="the subset fold has 17 instances"):
        plan(manifest, global_batch_size=18, **arguments)
    with pytest.raises(PlanError, match="the subset none has 0 instances"):
        plan(manifest, global_batch_size=1, **arguments | {"subset": "none"})
    with pytest.raises(ManifestError, match=r"subset flod: .* it has: fold, none"):
        plan(manifest, global_batch_size=2, **arguments | {"subset": "flod"})


def visit_times(count, clips, **arguments):
    """When each visit happens, as a share of the epoch: [count, clips], ascending in each row."""
    line = line_of(plan(manifest_of([count // 20] * 20), seed=0, epoch=0, clips_per_instance=clips, **arguments))
    assert len(line) == count * clips, "sizes in this test leave no tail"
    return np.argsort(line, kind="stable").reshape(count, clips) / len(line)


@pytest.mark.parametrize(("count", "batch"), [(200, 20), (12_800, 256)], ids=["few", "many"])
def test_the_visits_of_an_instance_lie_anywhere_in_the_epoch(count, batch):
    times = visit_times(count, clips=8, global_batch_size=batch)
    # As for independent uniform times. Pass after pass, every instance would be seen in every eighth of the epoch.
    seen_in_first_eighth = (times < 1 / 8).any(axis=1).mean()
    assert seen_in_first_eighth == pytest.approx(1 - (7 / 8) ** 8, abs=0.12)
    assert times[:, 0].mean() == pytest.approx(1 / 9, abs=0.04)
    assert times[:, -1].mean() == pytest.approx(8 / 9, abs=0.04)


def test_a_rank_keeps_reading_the_same_streams():
    epoch = plan(manifest_of([64] * 10), seed=0, epoch=0, clips_per_instance=3, global_batch_size=64)
    of_ranks = [
        set(np.concatenate([batch.instances for batch in epoch.rank_batches(rank, 4)]).tolist()) for rank in range(4)
    ]
    assert [len(instances) for instances in of_ranks] == [160] * 4
    assert len(set.union(*of_ranks)) == 640


def test_streams_read_runs_of_a_shard():
    epoch = plan(
        manifest_of([8000]),
        seed=0,
        epoch=0,
        clips_per_instance=2,
        global_batch_size=2,
        canonical_streams=2,
        block_size=500,
    )
    line = line_of(epoch)
    first, second = line[0::2], line[1::2]
    for stream, delay in ((first, 0), (second, 250)):
        # Rotated, so that the streams do not go on to another block at once.
        runs = np.roll(stream, delay).reshape(-1, 500)
        assert (np.diff(runs, axis=1) == 1).all()
        assert len(set(runs[:, 0].tolist())) == 8
        assert sorted(stream.tolist()) != stream.tolist()
    assert not set(first.tolist()) & set(second.tolist())


@pytest.mark.parametrize("streams", [1, 64, 1000])
def test_a_batch_mixes_shards_and_classes_of_sorted_data(streams):
    # 20 classes of 1,000 in shards of 250: pairs of one shard and class are no more than in a uniform shuffle.
    epoch = plan(
        manifest_of([250] * 80),
        seed=0,
        epoch=0,
        clips_per_instance=2,
        global_batch_size=100,
        canonical_streams=streams,
    )
    batches = line_of(epoch).reshape(-1, 100)
    for size in (250, 1000):
        counts = np.stack([np.bincount(batch // size, minlength=20_000 // size) for batch in batches])
        pairs = (counts * (counts - 1)).sum(axis=1).mean()
        assert pairs < 1.02 * 100 * 99 * (size - 1) / 19_999


@pytest.mark.parametrize("first", [0, 3, 5])
def test_rank_batches_go_on_from_a_step(first):
    epoch = plan(manifest_of([50]), seed=0, epoch=0, clips_per_instance=1, global_batch_size=10)
    batches = epoch.rank_batches(1, 2, first)
    assert len(batches) == 5 - first
    for number, batch in enumerate(batches):
        assert np.array_equal(batch.instances, epoch.rank_batch(first + number, 1, 2).instances)
