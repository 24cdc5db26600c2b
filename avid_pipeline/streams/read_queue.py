"""Which read comes next: in the order of the requests, neighbours together, within a bound of memory."""

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from avid_pipeline.shards_spec.manifest import ShardInfo
from avid_pipeline.shards_spec.sample import Sample
from avid_pipeline.shards_spec.shard_file import ShardIndex

_LARGEST_GAP = 1 << 20
_LARGEST_READ = 8 << 20


class Wanted:
    """A sample that somebody wants.

    Attributes:
        shard: that holds it.
        place: in the shard.
        index: of the shard; None until it is here.
        start: first byte; -1 until the index is here.
        length: number of bytes.
        cost: bytes that reading it takes, at least ``length``.
        reading: bytes that count while a read runs; the first of a group stands for all.
        held: bytes that count since it was read and until it is taken.
        awaited: somebody waits for it: once it is read, its bytes are theirs.
        sample: what becomes of it.
    """

    __slots__ = ("awaited", "cost", "held", "index", "length", "place", "reading", "sample", "shard", "start")

    def __init__(self, shard: ShardInfo, place: int) -> None:
        self.shard, self.place = shard, place
        self.index: ShardIndex | None = None
        self.start = -1
        self.length = self.cost = 0
        self.reading = self.held = 0
        self.awaited = False
        self.sample: Future[Sample] = Future()


