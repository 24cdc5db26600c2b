"""A cache of remote shards on the local disk, shared by the processes of a node."""

import errno
import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from avid_pipeline.errors import ConfigError, StorageError
from avid_pipeline.streams.cache_space import CacheSpace

OWN_FOLDER = "avid-pipeline-cache"

_PIECE_BYTES = 4 << 20
_log = logging.getLogger(__name__)


class DiskCache:
    """Keeps aligned pieces of shards in files; neighbouring samples lie in the same piece.

    Any number of processes of a node may use one folder, and be killed. What is in a file is not trusted: samples have
    checksums, and :meth:`drop` forgets pieces that turned out wrong. A disk that is full or fails turns storing off,
    with one warning.

    Args:
        folder: a sub-folder ``avid-pipeline-cache`` of it is used, and made if it is missing.
        max_bytes: what all files together may have; the least recently used go first.
        piece_bytes: size of a piece.

    Raises:
        ConfigError: ``max_bytes`` is less than one piece.
        StorageError: the folder cannot be used.
    """

    def __init__(self, folder: str | os.PathLike[str], max_bytes: int, *, piece_bytes: int = _PIECE_BYTES) -> None:
        if max_bytes < piece_bytes:
            raise ConfigError(f"cache_bytes: expected at least one piece ({piece_bytes} bytes), found {max_bytes}")
        # A folder of its own: whatever else lies in the given one is not the cache's to count or remove.
        self._folder = Path(folder).expanduser().absolute() / OWN_FOLDER
        self._piece_bytes = piece_bytes
        self._loading: dict[tuple[str, int], Future[bytes]] = {}
        self._lock = threading.Lock()
        self.hits = self.misses = self.failed_writes = 0
        self._space: CacheSpace | None = None
        try:
            self._space = CacheSpace(self._folder, max_bytes)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise StorageError(
                    f"{self._folder}: cannot be the cache folder: {error.strerror}; give a folder that can be written"
                ) from error
            self._turn_off(error)

    def piece_span(self, start: int, length: int, size: int) -> tuple[int, int]:
        """``(start, stop)`` of the pieces that hold a range of an object of ``size`` bytes."""
        first = start // self._piece_bytes * self._piece_bytes
        stop = -(-(start + length) // self._piece_bytes) * self._piece_bytes
        return first, min(stop, size)

    def read(self, name: str, start: int, length: int, size: int, fetch: Callable[[int, int], bytes]) -> bytes:
        """A range of an object: from the cache, and what is missing, once for all threads, by ``fetch``.

        Args:
            name: of the object, a relative path that also tells its version.
            start: first byte.
            length: number of bytes.
            size: of the whole object.
            fetch: gives ``(start, length)`` of the object; what it raises comes out of here.
        """
        found: dict[int, bytes] = {}
        mine: list[int] = []
        others: dict[int, Future[bytes]] = {}
        for piece in self._pieces(start, length):
            data = self._stored(name, piece, start, length, size)
            if data is not None:
                found[piece] = data
                continue
            with self._lock:
                loading = self._loading.get((name, piece))
                if loading is None:
                    self._loading[name, piece] = Future()
                    mine.append(piece)
                else:
                    others[piece] = loading
        self.hits += len(found)
        self.misses += len(mine)
        for piece, data in self._load(name, mine, size, fetch).items():
            found[piece] = self._cut(piece, data, start, length)
        for piece, loading in others.items():
            found[piece] = self._cut(piece, loading.result(), start, length)
        parts = [found[piece] for piece in sorted(found)]
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def drop(self, name: str, start: int, length: int, size: int) -> None:
        """Forget the pieces that hold a range of an object: its bytes are wrong."""
        try:
            for piece in self._pieces(start, length):
                if (space := self._space) is not None:
                    space.remove(self._path(name, piece, size))
        except OSError as error:
            self._turn_off(error)

    def _pieces(self, start: int, length: int) -> range:
        return range(start // self._piece_bytes, -(-(start + length) // self._piece_bytes))

    def _bounds(self, piece: int, size: int) -> tuple[int, int]:
        return piece * self._piece_bytes, min((piece + 1) * self._piece_bytes, size)

    def _path(self, name: str, piece: int, size: int) -> Path:
        first, stop = self._bounds(piece, size)
        return self._folder / f"{name}-{first}-{stop}"

    def _cut(self, piece: int, data: bytes, start: int, length: int) -> bytes:
        first = piece * self._piece_bytes
        return data[max(0, start - first) : start + length - first]

    def _stored(self, name: str, piece: int, start: int, length: int, size: int) -> bytes | None:
        """The part of a range that lies in a piece, if the piece is in the cache."""
        path = self._path(name, piece, size)
        first, stop = self._bounds(piece, size)
        begin, end = max(start, first), min(start + length, stop)
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError:
            return None
        try:
            if os.fstat(descriptor).st_size == stop - first:
                data = os.pread(descriptor, end - begin, begin - first)
                CacheSpace.touch(descriptor)
                if len(data) == end - begin:
                    return data
        except OSError:
            return None
        finally:
            os.close(descriptor)
        self.drop(name, first, stop - first, size)
        return None

    def _load(self, name: str, pieces: list[int], size: int, fetch: Callable[[int, int], bytes]) -> dict[int, bytes]:
        """Fetch pieces that this thread announced: neighbours in one request; keep them and hand them on."""
        loaded: dict[int, bytes] = {}
        try:
            for first, last in _runs(pieces):
                start, stop = self._bounds(first, size)[0], self._bounds(last, size)[1]
                data = fetch(start, stop - start)
                for piece in range(first, last + 1):
                    begin, end = self._bounds(piece, size)
                    content = data if first == last else data[begin - start : end - start]
                    self._store(self._path(name, piece, size), content)
                    self._announced(name, piece).set_result(content)
                    loaded[piece] = content
        except BaseException as error:
            for piece in pieces:
                if piece not in loaded:
                    self._announced(name, piece).set_exception(error)
            raise
        return loaded

    def _announced(self, name: str, piece: int) -> Future[bytes]:
        with self._lock:
            return self._loading.pop((name, piece))

    def _store(self, path: Path, data: bytes) -> None:
        space = self._space
        if space is None:
            return
        try:
            space.write(path, data)
        except OSError as error:
            self._turn_off(error)

    def _turn_off(self, error: OSError) -> None:
        with self._lock:
            first, self.failed_writes = self.failed_writes == 0, self.failed_writes + 1
            self._space = None
        if first:
            _log.warning("%s: the cache keeps nothing more: %s", self._folder, error.strerror or error)


def _runs(numbers: list[int]) -> list[tuple[int, int]]:
    """Ascending numbers as ``(first, last)`` of runs without gaps."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return runs
