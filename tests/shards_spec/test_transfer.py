import random
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from avid_pipeline.shards_spec.errors import StorageError
from avid_pipeline.shards_spec.load_once import LoadOnce
from avid_pipeline.shards_spec.storage import open_storage
from avid_pipeline.shards_spec.transfer import BrokenTransferError, ObjectChangedError, RetryPolicy, stream

DATA = random.Random(0).randbytes(200_000)
QUICK = RetryPolicy(attempts=3, first_wait=0.001, longest_wait=0.01, read_timeout=1.0, least_bytes=100)


@dataclass
class Script:
    """What a server sends: the object, and for each answer after how many bytes the connection ends."""

    data: bytes = DATA
    tag: str | None = '"one"'
    cuts: list[int] = field(default_factory=list)
    seen: list[tuple[str | None, str | None]] = field(default_factory=list)
    after: dict[int, tuple[bytes, str | None]] = field(default_factory=dict)
    slow: float = 0.0


@pytest.fixture(scope="module")
def server():
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments):
            pass

        def do_GET(self):
            script = self.server.script
            number = len(script.seen)
            script.seen.append((self.headers.get("Range"), self.headers.get("If-Match")))
            if number in script.after:
                script.data, script.tag = script.after[number]
            size = len(script.data)
            wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            start, stop = (int(wanted[1]), int(wanted[2] or size - 1) + 1) if wanted else (0, size)
            body = script.data[start:stop]
            self.send_response(206 if wanted else 200)
            if wanted:
                self.send_header("Content-Range", f"bytes {start}-{start + len(body) - 1}/{size}")
            if script.tag:
                self.send_header("ETag", script.tag)
            self.send_header("Last-Modified", "Mon, 01 Jan 2024 00:00:00 GMT")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            cut = script.cuts[number] if number < len(script.cuts) else len(body)
            try:
                for place in range(0, min(cut, len(body)), 1 << 16):
                    self.wfile.write(body[place : min(place + (1 << 16), cut)])
                    time.sleep(script.slow)
            except ConnectionError:
                cut = -1
            self.close_connection = cut < len(body)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as made:
        made.daemon_threads = True
        thread = threading.Thread(target=made.serve_forever, args=(0.05,))
        thread.start()
        yield made
        made.shutdown()
        thread.join(60)


@pytest.fixture
def play(server):
    """Set a script and open the server as a web root."""

    def play(script, policy=QUICK):
        server.script = script
        return open_storage(f"http://127.0.0.1:{server.server_port}", retry=policy)

    return play


def read(storage, start=0, stop=None, policy=QUICK, given_up=None):
    return b"".join(stream(storage.content_store, "name", start, stop, policy, given_up))


def test_a_transfer_goes_on_at_the_byte_reached_of_the_same_object(play):
    script = Script(cuts=[70_000, 30_000])
    assert read(play(script)) == DATA
    assert script.seen == [
        (None, None),
        ("bytes=70000-199999", '"one"'),
        ("bytes=100000-199999", '"one"'),
    ]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cuts=st.lists(st.integers(100, 50_000), max_size=6),
    start=st.integers(0, len(DATA) - 1),
    length=st.none() | st.integers(0, len(DATA)),
)
def test_any_range_over_any_breaks(play, cuts, start, length):
    stop = None if length is None else min(len(DATA), start + length)
    assert read(play(Script(cuts=cuts)), start, stop) == DATA[start:stop]


def test_pieces_are_joined_to_some_megabytes(play):
    data = random.Random(1).randbytes(20 << 20)
    pieces = list(stream(play(Script(data=data)).content_store, "name", 0, None, QUICK))
    assert b"".join(pieces) == data
    assert len(pieces) == 3
    assert all(8 << 20 <= len(piece) < 10 << 20 for piece in pieces[:-1])


def test_an_empty_object(play):
    assert read(play(Script(data=b""))) == b""


@pytest.mark.parametrize("tags", [('"one"', '"two"'), ('W/"one"', 'W/"two"'), (None, '"two"')])
def test_another_object_under_the_name_is_an_error(play, tags):
    script = Script(tag=tags[0], cuts=[1000], after={1: (DATA[::-1], tags[1])})
    with pytest.raises(BrokenTransferError, match="was replaced") as error:
        read(play(script))
    assert error.value.reached == 1000
    assert isinstance(error.value.cause, ObjectChangedError)
    assert len(script.seen) == 2