class ReadQueue:
    """Hands reads to threads.

    Reads start in the order of the requests, save that those that somebody already waits for come first. One starts
    when its bytes fit the bound beside those that are being read or wait to be taken. It also starts when it is
    waited for and no other read runs: whoever takes samples in whatever order, the next one comes, and the bound is
    exceeded by at most that one (beside one that alone is larger than the bound).

    Args:
        bound: bytes.
        merge: whether neighbours that wait come in one read.
    """

    def __init__(self, bound: int, *, merge: bool) -> None:
        self._bound, self._merge = bound, merge
        self._waiting: OrderedDict[Wanted, None] = OrderedDict()
        self._of_shard: dict[str, dict[Wanted, None]] = {}
        self._urgent: deque[Wanted] = deque()
        self._unread_indices: deque[ShardInfo] = deque()
        self._coming_indices: set[str] = set()
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._used = self._running = self.most_bytes = 0
        self._closed = False

    @property
    def held_bytes(self) -> int:
        """Bytes that are being read or wait to be taken."""
        return self._used

    def add(self, wanted: Wanted) -> None:
        """Put a request at the end; where it has no place in the file yet, its shard's index is read ahead of it.

        Raises:
            RuntimeError: the queue is closed.
        """
        with self._lock:
            if self._closed:
                raise RuntimeError("this SampleFetcher is closed")
            name = wanted.shard.name
            self._waiting[wanted] = None
            self._of_shard.setdefault(name, {})[wanted] = None
            if wanted.start < 0 and name not in self._coming_indices:
                self._coming_indices.add(name)
                self._unread_indices.append(wanted.shard)
            self._changed.notify()

    def next(self) -> ShardInfo | list[Wanted] | None:
        """What to do next, when it may be done: read a shard's index, or samples; None when the queue is closed."""
        with self._lock:
            while not self._closed:
                if self._unread_indices:
                    self._changed.notify()
                    return self._unread_indices.popleft()
                group = self._next_group()
                if group:
                    if self._waiting:
                        self._changed.notify()
                    return group
                self._changed.wait()
            return None

    def measure(self, shard: ShardInfo, measure: Callable[[Wanted], None]) -> None:
        """The index of a shard is here: tell every request where it lies."""
        with self._lock:
            self._coming_indices.discard(shard.name)
            for wanted in self._of_shard.get(shard.name, ()):
                measure(wanted)
            self._changed.notify()

    def fail(self, shard: ShardInfo, error: BaseException) -> None:
        """The index of a shard cannot be read: neither can its samples."""
        with self._lock:
            self._coming_indices.discard(shard.name)
            failed = list(self._of_shard.get(shard.name, ()))
            for wanted in failed:
                self._forget(wanted)
            self._changed.notify()
        for wanted in failed:
            if wanted.sample.set_running_or_notify_cancel():
                wanted.sample.set_exception(error)

    def finish(self, group: Sequence[Wanted], results: Sequence[Sample | BaseException]) -> None:
        """A read ended, with a sample or an error for each of the group."""
        with self._lock:
            self._running -= 1
            for wanted, result in zip(group, results, strict=True):
                self._used -= wanted.reading
                failed = isinstance(result, BaseException)
                gone = failed or wanted.awaited or wanted.sample.cancelled() or self._closed
                wanted.reading, wanted.held = 0, 0 if gone else wanted.length
                self._used += wanted.held
            self._changed.notify()
        for wanted, result in zip(group, results, strict=True):
            if not wanted.sample.set_running_or_notify_cancel():
                continue
            if isinstance(result, BaseException):
                wanted.sample.set_exception(result)
            else:
                wanted.sample.set_result(result)

    def take(self, wanted: Wanted) -> Sample:
        """Wait for a sample; its bytes count no more."""
        if not wanted.sample.done():
            with self._lock:
                wanted.awaited = True
                if wanted in self._waiting:
                    self._urgent.append(wanted)
                    self._changed.notify()
        try:
            return wanted.sample.result()
        finally:
            self._let_go(wanted)

    def cancel(self, wanted: Wanted) -> None:
        """A sample is not wanted any more."""
        wanted.sample.cancel()
        with self._lock:
            if wanted in self._waiting:
                self._forget(wanted)
        self._let_go(wanted)

    def close(self) -> None:
        """Cancel what waits, and end the threads that ask for more."""
        with self._lock:
            self._closed = True
            waiting = list(self._waiting)
            self._waiting.clear()
            self._of_shard.clear()
            self._urgent.clear()
            self._unread_indices.clear()
            self._changed.notify_all()
        for wanted in waiting:
            wanted.sample.cancel()

    def _let_go(self, wanted: Wanted) -> None:
        if not wanted.sample.done():
            return
        with self._lock:
            if wanted.held:
                self._used -= wanted.held
                wanted.held = 0
            if self._waiting:
                self._changed.notify()

    def _next_group(self) -> list[Wanted]:
        """The request whose turn it is, with its neighbours, if there is room for it."""
        while self._urgent and self._urgent[0] not in self._waiting:
            self._urgent.popleft()
        if not self._waiting:
            return []
        urgent = bool(self._urgent)
        first = self._urgent[0] if urgent else next(iter(self._waiting))
        if first.start < 0:
            return []
        fits = self._used + first.cost <= self._bound or self._used == 0
        if not fits and not (urgent and self._running == 0):
            return []
        group, span = self._with_neighbours(first) if self._merge else ([first], first.cost)
        for wanted in group:
            self._forget(wanted)
        # With the gaps between them, as long as the read runs.
        first.reading = span
        self._used += span
        self._running += 1
        self.most_bytes = max(self.most_bytes, self._used)
        return group

    def _with_neighbours(self, first: Wanted) -> tuple[list[Wanted], int]:
        """``first`` and those that lie close to it on both sides, and the bytes that they take together."""
        line = sorted(
            (wanted for wanted in self._of_shard[first.shard.name] if wanted.start >= 0),
            key=lambda wanted: wanted.start,
        )
        most = min(_LARGEST_READ, self._bound - self._used)
        start, stop, total = first.start, first.start + first.length, first.length
        group = [first]
        at = line.index(first)
        for wanted in [*line[at + 1 :], *reversed(line[:at])]:
            gap = max(wanted.start - stop, start - wanted.start - wanted.length)
            wider = min(start, wanted.start), max(stop, wanted.start + wanted.length)
            # The same sample may be wanted twice: then they take more together than the bytes they lie in.
            if gap <= _LARGEST_GAP and max(wider[1] - wider[0], total + wanted.length) <= most:
                start, stop = wider
                total += wanted.length
                group.append(wanted)
        return group, max(stop - start, total)

    def _forget(self, wanted: Wanted) -> None:
        self._waiting.pop(wanted, None)
        of_shard = self._of_shard.get(wanted.shard.name)
        if of_shard is not None:
            of_shard.pop(wanted, None)
            if not of_shard:
                del self._of_shard[wanted.shard.name]
