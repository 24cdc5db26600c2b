import fcntl
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avid_pipeline.errors import ConfigError, StorageError
from avid_pipeline.shards_spec.reader import open_dataset
from avid_pipeline.streams.cache import OWN_FOLDER, DiskCache
from avid_pipeline.streams.fetching import SampleFetcher
from tests.processes import wait_until

PIECE = 4096


def content(number, size=20 * PIECE + 77):
    return random.Random(number).randbytes(size)


class Source:
    """An object that counts what is fetched of it."""

    def __init__(self, data):
        self.data, self.fetched = data, []

    def fetch(self, start, length):
        self.fetched.append((start, length))
        return self.data[start : start + length]


def read(cache, source, start, length, name="fingerprint/shard.tar"):
    return cache.read(name, start, length, len(source.data), source.fetch)


def files(folder):
    return [path for path in folder.rglob("*") if path.is_file() and path.name != ".used-bytes"]


def total(folder):
    return sum(path.stat().st_size for path in files(folder))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 20 * PIECE + 76), st.integers(1, 5 * PIECE)), max_size=12))
def test_what_is_read_is_the_object(tmp_path_factory, wanted):
    folder = tmp_path_factory.mktemp("cache")
    source, cache = Source(content(0)), DiskCache(folder, 8 * PIECE, piece_bytes=PIECE)
    for start, length in wanted:
        length = min(length, len(source.data) - start)
        assert read(cache, source, start, length) == source.data[start : start + length]
        assert total(folder) <= 8 * PIECE


def test_neighbours_hit_and_missing_pieces_come_in_one_read(tmp_path):
    source, cache = Source(content(0)), DiskCache(tmp_path, 100 * PIECE, piece_bytes=PIECE)
    read(cache, source, PIECE + 10, 10)
    assert source.fetched == [(PIECE, PIECE)]
    read(cache, source, PIECE + 500, 20)
    assert len(source.fetched) == 1
    read(cache, source, 10, 5 * PIECE)
    assert source.fetched[1:] == [(0, PIECE), (2 * PIECE, 4 * PIECE)]
    read(cache, source, 20 * PIECE, 77)
    assert source.fetched[3:] == [(20 * PIECE, 77)]
    again = DiskCache(tmp_path, 100 * PIECE, piece_bytes=PIECE)
    read(again, source, 0, 6 * PIECE)
    assert (len(source.fetched), again.hits, again.misses) == (4, 6, 0)


def test_the_least_recently_used_goes_first(tmp_path):
    source, cache = Source(content(0)), DiskCache(tmp_path, 4 * PIECE, piece_bytes=PIECE)
    for piece in (0, 1, 2, 3):
        read(cache, source, piece * PIECE, 1)
        time.sleep(0.01)
    read(cache, source, 0, 1)
    read(cache, source, 9 * PIECE, 1)
    kept = {path.name for path in files(tmp_path)}
    assert f"shard.tar-0-{PIECE}" in kept
    assert f"shard.tar-{PIECE}-{2 * PIECE}" not in kept
    assert total(tmp_path) <= 4 * PIECE


def test_threads_fetch_a_piece_once(tmp_path):
    source, cache = Source(content(0)), DiskCache(tmp_path, 100 * PIECE, piece_bytes=PIECE)
    arrived = threading.Barrier(8, timeout=60)

    def slow(start, length):
        time.sleep(0.2)
        return source.fetch(start, length)

    def one(number):
        arrived.wait()
        return cache.read("x", PIECE + number, 10, len(source.data), slow)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(one, range(8)))
    assert found == [source.data[PIECE + number : PIECE + number + 10] for number in range(8)]
    assert source.fetched == [(PIECE, PIECE)]


def test_an_error_reaches_all_who_wait_and_is_not_kept(tmp_path):
    source, cache = Source(content(0)), DiskCache(tmp_path, 100 * PIECE, piece_bytes=PIECE)

    def broken(start, length):
        time.sleep(0.1)
        raise StorageError("the network is down")

    def one(_):
        with pytest.raises(StorageError, match="down"):
            cache.read("x", 0, 10, len(source.data), broken)
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(one, range(4)))
    assert read(cache, source, 0, 10, "x") == source.data[:10]


