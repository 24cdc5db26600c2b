"""Reading a shard once from its beginning to its end: hashed and counted on the way, in bounded memory."""

import hashlib
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType

from avid_pipeline.shards_spec.errors import ShardError
from avid_pipeline.shards_spec.storage import Storage

_PIECE_BYTES = 8 << 20


class SequentialReader:
    """A name's content from begin to end, with its SHA-256 and length so far.

    Object stores are read in ranges of some megabytes: one request for a whole shard would run into the client's
    time limit when the reader is slow, and a broken one is repeated from its own beginning only.

    Args:
        storage: the root.
        name: what to read.

    Raises:
        StorageError: it does not exist, or cannot be read.
    """

    def __init__(self, storage: Storage, name: str) -> None:
        self._storage = storage
        self._name = name
        path = storage.local_path(name)
        self._file = None if path is None else storage.open(name)
        self.size = storage.size(name) or 0
        self._pending = b""
        self._requested = 0
        self._hash = hashlib.sha256()
        self.count = 0

    def read(self, length: int) -> bytes:
        """The next ``length`` bytes; fewer only at the end.

        Raises:
            StorageError: they cannot be read.
        """
        data = self._read_local(length) if self._file is not None else self._read_remote(length)
        self._hash.update(data)
        self.count += len(data)
        return data

    def _read_local(self, length: int) -> bytes:
        assert self._file is not None
        try:
            return self._file.read(length)
        except OSError as error:
            raise ShardError(f"{self._storage.url_of(self._name)}: cannot read: {error.strerror}") from error

    def _read_remote(self, length: int) -> bytes:
        pieces, found = [self._pending], len(self._pending)
        while found < length and self._requested < self.size:
            wanted = min(_PIECE_BYTES, self.size - self._requested)
            pieces.append(self._storage.read_range(self._name, self._requested, wanted))
            self._requested += wanted
            found += wanted
        data = b"".join(pieces)
        self._pending = data[length:]
        return data[:length]

    def pieces(self) -> Iterator[bytes]:
        """What was not read yet, in pieces of some megabytes."""
        while piece := self.read(_PIECE_BYTES):
            yield piece

    def hexdigest(self) -> str:
        """SHA-256 of all that was read."""
        return self._hash.hexdigest()

    def __enter__(self) -> "SequentialReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()


@dataclass(frozen=True)
class Member:
    """A member of a tar: sample key, name after the key's dot, offset of its content, and its content."""

    key: str
    name: str
    offset: int
    content: bytes


def tar_members(reader: SequentialReader, largest: int) -> Iterator[Member]:
    """The members of a shard in order, one in memory at a time.

    Only what the specification allows is read: regular files with USTAR headers (other kinds of entries, such as
    links, could lead out of the shard).

    Args:
        reader: the shard, at its beginning.
        largest: a member of more bytes than this is damage, not something to load.

    Raises:
        ShardError: the tar is damaged or has other entries.
        StorageError: it cannot be read.
    """
    while header := reader.read(tarfile.BLOCKSIZE):
        if header == bytes(tarfile.BLOCKSIZE):
            return
        try:
            info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise ShardError(f"the header before byte {reader.count}: {error}") from error
        if info.type != tarfile.REGTYPE:
            raise ShardError(f"{info.name}: expected a regular file, found an entry of type {info.type!r}")
        if info.size > min(largest, reader.size - reader.count):
            raise ShardError(f"{info.name}: its header says {info.size} bytes, more than there can be")
        if (info.mtime, info.uid, info.gid, info.mode) != (0, 0, 0, 0o644):
            raise ShardError(f"{info.name}: its header must have mtime 0, uid 0, gid 0 and mode 0644")
        key, _, name = info.name.partition(".")
        offset = reader.count
        content = reader.read(info.size)
        reader.read(-info.size % tarfile.BLOCKSIZE)
        yield Member(key, name, offset, content)
    raise ShardError(f"ends at byte {reader.count} without the mark of a tar's end")
