import random
import threading
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avid_pipeline.errors import ManifestError, ShardError, StorageError
from avid_pipeline.shards_spec.manifest import ShardInfo
from avid_pipeline.shards_spec.reader import ShardReader, open_dataset
from avid_pipeline.shards_spec.storage import open_storage
from avid_pipeline.streams.fetching import SampleFetcher
from avid_pipeline.streams.read_queue import ReadQueue, Wanted


@pytest.fixture
def local(small_dataset):
    reader = open_dataset(small_dataset)
    return [reader.read(index) for index in range(len(reader))]


@pytest.fixture
def remote(small_dataset, upload, proxy):
    data = upload(small_dataset)
    reader = open_dataset(data.url, data.through_proxy)
    proxy.requests.clear()
    return reader


def size_of(reader, index):
    shard, place = reader.locate(index)
    return reader.index_of(shard).span(place)[1]


def take_all(fetcher, order):
    pending = [fetcher.request(index) for index in order]
    return [each.result() for each in pending]


@pytest.mark.parametrize("connections", [1, 3, 8])
@pytest.mark.parametrize("bound", [1, 60_000, 256 << 20])
def test_remote_samples_are_the_local_ones(remote, local, connections, bound):
    order = random.Random(connections).sample(list(range(10)) * 3, 30)
    with SampleFetcher(remote, connections=connections, read_ahead_bytes=bound) as fetcher:
        assert take_all(fetcher, order) == [local[index] for index in order]
    assert fetcher.counters.samples == 30


def test_local_samples_need_no_threads(small_dataset, local):
    before = threading.active_count()
    with SampleFetcher(open_dataset(small_dataset)) as fetcher:
        pending = [fetcher.request(index) for index in (3, 1, 3)]
        assert threading.active_count() == before
        assert [each.result() for each in pending] == [local[3], local[1], local[3]]


@pytest.mark.parametrize("bound", [1, 30_000, 100_000])
def test_samples_taken_backwards_by_many_threads(remote, local, bound):
    """Any order of taking ends, however small the bound is."""
    with SampleFetcher(remote, connections=4, read_ahead_bytes=bound) as fetcher, ThreadPoolExecutor(5) as pool:
        for _ in range(5):
            order = random.sample(range(10), 10)
            pending = [(index, fetcher.request(index)) for index in order]
            random.shuffle(pending)
            taken = list(pool.map(lambda each: (each[0], each[1].result()), pending))
            assert all(sample == local[index] for index, sample in taken)


def test_memory_stays_within_the_bound(remote):
    largest = max(size_of(remote, index) for index in range(10))
    bound = 3 * largest
    with SampleFetcher(remote, connections=8, read_ahead_bytes=bound) as fetcher:
        pending = [fetcher.request(index) for index in (0, 4, 8, 1, 5, 9, 2, 6, 3, 7) * 4]
        for each in pending:
            each.result()
        # The next sample comes even where the bound is taken by others that came with it: one sample over.
        assert largest < fetcher.most_bytes <= bound + largest
        pending = [fetcher.request(index) for index in range(10)]
        for each in pending:
            each.cancel()
        assert fetcher.request(0).result().record.key


def test_nothing_is_read_beyond_the_bound(remote, proxy):
    sizes = [size_of(remote, index) for index in range(10)]
    proxy.requests.clear()
    with SampleFetcher(remote, connections=8, read_ahead_bytes=sizes[0] + sizes[9]) as fetcher:
        pending = [fetcher.request(index) for index in (0, 9, 4, 5, 6)]
        pending[1].result()
        pending[0].result()
        for each in pending[2:]:
            each.result()
    assert fetcher.most_bytes <= sizes[0] + sizes[9] + max(sizes)


def test_neighbours_come_in_one_read(remote, proxy, local):
    first, last = (remote.index_of(remote.locate(0)[0]).span(place) for place in (0, 3))
    proxy.requests.clear()
    with SampleFetcher(remote, connections=1) as fetcher:
        held_up = threading.Event()
        proxy.decide = lambda request: held_up.wait(10) and None
        pending = [fetcher.request(index) for index in (9, 2, 0, 3, 1)]
        held_up.set()
        assert [each.result() for each in pending] == [local[index] for index in (9, 2, 0, 3, 1)]
    assert [(request.start, request.stop) for request in proxy.of("shard-000000.tar")] == [
        (first[0], last[0] + last[1])
    ]
    assert fetcher.counters.reads == 2


def test_an_index_is_read_once_and_ahead(small_dataset, upload, proxy):
    data = upload(small_dataset)
    reader = open_dataset(data.url, data.through_proxy)
    with SampleFetcher(reader, connections=8) as fetcher:
        take_all(fetcher, [0, 1, 2, 3] * 10)
        take_all(fetcher, [0, 1, 2, 3] * 10)
        assert len(proxy.of("shard-000000.index.npz")) == 1
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(reader.read, [8, 9] * 8))
        assert len(proxy.of("shard-000002.index.npz")) == 1


