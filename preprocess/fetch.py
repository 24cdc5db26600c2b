"""Bringing a source to where ffmpeg can read it, with its checksum."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from avid_pipeline.preprocess.quarantine import SourceRejectedError
from avid_pipeline.preprocess.settings import Limits
from avid_pipeline.preprocess.sources.base import RemoteFile
from avid_pipeline.shards_spec.errors import StorageError
from avid_pipeline.shards_spec.storage import Storage, open_storage

_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class LocalCopy:
    """A source on this machine's disk: the file and its SHA-256."""

    path: Path
    sha256: str


class Fetcher:
    """Fetches sources; connections to object stores are kept open between them.

    Args:
        options: of the object store.
        limits: ``bytes`` is the largest file that is taken.
    """

    def __init__(self, options: Mapping[str, str], limits: Limits) -> None:
        self._options = options
        self._limits = limits
        self._storages: dict[str, Storage] = {}

    def fetch(self, location: Path | RemoteFile, folder: Path) -> LocalCopy:
        """The file on this machine's disk: itself where it is local, else a copy in ``folder``.

        Raises:
            SourceRejectedError: it does not exist, is empty, too large, or cannot be read to its end.
        """
        if isinstance(location, RemoteFile):
            return self._download(location, folder / "source")
        try:
            self._check_size(location.stat().st_size)
            with location.open("rb") as file:
                return LocalCopy(location, hashlib.file_digest(file, "sha256").hexdigest())
        except FileNotFoundError as error:
            raise SourceRejectedError("source_not_found", "the file does not exist (any more)") from error
        except OSError as error:
            raise SourceRejectedError(
                "unreadable", f"the file cannot be read: {os.strerror(error.errno or 0)}"
            ) from error

    def _download(self, location: RemoteFile, path: Path) -> LocalCopy:
        digest = hashlib.sha256()
        try:
            storage = self._storages.get(location.root)
            if storage is None:
                storage = self._storages[location.root] = open_storage(location.root, options=self._options)
            size = storage.size(location.path)
            if size is None:
                raise SourceRejectedError("source_not_found", f"{location} does not exist (any more)")
            self._check_size(size)
            with path.open("wb") as file:
                for piece in storage.chunks(location.path):
                    digest.update(piece)
                    file.write(piece)
        except StorageError as error:
            raise SourceRejectedError("unreadable", str(error)) from error
        return LocalCopy(path, digest.hexdigest())

    def _check_size(self, size: int) -> None:
        if size == 0:
            raise SourceRejectedError("empty_file", "the file has 0 bytes")
        if size > self._limits.bytes:
            raise SourceRejectedError(
                "limit_exceeded", f"the file has {size:,} bytes, the limit is {self._limits.bytes:,} (--max-bytes)"
            )
