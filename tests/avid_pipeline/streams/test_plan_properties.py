"""The five properties of an epoch's order, for any data, batch, number of streams, ranks and workers."""

import pickle
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from avid_pipeline.shards_spec.manifest import Manifest, index_ranges
from avid_pipeline.streams.plan import EpochPlan, plan
from tests.avid_pipeline.streams.test_plan import manifest_of


@dataclass
class Case:
    manifest: Manifest
    instances: list[int]
    clips: int
    arguments: dict

    def plan(self, **changes) -> EpochPlan:
        return plan(self.manifest, clips_per_instance=self.clips, **self.arguments | changes)


@st.composite
def cases(draw):
    sizes = draw(st.lists(st.one_of(st.just(1), st.integers(1, 30)), min_size=1, max_size=8))
    count = sum(sizes)
    subset = draw(st.one_of(st.none(), st.sets(st.integers(0, count - 1), min_size=1)))
    instances = list(range(count)) if subset is None else sorted(subset)
    subsets = {"all": ((0, count),)} | ({} if subset is None else {"some": index_ranges(instances)})
    # Batches of all sizes up to all instances, and often ones that leave few instances to a stream.
    parts = draw(st.integers(1, 12))
    batch = draw(st.one_of(st.integers(1, len(instances)), st.just(max(1, len(instances) // parts))))
    arguments = {
        "seed": draw(st.integers(0, 3)),
        "epoch": draw(st.integers(0, 3)),
        "global_batch_size": batch,
        "canonical_streams": draw(st.sampled_from([1, 2, 4, 8, 12, 64])),
        "block_size": draw(st.integers(1, 20)),
        "subset": None if subset is None else "some",
    }
    return Case(manifest_of(sizes, subsets), instances, draw(st.integers(1, 6)), arguments)


def world_sizes(epoch):
    size = epoch.global_batch_size
    return [number for number in range(1, size + 1) if size % number == 0]


def visits_of(batch):
    return list(zip(batch.instances.tolist(), batch.visits.tolist(), strict=True))


@settings(max_examples=500, deadline=None)
@given(cases())
def test_every_visit_once_less_the_tail_and_an_instance_once_in_a_batch(case):
    epoch = case.plan()
    size = case.arguments["global_batch_size"]
    total = len(case.instances) * case.clips
    assert epoch.num_batches == total // size
    seen = Counter()
    for step in range(epoch.num_batches):
        batch = epoch.global_batch(step)
        assert len(batch) == size
        assert len(set(batch.instances.tolist())) == size
        seen.update(visits_of(batch))
    assert max(seen.values()) == 1
    assert len(seen) == total // size * size
    assert seen.keys() <= {(instance, visit) for instance in case.instances for visit in range(case.clips)}


@settings(max_examples=300, deadline=None)
@given(cases())
def test_ranks_share_every_batch_equally(case):
    epoch = case.plan()
    for world_size in world_sizes(epoch):
        shares = [epoch.rank_batches(rank, world_size) for rank in range(world_size)]
        assert {len(share) for share in shares} == {epoch.num_batches}
        for step in range(0, epoch.num_batches, 1 + epoch.num_batches // 5):
            parts = [share[step] for share in shares]
            assert {len(part) for part in parts} == {epoch.global_batch_size // world_size}
            joined = [visit for part in parts for visit in visits_of(part)]
            assert sorted(joined) == sorted(visits_of(epoch.global_batch(step)))


@settings(max_examples=300, deadline=None)
@given(cases(), st.data())
def test_a_run_goes_on_at_any_step_with_any_number_of_ranks_and_workers(case, data):
    undisturbed = case.plan()
    world_size = data.draw(st.sampled_from(world_sizes(undisturbed)))
    first = data.draw(st.integers(0, undisturbed.num_batches))
    workers = data.draw(st.integers(1, 4))
    # Another process: it plans anew, and never looks at the steps before.
    resumed = case.plan()
    found = [[] for _ in range(undisturbed.num_batches - first)]
    for rank in range(world_size):
        batches = resumed.rank_batches(rank, world_size, first)
        assert len(batches) == len(found)
        # Workers take batches out of turn, each with its own copy of the plan or sharing one.
        turns = [range(worker, len(batches), workers) for worker in range(workers)]
        copies = [pickle.loads(pickle.dumps(batches)) if worker % 2 else batches for worker in range(workers)]
        for worker in reversed(range(workers)):
            for number in turns[worker]:
                found[number] += visits_of(copies[worker][number])
    expected = [sorted(visits_of(undisturbed.global_batch(step))) for step in range(first, undisturbed.num_batches)]
    assert [sorted(visits) for visits in found] == expected


def test_threads_may_share_a_plan():
    epoch = plan(manifest_of([50] * 8), seed=0, epoch=0, clips_per_instance=3, global_batch_size=16)
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(epoch.global_batch, range(epoch.num_batches)))
    for step, batch in enumerate(together):
        assert visits_of(batch) == visits_of(epoch.global_batch(step))


@settings(max_examples=200, deadline=None)
@given(cases())
def test_a_subset_of_everything_is_the_data_set(case):
    whole = case.plan(subset=None, global_batch_size=1)
    named = case.plan(subset="all", global_batch_size=1)
    for step in range(0, whole.num_batches, 7):
        assert visits_of(whole.global_batch(step)) == visits_of(named.global_batch(step))


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=20).filter(lambda sizes: sum(sizes) >= 80),
    data=st.data(),
    clips=st.integers(4, 8),
    block=st.integers(1, 20),
)
def test_the_visits_of_instances_are_spread(sizes, data, clips, block):
    count = sum(sizes)
    batch = data.draw(st.integers(1, count // 8))
    epoch = plan(
        manifest_of(sizes), seed=0, epoch=0, clips_per_instance=clips, global_batch_size=batch, block_size=block
    )
    # Pass after pass, all would be seen in the first pass; independent uniform times leave (1 - 1/clips)^clips unseen.
    first_pass = [epoch.global_batch(step).instances for step in range(count // batch)]
    unseen = 1 - len(np.unique(np.concatenate(first_pass))) / count
    assert 0.1 < unseen < 0.6
