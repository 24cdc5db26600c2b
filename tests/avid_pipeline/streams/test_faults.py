"""Broken networks do not change what is read: samples are the local ones, or there is one clear error."""

import random
import time

import pytest

from avid_pipeline.errors import ShardError, StorageError
from avid_pipeline.shards_spec.reader import ShardReader, open_dataset
from avid_pipeline.shards_spec.storage import open_storage
from avid_pipeline.shards_spec.transfer import RetryPolicy
from avid_pipeline.streams.cache import DiskCache
from avid_pipeline.streams.fetching import SampleFetcher

QUICK = RetryPolicy(attempts=4, first_wait=0.01, longest_wait=0.05, read_timeout=1.0, least_bytes=1000, requests=5)
SHARD = "shard-000001.tar"


@pytest.fixture
def local(small_dataset):
    reader = open_dataset(small_dataset)
    return [reader.read(index) for index in range(len(reader))]


@pytest.fixture
def remote(small_dataset, upload, proxy):
    data = upload(small_dataset)
    reader = ShardReader(open_storage(data.url, options=data.through_proxy, retry=QUICK))
    proxy.requests.clear()
    return reader


def span(reader, index):
    shard, place = reader.locate(index)
    return reader.index_of(shard).span(place)


def ranges(proxy):
    return [(request.start, request.stop) for request in proxy.of(".tar")]


@pytest.mark.parametrize("kind", ["drop", "stall", "shorten"])
def test_reading_goes_on_at_the_byte_reached(remote, proxy, local, faults, fault, kind):
    start, length = span(remote, 5)
    proxy.decide = faults(SHARD, fault(kind, 5000), fault(kind, 3000), fault(kind, 1))
    with SampleFetcher(remote) as fetcher:
        assert fetcher.request(5).result() == local[5]
    stop = start + length
    assert ranges(proxy) == [(start, stop), (start + 5000, stop), (start + 8000, stop), (start + 8001, stop)]


def test_a_connection_that_drips_is_given_up(remote, proxy, local, faults, fault):
    """A byte now and then keeps the silence short, but it is no transfer."""
    start, length = span(remote, 5)
    proxy.decide = faults(SHARD, fault("drip", 10_000))
    assert remote.read(5) == local[5]
    first, second = ranges(proxy)
    assert first == (start, start + length)
    assert start < second[0] < start + 1000
    assert second[1] == start + length


@pytest.mark.parametrize("status", [500, 503, 429])
def test_servers_may_refuse_for_a_while(remote, proxy, local, faults, fault, status):
    proxy.decide = faults(SHARD, *[fault("status", status=status)] * 3)
    with SampleFetcher(remote) as fetcher:
        assert fetcher.request(5).result() == local[5]
    assert len(set(ranges(proxy))) == 1
    assert len(ranges(proxy)) == 4


@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_some_refusals_are_final(remote, proxy, fault, status):
    proxy.decide = lambda request: fault("status", status=status) if request.name.endswith(SHARD) else None
    with SampleFetcher(remote) as fetcher, pytest.raises(StorageError, match=SHARD):
        fetcher.request(5).result()
    assert len(ranges(proxy)) == 1


@pytest.mark.parametrize(
    ("kind", "cause"),
    [("drop", "body error"), ("stall", "body error"), ("shorten", "truncated|ends"), ("status", "503")],
)
def test_the_last_error_names_shard_byte_and_cause(remote, proxy, fault, kind, cause):
    start, _ = span(remote, 5)
    proxy.decide = lambda request: fault(kind, 100) if request.name.endswith(SHARD) else None
    began = time.monotonic()
    with SampleFetcher(remote) as fetcher, pytest.raises(StorageError) as error:
        fetcher.request(5).result()
    reached = start + (0 if kind == "status" else 100 * QUICK.attempts)
    assert f"{SHARD}: cannot read from byte {reached:,} on: " in str(error.value)
    assert "4 attempts in a row failed" in str(error.value)
    assert "\n" not in str(error.value)
    assert len(ranges(proxy)) == QUICK.attempts
    assert time.monotonic() - began < 60