def test_a_file_of_the_wrong_size_is_replaced(tmp_path):
    source, cache = Source(content(0)), DiskCache(tmp_path, 100 * PIECE, piece_bytes=PIECE)
    read(cache, source, 0, 10)
    (path,) = files(tmp_path)
    path.write_bytes(source.data[:100])
    assert read(cache, source, 50, 10) == source.data[50:60]
    assert path.read_bytes() == source.data[:PIECE]


def test_dropped_pieces_are_fetched_again_and_free_their_room(tmp_path):
    source, cache = Source(content(0)), DiskCache(tmp_path, 3 * PIECE, piece_bytes=PIECE)
    for _ in range(10):
        read(cache, source, 0, 2 * PIECE)
        cache.drop("fingerprint/shard.tar", 0, 2 * PIECE, len(source.data))
    assert len(source.fetched) == 10
    assert files(tmp_path) == []
    assert cache.read("x", 0, 3 * PIECE, len(source.data), source.fetch) == source.data[: 3 * PIECE]
    assert total(tmp_path) == 3 * PIECE


def _hammer(folder, seed, bound, seconds):
    """Read at random for some time, in a process of its own."""
    drawn = random.Random(seed)
    sources = [Source(content(number)) for number in range(3)]
    cache = DiskCache(folder, bound, piece_bytes=PIECE)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        number, start = drawn.randrange(3), drawn.randrange(19 * PIECE)
        data = read(cache, sources[number], start, 2 * PIECE, f"f/{number}")
        assert data == sources[number].data[start : start + 2 * PIECE]
    assert cache.failed_writes == 0


def test_processes_share_a_folder_and_its_bound(tmp_path):
    bound = 10 * PIECE
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_hammer, args=(tmp_path, seed, bound, 2.0), daemon=True) for seed in range(4)]
    for worker in workers:
        worker.start()
    most = 0
    wait_until((tmp_path / OWN_FOLDER / ".used-bytes").exists)
    while any(worker.is_alive() for worker in workers):
        most = max(most, _total_now(tmp_path))
        time.sleep(0.002)
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert 0 < most <= bound
    # Nobody was killed, so the count is exact.
    assert DiskCache(tmp_path, bound, piece_bytes=PIECE)._space.used_bytes() == total(tmp_path)


def _total_now(folder):
    """What files hold, those that are being written too, while nobody can change it."""
    with (folder / OWN_FOLDER / ".used-bytes").open("r+b") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return total(folder)


@pytest.mark.parametrize("round_number", range(3))
def test_kill_9_leaves_a_cache_that_works(tmp_path, round_number):
    bound = 10 * PIECE
    context = multiprocessing.get_context("fork")
    for seed in range(4):
        worker = context.Process(target=_hammer, args=(tmp_path, seed, bound, 60.0), daemon=True)
        worker.start()
        wait_until((tmp_path / OWN_FOLDER / "f").exists)
        time.sleep(0.1 + 0.05 * random.random())
        os.kill(worker.pid, signal.SIGKILL)
        worker.join(60)
        assert worker.exitcode == -signal.SIGKILL
    abandoned = tmp_path / OWN_FOLDER / "f" / ".writing-4096-0123456789abcdef"
    abandoned.write_bytes(b"half a piece")
    _hammer(tmp_path, 99, bound, 0.3)
    assert not abandoned.exists()
    assert all(not path.name.startswith(".writing") for path in files(tmp_path))
    assert total(tmp_path) <= bound
    assert DiskCache(tmp_path, bound, piece_bytes=PIECE)._space.used_bytes() == total(tmp_path)


