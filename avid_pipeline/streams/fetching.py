"""Encoded samples ahead of need: threads read from the store what a loader asked for, within a bound of memory."""

import threading
import time
from concurrent.futures import CancelledError
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

from avid_pipeline.errors import ShardError
from avid_pipeline.shards_spec.manifest import ShardInfo
from avid_pipeline.shards_spec.reader import ShardReader
from avid_pipeline.shards_spec.sample import Sample
from avid_pipeline.shards_spec.shard_file import ShardIndex
from avid_pipeline.streams.cache import DiskCache
from avid_pipeline.streams.read_queue import ReadQueue, Wanted

_CLOSING_SECONDS = 2.0


class PendingSample(Protocol):
    """A sample that was asked for. Call one of its methods once: until then its bytes count as held."""

    def result(self) -> Sample:
        """The sample, when it is here.

        Raises:
            ShardError: its bytes are damaged.
            StorageError: they cannot be read.
            SampleError: its record is not valid.
            CancelledError: the fetcher was closed.
        """

    def cancel(self) -> None:
        """It is not wanted any more."""


@dataclass
class FetchCounters:
    """What a fetcher did.

    Attributes:
        samples: read and checked.
        reads: ranged reads of shards, with the cache's.
        bytes_read: by them.
        damaged: samples whose checksum was wrong at first, and that were fetched again.
    """

    samples: int = 0
    reads: int = 0
    bytes_read: int = 0
    damaged: int = 0


class SampleFetcher:
    """Reads samples in the order in which they are asked for, in threads, with bounded memory.

    Neighbouring samples that wait at the same time come in one ranged read. Local files are read where their result
    is asked for, unless there is a cache.

    Args:
        reader: the data set.
        connections: how many reads run at the same time.
        read_ahead_bytes: bound of the bytes that are being read or were read and not taken; a sample that is waited
            for is read even where it alone is larger.
        cache: pieces of shards on the local disk.
    """

    def __init__(
        self,
        reader: ShardReader,
        *,
        connections: int = 8,
        read_ahead_bytes: int = 256 << 20,
        cache: DiskCache | None = None,
    ) -> None:
        self._reader, self._connections, self._cache = reader, connections, cache
        self._direct = reader.storage.local_root is not None and cache is None
        self._prefix = "" if cache is None else reader.manifest.fingerprint().removeprefix("sha256:")[:32]
        self._queue = ReadQueue(read_ahead_bytes, merge=cache is None)
        self._closed = threading.Event()
        self._threads: list[threading.Thread] = []
        self._counting = threading.Lock()
        self.counters = FetchCounters()

    @property
    def most_bytes(self) -> int:
        """The most bytes that were held at any time."""
        return self._queue.most_bytes

    def request(self, instance: int) -> PendingSample:
        """Ask for a sample by its instance index; reading begins when its turn comes.

        Raises:
            ManifestError: no such index.
        """
        shard, place = self._reader.locate(instance)
        if self._direct:
            return _LocalSample(self._reader, shard, place)
        wanted = Wanted(shard, place)
        index = self._reader.loaded_index(shard)
        if index is not None:
            self._measure(wanted, index)
        self._queue.add(wanted)
        if not self._threads:
            self._start()
        return _RemoteSample(self._queue, wanted)

    def close(self) -> None:
        """Cancel what waits; a read that runs ends at its next failure."""
        self._closed.set()
        self._queue.close()
        deadline = time.monotonic() + _CLOSING_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def __enter__(self) -> "SampleFetcher":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self) -> None:
        with self._counting:
            if self._threads:
                return
            # Daemons, so that a stalled connection does not hold up the end of the program.
            self._threads = [
                threading.Thread(target=self._work, name=f"fetch-{number}", daemon=True)
                for number in range(self._connections)
            ]
        for thread in self._threads:
            thread.start()

    def _work(self) -> None:
        while (task := self._queue.next()) is not None:
            if isinstance(task, ShardInfo):
                self._load_index(task)
            else:
                self._read(task)

    def _load_index(self, shard: ShardInfo) -> None:
        try:
            index = self._reader.index_of(shard)
            self._queue.measure(shard, lambda wanted: self._measure(wanted, index))
        except BaseException as error:  # noqa: BLE001  (raised by result() of all samples of the shard)
            self._queue.fail(shard, error)

    def _measure(self, wanted: Wanted, index: ShardIndex) -> None:
        wanted.index = index
        wanted.start, wanted.length = index.span(wanted.place)
        wanted.cost = wanted.length
        if self._cache is not None:
            start, stop = self._cache.piece_span(wanted.start, wanted.length, wanted.shard.bytes)
            wanted.cost = stop - start

    def _read(self, group: list[Wanted]) -> None:
        """Read neighbours in one piece and hand each its sample."""
        shard, first = group[0].shard, min(wanted.start for wanted in group)
        stop = max(wanted.start + wanted.length for wanted in group)
        try:
            data = self._bytes(shard, first, stop - first)
        except BaseException as error:  # noqa: BLE001  (raised by result())
            self._queue.finish(group, [error] * len(group))
            return
        samples: list[Sample | BaseException] = []
        for wanted in group:
            part = data if len(group) == 1 else data[wanted.start - first : wanted.start - first + wanted.length]
            try:
                samples.append(self._sample(wanted, part))
            except BaseException as error:  # noqa: BLE001  (raised by result())
                samples.append(error)
        with self._counting:
            self.counters.samples += len(samples)
        del data
        self._queue.finish(group, samples)

    def _bytes(self, shard: ShardInfo, start: int, length: int) -> bytes:
        if self._cache is None:
            return self._fetch(shard, start, length)
        return self._cache.read(
            self._cached_name(shard), start, length, shard.bytes, lambda first, size: self._fetch(shard, first, size)
        )

    def _fetch(self, shard: ShardInfo, start: int, length: int) -> bytes:
        with self._counting:
            self.counters.reads += 1
            self.counters.bytes_read += length
        return self._reader.storage.read_range(shard.name, start, length, given_up=self._closed)

    def _sample(self, wanted: Wanted, data: bytes) -> Sample:
        try:
            return self._reader.assemble(wanted.shard, wanted.place, data, wanted.index)
        except ShardError:
            with self._counting:
                self.counters.damaged += 1
            if self._cache is not None:
                self._cache.drop(self._cached_name(wanted.shard), wanted.start, wanted.length, wanted.shard.bytes)
            # From the store, which is asked a few times.
            return self._reader.read_place(wanted.shard, wanted.place, self._closed)

    def _cached_name(self, shard: ShardInfo) -> str:
        return f"{self._prefix}/{shard.name}"


class _RemoteSample:
    def __init__(self, queue: ReadQueue, wanted: Wanted) -> None:
        self._queue, self._wanted = queue, wanted

    def result(self) -> Sample:
        return self._queue.take(self._wanted)

    def cancel(self) -> None:
        self._queue.cancel(self._wanted)


class _LocalSample:
    def __init__(self, reader: ShardReader, shard: ShardInfo, place: int) -> None:
        self._reader, self._shard, self._place = reader, shard, place
        self._cancelled = False

    def result(self) -> Sample:
        if self._cancelled:
            raise CancelledError
        return self._reader.read_place(self._shard, self._place)

    def cancel(self) -> None:
        self._cancelled = True