def test_closing_cancels_what_waits(remote, proxy, fault):
    proxy.decide = lambda request: fault("stall") if request.name.endswith(".tar") else None
    fetcher = SampleFetcher(remote, connections=1)
    pending = [fetcher.request(index) for index in (0, 4, 8)]
    while not proxy.of(".tar"):
        assert not proxy.closing.wait(0.01)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(pending[-1].result)
        fetcher.close()
        for cancelled in (waiting.result, pending[1].result):
            with pytest.raises(CancelledError):
                cancelled()
    with pytest.raises(RuntimeError, match="closed"):
        fetcher.request(0)


def test_errors_come_with_the_result(small_dataset, make_bucket, local):
    bucket = make_bucket()
    target = open_storage(bucket.url, options=bucket.options)
    for path in filter(Path.is_file, small_dataset.iterdir()):
        data = bytearray(path.read_bytes())
        if path.name == "shard-000001.tar":
            data[600] ^= 1
        if path.name != "shard-000002.index.npz":
            target.write(path.name, bytes(data))
    with SampleFetcher(ShardReader(target)) as fetcher:
        pending = [fetcher.request(index) for index in range(10)]
        for index in (0, 1, 2, 3, 5, 6, 7):
            assert pending[index].result() == local[index]
        with pytest.raises(ShardError, match=r"shard-000001.tar: .*bytes 512 to \d+ .*checksum.*asked 4 times"):
            pending[4].result()
        for index in (8, 9):
            with pytest.raises(StorageError, match=r"shard-000002.index.npz: does not exist"):
                pending[index].result()
        with pytest.raises(ManifestError, match="expected 0 to 9"):
            fetcher.request(10)


def test_damage_on_the_local_disk_is_an_error_at_once(small_dataset, tmp_path):
    for path in filter(Path.is_file, small_dataset.iterdir()):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    data = bytearray((tmp_path / "shard-000001.tar").read_bytes())
    data[600] ^= 1
    (tmp_path / "shard-000001.tar").write_bytes(data)
    with SampleFetcher(open_dataset(tmp_path)) as fetcher:
        with pytest.raises(ShardError, match=r"shard-000001.tar: .*bytes 512 to \d+ .*checksum") as error:
            fetcher.request(4).result()
        assert "asked" not in str(error.value)


@settings(max_examples=40, deadline=None)
@given(
    places=st.lists(st.integers(0, 19), min_size=1, max_size=40),
    sizes=st.lists(st.integers(1, 100), min_size=20, max_size=20),
    bound=st.integers(1, 400),
    readers=st.integers(1, 4),
    takers=st.integers(1, 4),
    merge=st.booleans(),
    drawn=st.randoms(use_true_random=False),
)
def test_every_wanted_sample_comes_within_the_bound(places, sizes, bound, readers, takers, merge, drawn):
    """Any order of taking and cancelling, by any number of threads."""
    queue = ReadQueue(bound, merge=merge)
    shards = [ShardInfo(name=f"s{n}.tar", samples=5, bytes=9999, sha256="0" * 64, first_index=5 * n) for n in range(4)]
    failing = drawn.choice([None, "s2.tar"])

    def measure(wanted):
        wanted.start, wanted.length = 2_000_000 * (wanted.place % 2) + wanted.place, sizes[wanted.place]
        wanted.cost = wanted.length

    def work():
        while (task := queue.next()) is not None:
            if isinstance(task, list):
                queue.finish(task, [each.place for each in task])
            elif task.name == failing:
                queue.fail(task, StorageError("gone"))
            else:
                queue.measure(task, measure)

    def take(wanted):
        if wanted.shard.name == failing:
            with pytest.raises(StorageError):
                queue.take(wanted)
        else:
            assert queue.take(wanted) == wanted.place

    threads = [threading.Thread(target=work) for _ in range(readers)]
    for thread in threads:
        thread.start()
    all_wanted = [Wanted(shards[place // 5], place) for place in places]
    for wanted in all_wanted:
        queue.add(wanted)
    drawn.shuffle(all_wanted)
    given_up = drawn.sample(all_wanted, len(all_wanted) // 4)
    for wanted in given_up:
        queue.cancel(wanted)
    with ThreadPoolExecutor(takers) as pool:
        list(pool.map(take, [wanted for wanted in all_wanted if wanted not in given_up]))
    # All is taken, so the next one finds all the room.
    last = Wanted(shards[0], 0)
    queue.add(last)
    take(last)
    queue.close()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert queue.most_bytes <= max(bound, max(sizes)) + max(sizes)
    assert queue.held_bytes == 0


@pytest.mark.parametrize("change", [{"sizes": -1, "offsets": -1}, {"offsets": 1 << 40}, {"offsets": -5}])
def test_an_index_that_points_nowhere_is_an_error(small_dataset, upload, tmp_path, change):
    for path in filter(Path.is_file, small_dataset.iterdir()):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    path = tmp_path / "shard-000001.index.npz"
    with np.load(path) as loaded:
        arrays = dict(loaded)
    for name, value in change.items():
        arrays[name][2] = value
    np.savez(path, **arrays)
    data = upload(tmp_path)
    with SampleFetcher(open_dataset(data.url, data.direct)) as fetcher:
        pending = [fetcher.request(index) for index in (4, 6, 0)]
        for each in pending[:2]:
            with pytest.raises(ShardError, match=r"shard-000001.index.npz: expected members within the shard's"):
                each.result()
        assert pending[2].result().record.key
