import numpy as np
import pytest

from avid_pipeline.streams.batches import Batch, LazyBatches


def batch_of(number):
    return Batch(np.array([number]), np.array([0]))


def test_batches_are_made_when_asked_for():
    made = []

    def make(number):
        made.append(number)
        return batch_of(number)

    batches = LazyBatches(make, range(10**9))
    assert len(batches) == 10**9
    assert made == []
    assert batches[123_456].instances.tolist() == [123_456]
    assert batches[-1].instances.tolist() == [10**9 - 1]
    later = batches[5:][:3]
    assert (len(batches[5:]), len(later)) == (10**9 - 5, 3)
    assert made == [123_456, 10**9 - 1]
    assert [int(batch.instances[0]) for batch in later] == [5, 6, 7]
    assert made == [123_456, 10**9 - 1, 5, 6, 7]


def test_it_ends():
    batches = LazyBatches(batch_of, range(3))
    assert [int(batch.instances[0]) for batch in batches] == [0, 1, 2]
    with pytest.raises(IndexError):
        batches[3]
    assert not LazyBatches(batch_of, range(0))
