"""Shards as files: writing a tar with fixed headers, and the index that makes one sample one ranged read."""

import hashlib
import io
import tarfile
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from avid_pipeline.shards_spec.errors import ManifestError, ShardError
from avid_pipeline.shards_spec.sample import MEMBERS, Sample, is_valid_key
from avid_pipeline.shards_spec.storage import Storage

_TEMPORARY_SUFFIX = ".partial"

# What numpy and zipfile raise on damaged bytes; RuntimeError and NotImplementedError come of damaged zip flags.
_DAMAGED_ZIP = (ValueError, KeyError, OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class ShardIndex:
    """Where every member of every sample lies in a shard; ``shard-….index.npz``.

    Columns follow :data:`~avid_pipeline.shards_spec.sample.MEMBERS`; a member that a sample lacks has offset and
    size -1.

    Attributes:
        keys: sample keys, [samples].
        offsets: int64 [samples, 3], first byte of the member's content.
        sizes: int64 [samples, 3], bytes of content.
        crc32: uint32 [samples, 3], checksum of the content.
    """

    keys: tuple[str, ...]
    offsets: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    crc32: npt.NDArray[np.uint32]

    def __len__(self) -> int:
        return len(self.keys)

    def span(self, place: int) -> tuple[int, int]:
        """``(start, length)`` of the bytes that hold all members of the sample at a place."""
        present = self.sizes[place] >= 0
        start = int(self.offsets[place][present].min())
        stop = int((self.offsets[place] + self.sizes[place])[present].max())
        return start, stop - start

    def split(self, place: int, data: bytes, where: str) -> dict[str, bytes]:
        """Cut the bytes of :meth:`span` into members and check them.

        Args:
            place: the sample's place in the shard.
            data: the bytes of its span.
            where: the shard's address, for messages.

        Raises:
            ShardError: a member's checksum does not fit.
        """
        start, _ = self.span(place)
        members = {}
        for column, name in enumerate(MEMBERS):
            size = int(self.sizes[place, column])
            if size < 0:
                continue
            offset = int(self.offsets[place, column])
            content = data[offset - start : offset - start + size]
            if zlib.crc32(content) != self.crc32[place, column]:
                raise ShardError(
                    f"{where}: {self.keys[place]}.{name}: bytes {offset} to {offset + size} do not have the "
                    "checksum of the index; the shard is damaged: copy or build it again"
                )
            members[name] = content
        return members

    def to_bytes(self) -> bytes:
        """The ``.npz`` content; the same index always gives the same bytes."""
        buffer = io.BytesIO()
        np.savez(
            buffer,
            keys=np.asarray(self.keys, dtype=np.str_),
            offsets=self.offsets,
            sizes=self.sizes,
            crc32=self.crc32,
        )
        return buffer.getvalue()


def parse_index(data: bytes, where: str) -> ShardIndex:
    """Read a shard index.

    Raises:
        ShardError: it is no index, or its arrays do not fit each other.
    """
    try:
        arrays = np.load(io.BytesIO(data), allow_pickle=False)
        if not isinstance(arrays, np.lib.npyio.NpzFile):
            raise ShardError(f"{where}: is no shard index (one array); build or copy the shard again")
        with arrays:
            index = ShardIndex(
                tuple(str(key) for key in arrays["keys"]), arrays["offsets"], arrays["sizes"], arrays["crc32"]
            )
    except _DAMAGED_ZIP as error:
        raise ShardError(f"{where}: is no shard index ({error}); build or copy the shard again") from error
    expected = (len(index.keys), len(MEMBERS))
    for name in ("offsets", "sizes", "crc32"):
        found = getattr(index, name).shape
        if found != expected:
            raise ShardError(f"{where}: {name}: expected shape {expected}, found {found}")
    return index


def load_index(storage: Storage, index_name: str) -> ShardIndex:
    """Read the index of a shard.

    Raises:
        StorageError: it does not exist.
        ShardError: it is damaged.
    """
    return parse_index(storage.read(index_name), storage.url_of(index_name))


@dataclass(frozen=True)
class FinishedShard:
    """What a :class:`ShardWriter` wrote: sample count, bytes, SHA-256 of the tar, and its index."""

    samples: int
    bytes: int
    sha256: str
    index: ShardIndex


class ShardWriter:
    """Writes one shard to a local file; the name appears only when the shard is complete.

    Use it as a context manager and call :meth:`finish`; leaving the context without it (an error, an interrupt)
    removes what was written.

    Args:
        path: the tar to write; ``<path>.partial`` is used until it is complete.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._partial = path.with_name(path.name + _TEMPORARY_SUFFIX)
        self._file = _HashingFile(self._partial.open("wb"))
        self._tar = tarfile.TarFile(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)  # type: ignore[arg-type]
        self._keys: dict[str, None] = {}
        self._rows: list[list[tuple[int, int, int]]] = []
        self._finished = False

    def add(self, sample: Sample) -> None:
        """Append a sample.

        Raises:
            ManifestError: its key is invalid or was used before in this shard.
        """
        self.add_members(sample.record.key, sample.members())

    def add_members(self, key: str, members: Mapping[str, bytes | Path]) -> None:
        """Append a sample by its members, whose contents are bytes or, for large ones, files.

        Raises:
            ManifestError: the key is invalid or was used before in this shard.
        """
        if not is_valid_key(key):
            raise ManifestError(f"key {key!r}: expected letters, digits, '_' and '-' only (see assign_keys)")
        if key in self._keys:
            raise ManifestError(f"key {key!r}: is in this shard already; keys are unique in a data set")
        row = []
        for name in MEMBERS:
            content = members.get(name)
            if content is None:
                row.append((-1, -1, 0))
            elif isinstance(content, Path):
                with content.open("rb") as file:
                    row.append(self._add_member(f"{key}.{name}", file, content.stat().st_size))
            else:
                row.append(self._add_member(f"{key}.{name}", io.BytesIO(content), len(content)))
        self._keys[key] = None
        self._rows.append(row)

    def _add_member(self, name: str, content: BinaryIO, size: int) -> tuple[int, int, int]:
        info = tarfile.TarInfo(name)
        info.size, info.mode, info.mtime = size, 0o644, 0
        reader = _ChecksummingReader(content)
        self._tar.addfile(info, reader)
        padded = -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        return self._file.position - padded, size, reader.crc32

    def finish(self) -> FinishedShard:
        """Close the tar and give it its name."""
        self._tar.close()
        self._file.close()
        self._partial.replace(self._path)
        self._finished = True
        table = np.asarray(self._rows, dtype=np.int64).reshape(len(self._keys), len(MEMBERS), 3)
        index = ShardIndex(
            tuple(self._keys),
            np.ascontiguousarray(table[:, :, 0]),
            np.ascontiguousarray(table[:, :, 1]),
            table[:, :, 2].astype(np.uint32),
        )
        return FinishedShard(len(self._keys), self._file.position, self._file.hexdigest(), index)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._finished:
            self._file.close()
            self._partial.unlink(missing_ok=True)


class _ChecksummingReader:
    """Passes reads on and keeps their CRC-32, so that a member of any size is read once."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.crc32 = 0

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self.crc32 = zlib.crc32(data, self.crc32)
        return data


class _HashingFile:
    """A write-only file that counts and hashes what passes, so that checksums cost no second read."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self.position = 0

    def write(self, data: bytes) -> int:
        self._hash.update(data)
        self.position += len(data)
        return self._file.write(data)

    def tell(self) -> int:
        return self.position

    def close(self) -> None:
        self._file.close()

    def hexdigest(self) -> str:
        return self._hash.hexdigest()