def test_a_file_that_is_being_written_is_left_alone(tmp_path):
    (tmp_path / OWN_FOLDER / "f").mkdir(parents=True)
    with (tmp_path / OWN_FOLDER / "f" / ".writing-4096-0123456789abcdef").open("xb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        cache = DiskCache(tmp_path, 2 * PIECE, piece_bytes=PIECE)
        assert Path(file.name).exists()
        # And what it will have counts.
        source = Source(content(0))
        read(cache, source, 0, 2 * PIECE)
        assert len(files(tmp_path)) == 2
    DiskCache(tmp_path, 2 * PIECE, piece_bytes=PIECE)
    assert len(files(tmp_path)) == 1


FULL_DISK = """
import json, logging, resource, signal, sys
from avid_pipeline.streams.cache import DiskCache
logging.basicConfig(format="%(message)s")
cache = DiskCache(sys.argv[1], 1 << 20, piece_bytes=4096)
data = bytes(range(256)) * 400
fetch = lambda start, length: data[start : start + length]
kept = cache.read("kept", 0, 100, len(data), fetch)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
good = [cache.read(str(n), 5000, 9000, len(data), fetch) == data[5000:14000] for n in range(5)]
hits = cache.hits
again = cache.read("kept", 0, 100, len(data), fetch) == data[:100]
print(json.dumps([good, cache.failed_writes, again, cache.hits - hits]))
"""


def test_a_full_disk_is_one_warning_and_no_cache(tmp_path):
    """The kernel refuses every write beyond a limit, as a full disk does."""
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, tmp_path], capture_output=True, text=True, check=True, timeout=60
    )
    good, failed, again, hits = json.loads(done.stdout)
    assert good == [True] * 5
    assert failed >= 1
    assert (again, hits) == (True, 1)
    assert len(done.stderr.strip().splitlines()) == 1
    assert str(tmp_path) in done.stderr
    assert "the cache keeps nothing more" in done.stderr
    assert [path.name for path in files(tmp_path)] == ["kept-0-4096"]


def test_a_cache_that_cannot_be(tmp_path):
    with pytest.raises(ConfigError, match="cache_bytes: expected at least one piece"):
        DiskCache(tmp_path, 1000)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match=r"file.*: cannot be the cache folder"):
        DiskCache(tmp_path / "file", 1 << 30)


def test_a_damaged_cache_changes_no_sample(small_dataset, upload, proxy, tmp_path):
    local = open_dataset(small_dataset)
    expected = [local.read(index) for index in range(10)]
    data = upload(small_dataset)
    for _ in range(2):
        cache = DiskCache(tmp_path, 8 << 20, piece_bytes=64 << 10)
        with SampleFetcher(open_dataset(data.url, data.through_proxy), cache=cache) as fetcher:
            pending = [fetcher.request(index) for index in range(10)]
            assert [each.result() for each in pending] == expected
    # The second time all came from the cache.
    assert (fetcher.counters.reads, cache.misses) == (0, 0)
    victims = random.Random(0).sample(sorted(files(tmp_path)), 3)
    for path in victims:
        damaged = bytearray(path.read_bytes())
        damaged[len(damaged) // 2] ^= 1
        path.write_bytes(damaged)
    for damaged_samples in (True, False):
        with SampleFetcher(open_dataset(data.url, data.through_proxy), cache=cache) as fetcher:
            assert [fetcher.request(index).result() for index in range(10)] == expected
        assert (fetcher.counters.damaged > 0) is damaged_samples


def test_a_cache_may_stand_before_a_local_root(small_dataset, tmp_path):
    reader = open_dataset(small_dataset)
    cache = DiskCache(tmp_path, 8 << 20)
    for _ in range(2):
        with SampleFetcher(reader, cache=cache) as fetcher:
            assert fetcher.request(3).result() == reader.read(3)
    assert fetcher.counters.reads == 0


def test_files_of_others_in_the_folder_stay(tmp_path):
    thesis = tmp_path / "thesis" / "thesis.tex"
    thesis.parent.mkdir()
    thesis.write_bytes(bytes(5_000_000))
    (tmp_path / "photo-0-5000000").write_bytes(bytes(5_000_000))
    cache = DiskCache(tmp_path, 8_000_000)
    for number in range(4):
        cache.read(f"a{number}", 0, 4_000_000, 4_000_000, lambda first, size: bytes(size))
    assert thesis.stat().st_size == (tmp_path / "photo-0-5000000").stat().st_size == 5_000_000
    own = [path for path in (tmp_path / OWN_FOLDER).rglob("a*") if path.is_file()]
    assert 1 <= len(own) <= 2