def test_another_size_under_the_name_is_an_error(play):
    script = Script(tag=None, cuts=[1000], after={1: (DATA[:-1], None)})
    with pytest.raises(BrokenTransferError, match="was replaced"):
        read(play(script), 0, 100_000)


def test_weak_tags_are_not_sent(play):
    script = Script(tag='W/"one"', cuts=[1000])
    assert read(play(script)) == DATA
    assert script.seen[1] == ("bytes=1000-199999", None)


def test_an_object_that_ends_too_soon(play):
    with pytest.raises(BrokenTransferError, match="ends there") as error:
        read(play(Script()), 150_000, 250_000)
    assert (error.value.reached, error.value.cause) == (200_000, None)
    with pytest.raises(StorageError, match=r"name: cannot read from byte 200,000 on: the object is truncated"):
        play(Script()).read_range("name", 150_000, 100_000)


def test_only_attempts_that_bring_little_count(play):
    script = Script(cuts=[100, 99, 99, 100, 99, 99, 100, 50, 50])
    assert read(play(script)) == DATA
    script = Script(cuts=[100, 99, 99, 99])
    with pytest.raises(BrokenTransferError) as error:
        read(play(script))
    assert (error.value.reached, error.value.attempts) == (397, 3)


class Waits(threading.Event):
    """Notes how long it would have been waited for."""

    def __init__(self):
        super().__init__()
        self.seconds = []

    def wait(self, timeout=None):
        self.seconds.append(timeout)
        return False


def test_waits_double_up_to_the_longest(play):
    policy = RetryPolicy(attempts=8, first_wait=1.0, longest_wait=20.0, read_timeout=1.0)
    waits = Waits()
    with pytest.raises(BrokenTransferError):
        read(play(Script(cuts=[0] * 8)), policy=policy, given_up=waits)
    assert len(waits.seconds) == 7
    for seconds, longest in zip(waits.seconds, [1, 2, 4, 8, 16, 20, 20], strict=True):
        assert longest / 2 <= seconds <= longest
    assert len({seconds % 1 for seconds in waits.seconds}) > 1


def test_who_gave_up_tries_no_more(play):
    script, given_up = Script(cuts=[0] * 9), threading.Event()
    given_up.set()
    with pytest.raises(BrokenTransferError):
        read(play(script), policy=RetryPolicy(), given_up=given_up)
    assert len(script.seen) == 1


def test_a_slow_reader_is_no_slow_connection(play):
    data = random.Random(1).randbytes(20 << 20)
    policy = RetryPolicy(attempts=1, read_timeout=1.0, least_bytes=1 << 19)
    got = []
    for piece in stream(play(Script(data=data)).content_store, "name", 0, None, policy):
        got.append(piece)
        time.sleep(1.2)
    assert b"".join(got) == data


def test_a_slow_connection_is_given_up(play):
    policy = RetryPolicy(attempts=1, read_timeout=0.5, least_bytes=1 << 19)
    with pytest.raises(BrokenTransferError, match=r"only \d+ bytes came in \d\.\d seconds") as error:
        read(play(Script(data=DATA * 10, slow=0.2)), policy=policy)
    assert 1 << 16 <= error.value.reached < 1 << 19


def test_no_server_at_all():
    storage = open_storage("http://127.0.0.1:9", retry=QUICK)
    with pytest.raises(StorageError, match=r"name: cannot read from byte 0 on: .*\(3 attempts in a row failed\)"):
        storage.read("name")


def test_values_are_loaded_once_and_the_last_used_kept():
    loaded = []
    started = threading.Barrier(5, timeout=60)

    def load(key):
        loaded.append(key)
        time.sleep(0.1)
        return key * 2

    cache = LoadOnce(load, 2)

    def want():
        started.wait()
        assert cache("a") == "aa"

    threads = [threading.Thread(target=want) for _ in range(4)]
    for thread in threads:
        thread.start()
    started.wait()
    for thread in threads:
        thread.join(60)
    assert loaded == ["a"]
    assert (cache.ready("a"), cache.ready("b")) == ("aa", None)
    for key in ("b", "a", "c", "a", "b"):
        assert cache(key) == key * 2
    assert loaded == ["a", "b", "c", "b"]


def test_what_could_not_be_loaded_is_tried_again():
    answers = [StorageError("down"), StorageError("down"), 7]

    def load(key):
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    cache = LoadOnce(load, 2)
    for _ in range(2):
        with pytest.raises(StorageError, match="down"):
            cache("a")
    assert cache.ready("a") is None
    assert cache("a") == 7
