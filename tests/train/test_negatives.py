"""Negatives: never the own instance, in range, uniform, and a function of seed, step and instance only."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from avid_pipeline.errors import ConfigError
from avid_pipeline.train.keys import derive_key
from avid_pipeline.train.negatives import draw_negatives

WORD = (1 << 64) - 1


def split_mix(state: int) -> int:
    """SplitMix64's output function in Python's unbounded integers."""
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & WORD
    return state ^ (state >> 31)


def chi_square(counts: NDArray[np.int64]) -> float:
    """Excess of the chi-square statistic of equal counts over its mean, in standard deviations."""
    expected = counts.mean()
    degrees = counts.size - 1
    return float((((counts - expected) ** 2 / expected).sum() - degrees) / np.sqrt(2 * degrees))


@given(
    num_instances=st.integers(2, 2**40),
    batch=st.integers(1, 5),
    num_negatives=st.integers(1, 50),
    seed=st.integers(0, 2**63),
    step=st.integers(0, 2**40),
    data=st.data(),
)
def test_in_range_and_never_the_own_instance(
    num_instances: int, batch: int, num_negatives: int, seed: int, step: int, data: st.DataObject
) -> None:
    index = torch.tensor(data.draw(st.lists(st.integers(0, num_instances - 1), min_size=batch, max_size=batch)))
    negatives = draw_negatives(index, num_negatives, num_instances, seed=seed, step=step)
    assert negatives.shape == (batch, num_negatives)
    assert negatives.dtype == torch.int64
    assert negatives.min() >= 0
    assert negatives.max() < num_instances
    assert not (negatives == index[:, None]).any()


@given(seed=st.integers(0, 2**63), step=st.integers(0, 2**40), instance=st.integers(0, 2**40 - 1))
@settings(max_examples=30)
def test_equals_the_generator_in_unbounded_integers(seed: int, step: int, instance: int) -> None:
    num_instances = 2**40
    state = split_mix((instance * 0x9E3779B97F4A7C15 + derive_key(seed, "negatives", step)) & WORD)
    expected = []
    for _ in range(6):
        state = (state + 0x9E3779B97F4A7C15) & WORD
        drawn = (split_mix(state) >> 1) % (num_instances - 1)
        expected.append(drawn + (drawn >= instance))
    drawn_negatives = draw_negatives(torch.tensor([instance]), 6, num_instances, seed=seed, step=step)
    assert drawn_negatives.tolist() == [expected]


@pytest.mark.parametrize("num_instances", [2, 3, 64, 1001])
def test_all_other_instances_are_equally_likely(num_instances: int) -> None:
    index = torch.arange(num_instances)
    others = num_instances - 1
    num_negatives = 100 * others if num_instances < 100 else 2000
    negatives = draw_negatives(index, num_negatives, num_instances, seed=3, step=5)
    # Distance from the own instance is 1 to N - 1 and must be uniform too, not only the negatives themselves.
    for values in (negatives, (negatives - index[:, None]) % num_instances - 1):
        counts = np.bincount(values.flatten().numpy())
        assert counts.size <= num_instances
        assert (counts > 0).all()
        if counts.size > 1:
            assert abs(chi_square(counts)) < 5


@given(
    num_instances=st.integers(3, 60) | st.integers(2**40, 2**50),
    num_negatives=st.integers(1, 40),
    seed=st.integers(0, 2**63),
    data=st.data(),
)
def test_place_among_the_instances_that_are_left(
    num_instances: int, num_negatives: int, seed: int, data: st.DataObject
) -> None:
    width = data.draw(st.integers(1, min(8, num_instances - 2)))
    instances = st.integers(0, num_instances - 1) | st.integers(0, min(12, num_instances - 1))
    index = torch.tensor([data.draw(instances)])
    positives = torch.tensor([data.draw(st.lists(instances, min_size=width, max_size=width))])
    negatives = draw_negatives(index, num_negatives, num_instances, seed=seed, step=2, positives=positives)
    assert negatives.dtype == torch.int64
    assert negatives.shape == (1, num_negatives)
    excluded = sorted({*index.tolist(), *positives[0].tolist()})
    expected = []
    for k in range(num_negatives):
        increment = 0x9E3779B97F4A7C15
        state = split_mix((int(index) * increment + derive_key(seed, "negatives", 2)) & WORD)
        place = (split_mix((state + (k + 1) * increment) & WORD) >> 1) % (num_instances - len(excluded))
        for instance in excluded:  # One step to the right for each that lies at or before the place so far.
            place += place >= instance
        expected.append(place)
    assert negatives[0].tolist() == expected
    assert not set(excluded) & set(expected)
    assert 0 <= min(expected) <= max(expected) < num_instances


@pytest.mark.parametrize(("num_instances", "width"), [(3, 1), (40, 7), (64, 32), (34, 32), (1001, 20)])
def test_all_instances_but_the_positives_are_equally_likely(num_instances: int, width: int) -> None:
    keys = torch.rand(num_instances, num_instances, generator=torch.Generator().manual_seed(0))
    order = keys.fill_diagonal_(-1).argsort(dim=1)  # Each instance first in its own row.
    index, positives = order[:, 0], order[:, 1 : 1 + width]
    left = num_instances - width - 1
    num_negatives = 100 * left if num_instances < 100 else 2000
    negatives = draw_negatives(index, num_negatives, num_instances, seed=3, step=5, positives=positives)
    is_left = torch.ones(num_instances, num_instances, dtype=torch.bool).scatter_(1, order[:, : 1 + width], False)
    counts = torch.zeros(num_instances, num_instances, dtype=torch.int64)
    counts.scatter_add_(1, negatives, torch.ones_like(negatives))
    assert (counts[~is_left] == 0).all()
    if left > 1:
        # Uniform for every instance by itself, and in the order of what is left.
        places = is_left.cumsum(dim=1).gather(1, negatives) - 1
        assert abs(chi_square(counts[is_left].numpy())) < 5
        assert abs(chi_square(np.bincount(places.flatten().numpy(), minlength=left))) < 5


def test_positives_in_any_order_and_repeated_exclude_the_same() -> None:
    index = torch.tensor([5, 9])
    positives = torch.tensor([[3, 8, 3, 1], [2, 9, 0, 2]])
    other = torch.tensor([[1, 3, 8, 8], [0, 0, 2, 2]])
    one, another = (draw_negatives(index, 64, 12, seed=1, step=0, positives=rows) for rows in (positives, other))
    assert torch.equal(one, another)
    assert set(one[0].tolist()) == {0, 2, 4, 6, 7, 9, 10, 11}
    assert set(one[1].tolist()) == set(range(12)) - {9, 0, 2}
    both = torch.cat([index, index.flip(0)]), torch.cat([positives, positives.flip(0)])
    again = draw_negatives(both[0], 64, 12, seed=1, step=0, positives=both[1])
    assert torch.equal(again, torch.cat([one, one.flip(0)]))


def test_positives_that_leave_no_negatives() -> None:
    with pytest.raises(ConfigError, match="3 positives leave no negatives among 4 instances; use at most 2"):
        draw_negatives(torch.tensor([0]), 4, 4, seed=0, step=0, positives=torch.tensor([[1, 2, 3]]))


def test_steps_seeds_and_instances_are_unrelated() -> None:
    num_instances, index = 50, torch.arange(40)
    streams = [draw_negatives(index, 500, num_instances, seed=seed, step=s) for seed in (0, 1) for s in (0, 1)]
    pairs = [(streams[0], other) for other in streams[1:]] + [(streams[0][:-1], streams[0][1:])]
    pairs.append((streams[0][:, :-1], streams[0][:, 1:]))
    for one, other in pairs:
        agreement = (one == other).double().mean().item()
        # Two unrelated draws agree once in about 49; 20,000 pairs put five deviations at 0.005.
        assert abs(agreement - 1 / 49) < 0.006


def test_independent_of_order_and_division_of_the_batch() -> None:
    index = torch.tensor([7, 3, 90, 11, 5])
    whole = draw_negatives(index, 32, 100, seed=1, step=2)
    assert torch.equal(whole, draw_negatives(index, 32, 100, seed=1, step=2))
    order = torch.tensor([4, 2, 0, 1, 3])
    assert torch.equal(whole[order], draw_negatives(index[order], 32, 100, seed=1, step=2))
    halves = [draw_negatives(part, 32, 100, seed=1, step=2) for part in (index[:2], index[2:])]
    assert torch.equal(whole, torch.cat(halves))


def test_one_instance_has_no_negatives() -> None:
    with pytest.raises(ConfigError, match="at least 2 instances, but there are 1"):
        draw_negatives(torch.tensor([0]), 4, 1, seed=0, step=0)