def test_progress_begins_the_count_anew(remote, proxy, local, fault):
    """More drops than attempts, each after some kilobytes."""
    _, length = span(remote, 5)
    proxy.decide = lambda request: fault("drop", 4000) if request.name.endswith(SHARD) else None
    assert length > 4000 * 2 * QUICK.attempts
    assert remote.read(5) == local[5]
    assert len(ranges(proxy)) == -(-length // 4000)


def test_flipped_bytes_are_fetched_again(remote, proxy, local, faults, fault):
    proxy.decide = faults(SHARD, *[fault("flip", 2000)] * 3)
    with SampleFetcher(remote) as fetcher:
        assert fetcher.request(5).result() == local[5]
        assert fetcher.counters.damaged == 1
    assert len(ranges(proxy)) == 4


def test_a_flip_in_a_read_of_neighbours_hurts_one(remote, proxy, local, faults, fault):
    first, last = span(remote, 4), span(remote, 7)
    proxy.decide = faults(SHARD, fault("flip", span(remote, 6)[0] + 50 - first[0]))
    with SampleFetcher(remote, connections=1) as fetcher:
        # The first request keeps the only connection busy until the others wait together.
        pending = [fetcher.request(index) for index in (0, 4, 5, 6, 7)]
        assert [each.result() for each in pending] == [local[index] for index in (0, 4, 5, 6, 7)]
        assert fetcher.counters.damaged == 1
    tar = [(request.start, request.stop) for request in proxy.of(SHARD)]
    assert tar == [(first[0], sum(last)), (span(remote, 6)[0], sum(span(remote, 6)))]


def test_bytes_that_stay_wrong_are_one_error(remote, proxy, fault):
    start, _ = span(remote, 5)
    proxy.decide = lambda request: fault("flip", 2000) if request.name.endswith(SHARD) else None
    with SampleFetcher(remote) as fetcher, pytest.raises(ShardError) as error:
        fetcher.request(5).result()
    assert f"{SHARD}: " in str(error.value)
    assert f"bytes {start} to " in str(error.value)
    assert "checksum of the index" in str(error.value)


@pytest.mark.parametrize("kind", ["flip", "shorten", "drop", "stall"])
def test_a_broken_transfer_of_an_index(remote, proxy, local, faults, fault, kind):
    proxy.decide = faults("shard-000001.index.npz", fault(kind, 300), fault(kind, 200))
    with SampleFetcher(remote) as fetcher:
        assert fetcher.request(5).result() == local[5]
    assert len(proxy.of("shard-000001.index.npz")) == 3


def test_an_object_that_changes_on_the_way_is_an_error(remote, proxy, fault, small_dataset, s3_endpoint):
    data = (small_dataset / SHARD).read_bytes()
    direct = open_storage(
        remote.storage.url,
        options={
            "aws_endpoint": s3_endpoint,
            "aws_region": "us-east-1",
            "aws_access_key_id": "anyone",
            "aws_secret_access_key": "anything",
        },
    )
    span(remote, 5)

    def change(request):
        if request.earlier == 1:
            direct.write(SHARD, data[::-1])
        return fault("drop", 5000) if request.earlier == 0 else None

    proxy.decide = change
    with SampleFetcher(remote) as fetcher, pytest.raises(StorageError, match=rf"{SHARD}: .*byte 5.*was replaced"):
        fetcher.request(4).result()


def test_a_shard_shorter_than_its_index_says(remote, small_dataset, upload, tmp_path):
    for path in small_dataset.iterdir():
        if path.is_file():
            data = path.read_bytes()
            (tmp_path / path.name).write_bytes(data[:60_000] if path.name == SHARD else data)
    data = upload(tmp_path)
    reader = ShardReader(open_storage(data.url, options=data.direct, retry=QUICK))
    with SampleFetcher(reader) as fetcher, pytest.raises(StorageError, match=r"byte 60,000 on: .*truncated"):
        fetcher.request(5).result()


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_a_bad_network_changes_nothing(small_dataset, upload, proxy, local, fault, tmp_path, cached, seed):
    """Every third answer is broken in a random way; the samples of several epochs are the local ones."""
    data = upload(small_dataset)
    drawn = random.Random(seed)
    kinds = ["drop", "drop", "stall", "flip", "shorten", "drip", "status"]

    def decide(request):
        return fault(drawn.choice(kinds), drawn.randrange(9000)) if drawn.random() < 0.3 else None

    storage = open_storage(
        data.url,
        options=data.through_proxy,
        retry=RetryPolicy(
            attempts=12, first_wait=0.01, longest_wait=0.05, read_timeout=0.3, least_bytes=1000, requests=5
        ),
    )
    reader = ShardReader(storage)
    proxy.decide = decide
    cache = DiskCache(tmp_path, 1 << 20, piece_bytes=32 << 10) if cached else None
    with SampleFetcher(reader, connections=4, read_ahead_bytes=200_000, cache=cache) as fetcher:
        for _ in range(3):
            order = drawn.sample(range(10), 10)
            pending = [fetcher.request(index) for index in order]
            assert [each.result() for each in pending] == [local[index] for index in order]
