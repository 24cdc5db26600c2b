"""One way to open any URL: a folder on disk, S3, GCS, Azure or HTTP, through obstore.

A :class:`Storage` is a root (a folder or a prefix) plus the operations that shards need on the names below it.
Writes are atomic: a name either holds all of what was written or does not exist.
"""

import io
import os
import re
import secrets
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from queue import Full, Queue
from typing import Any, BinaryIO, cast
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import BaseError
from obstore.store import LocalStore, from_url

from avid_pipeline.shards_spec.credentials import with_aws_profile
from avid_pipeline.shards_spec.errors import StorageError
from avid_pipeline.shards_spec.transfer import BrokenTransferError, RetryPolicy, stream

WRITING_PREFIX = ".writing-"

_CHUNK_BYTES = 8 << 20
_BUFFER_BYTES = 1 << 20
_POLL_SECONDS = 0.2
_RANGES_AT_ONCE = 10
# S3 takes at most 10,000 parts.
_MOST_PARTS = 9_000


def is_remote(url: str) -> bool:
    """Whether this is a URL of an object store or web server, and not a local path or ``file://``."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", url) is not None and not url.startswith("file://")


def split_url(url: str) -> tuple[str, str]:
    """A remote URL as its root (bucket, container or host) and the name below it, percent-decoded for http(s).

    Raises:
        StorageError: the URL has no host or bucket, names nothing below it, or has a query, which no store takes.
    """
    try:
        parts = urlsplit(url, allow_fragments=False)
    except ValueError as error:
        raise StorageError(f"{url}: is no URL: {error}; expected <scheme>://<host or bucket>/<name>") from error
    web = parts.scheme in ("http", "https")
    # In an object store a question mark is part of the name.
    name = (parts.path if web else url.partition("://")[2].partition("/")[2]).lstrip("/")
    if not parts.netloc or not name:
        raise StorageError(f"{url}: expected <scheme>://<host or bucket>/<name>")
    if web and parts.query:
        raise StorageError(f"{url}: URLs with a query (?{parts.query[:40]}) cannot be read; give one without")
    return f"{parts.scheme}://{parts.netloc}", unquote(name) if web else name


@dataclass(frozen=True)
class Storage:
    """A root URL and what can be read and written below it.

    Build it with :func:`open_storage`. ``store`` is the obstore object store whose prefix is the root, and
    ``content_store`` the same one for reading content: it repeats nothing by itself, for ``retry`` governs that.
    """

    url: str
    store: Any
    local_root: Path | None
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    content_store: Any = None

    def url_of(self, name: str) -> str:
        """The full address of a name, for messages."""
        return f"{self.url.rstrip('/')}/{name}"

    def local_path(self, name: str) -> Path | None:
        """The file that holds a name, or None when the root is not on disk."""
        return None if self.local_root is None else self.local_root / name

    def read(self, name: str) -> bytes:
        """The whole content of a name.

        Raises:
            StorageError: it does not exist or cannot be read.
        """
        return b"".join(self.chunks(name))

    def read_range(self, name: str, start: int, length: int, *, given_up: threading.Event | None = None) -> bytes:
        """``length`` bytes from offset ``start``, in one ranged request unless the connection breaks.

        Args:
            name: what to read.
            start: its first byte.
            length: number of bytes.
            given_up: once it is set, a broken transfer is not tried again.

        Raises:
            StorageError: the name does not exist, cannot be read, or is shorter than that.
        """
        return self._read_range(name, start, length, given_up)

    def read_ranges(self, name: str, starts: Sequence[int], lengths: Sequence[int]) -> list[bytes]:
        """Several ranges of a name, each in a request of its own, some at once.

        Raises:
            StorageError: the name does not exist, cannot be read, or is shorter than that.
        """
        with ThreadPoolExecutor(_RANGES_AT_ONCE) as pool:
            return list(pool.map(lambda start, length: self._read_range(name, start, length), starts, lengths))

    def _read_range(self, name: str, start: int, length: int, given_up: threading.Event | None = None) -> bytes:
        pieces = list(self.chunks(name, start, length, given_up=given_up))
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        if len(data) != length:
            raise StorageError(
                f"{self.url_of(name)}: cannot read {length} bytes at offset {start}: found {len(data)}; "
                "the object is truncated"
            )
        return data

    def open(self, name: str) -> BinaryIO:
        """A seekable, buffered binary reader of a name.

        Raises:
            StorageError: it does not exist or cannot be opened.
        """
        path = self.local_path(name)
        try:
            if path is not None:
                return path.open("rb")
            size = int(obstore.head(self.store, name)["size"])
        except (FileNotFoundError, OSError, BaseError) as error:
            raise self._failure("open", name, error) from error
        return cast(BinaryIO, io.BufferedReader(_RangedFile(self, name, size), _BUFFER_BYTES))

    def chunks(
        self, name: str, start: int = 0, length: int | None = None, *, given_up: threading.Event | None = None
    ) -> Iterator[bytes]:
        """The content of a name, or a range of it, in pieces of some megabytes, in bounded memory.

        Reading goes on at the byte reached when a connection breaks, unless ``given_up`` is set; see
        :mod:`avid_pipeline.shards_spec.transfer`.

        Raises:
            StorageError: it does not exist or cannot be read to its end; the message names the byte reached.
        """
        stop = None if length is None else start + length
        path = self.local_path(name)
        try:
            if path is None:
                store = self.store if self.content_store is None else self.content_store
                yield from stream(store, name, start, stop, self.retry, given_up)
                return
            with path.open("rb", buffering=0) as file:
                file.seek(start)
                left = length
                while data := file.read(_CHUNK_BYTES if left is None else min(_CHUNK_BYTES, left)):
                    left = None if left is None else left - len(data)
                    yield data
        except BrokenTransferError as error:
            if isinstance(error.cause, FileNotFoundError):
                raise self._failure("read", name, error.cause) from error
            reason = _first_line(error.cause) if error.cause else "the object is truncated: it ends there"
            if error.attempts > 1:
                reason += f" ({error.attempts} attempts in a row failed)"
            raise StorageError(f"{self.url_of(name)}: cannot read from byte {error.reached:,} on: {reason}") from error
        except OSError as error:
            raise self._failure("read", name, error) from error

    def size(self, name: str) -> int | None:
        """Size in bytes, or None when the name does not exist."""
        try:
            return int(obstore.head(self.store, name)["size"])
        except FileNotFoundError:
            return None
        except (OSError, BaseError) as error:
            raise self._failure("look at", name, error) from error

    def exists(self, name: str) -> bool:
        """Whether the name exists."""
        return self.size(name) is not None

    def names(self, prefix: str = "") -> Iterator[str]:
        """All names below the root (or below the folder ``prefix``), sorted."""
        try:
            found = [item["path"] for page in obstore.list(self.store, prefix or None) for item in page]
        except (OSError, BaseError) as error:
            raise self._failure("list", prefix, error) from error
        return iter(sorted(found))

    def write(self, name: str, data: bytes) -> None:
        """Write a name at once: readers see the old content or the new, never a part.

        Raises:
            StorageError: the root cannot be written.
        """
        try:
            obstore.put(self.store, name, data)
        except (OSError, BaseError) as error:
            raise self._failure("write", name, error) from error

    def write_pieces(self, name: str, pieces: Iterable[bytes], size: int) -> None:
        """Write a name from pieces, in bounded memory; atomic, also when ``pieces`` raises: nothing is there then.

        A local file is written beside its name as ``.writing-…`` and renamed; elsewhere it is a multipart upload,
        which a killed process leaves behind unseen (a lifecycle rule of the bucket removes such parts).

        Args:
            name: what to write.
            pieces: its content.
            size: bytes of all pieces together, for the size of an upload's parts.

        Raises:
            StorageError: the root cannot be written.
        """
        target = self.local_path(name)
        try:
            if target is None:
                part = max(_CHUNK_BYTES, -(-size // _MOST_PARTS))
                with _read_ahead(pieces) as ahead:
                    obstore.put(self.store, name, ahead, chunk_size=part, max_concurrency=4)
                return
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(f"{WRITING_PREFIX}{secrets.token_hex(8)}-{target.name}")
            try:
                with partial.open("xb") as file:
                    for piece in pieces:
                        file.write(piece)
                    file.flush()
                    os.fsync(file.fileno())
                partial.replace(target)
                _sync_folder(target.parent)
            finally:
                partial.unlink(missing_ok=True)
        except (OSError, BaseError) as error:
            raise self._failure("write", name, error) from error

    def upload(self, path: Path, name: str) -> None:
        """Move a finished local file to a name, atomically (rename on one disk, multipart commit elsewhere).

        Raises:
            StorageError: the root cannot be written.
        """
        target = self.local_path(name)
        try:
            if target is not None and path.stat().st_dev == target.parent.stat().st_dev:
                path.replace(target)
                return
            obstore.put(self.store, name, path)
            path.unlink()
        except (OSError, BaseError) as error:
            raise self._failure("write", name, error) from error

    def delete(self, name: str) -> None:
        """Remove a name; a name that does not exist is no error."""
        try:
            obstore.delete(self.store, name)
        except FileNotFoundError:
            return
        except (OSError, BaseError) as error:
            raise self._failure("delete", name, error) from error

    def _failure(self, action: str, name: str, error: Exception) -> StorageError:
        if isinstance(error, FileNotFoundError):
            return StorageError(f"{self.url_of(name)}: does not exist; check the root URL and the name")
        return StorageError(f"{self.url_of(name)}: cannot {action}: {_first_line(error)}")


def _sync_folder(folder: Path) -> None:
    """What was renamed in a folder is still so after a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__


@contextmanager
def _read_ahead(pieces: Iterable[bytes]) -> Iterator[Iterator[bytes]]:
    """The same pieces, taken one ahead in a thread of their own.

    obstore calls the iterator of an upload inside its runtime, where no other call of obstore is possible; so the
    pieces, which may come from another store, are made elsewhere.
    """
    queue: Queue[bytes | None] = Queue(maxsize=1)
    given_up = threading.Event()

    def hand_over(piece: bytes | None) -> None:
        while not given_up.is_set():
            try:
                queue.put(piece, timeout=_POLL_SECONDS)
                return
            except Full:
                continue

    def fill() -> None:
        try:
            for piece in pieces:
                hand_over(piece)
                if given_up.is_set():
                    return
        finally:
            hand_over(None)

    def received(filling: Future[None]) -> Iterator[bytes]:
        while (piece := queue.get()) is not None:
            yield piece
        filling.result()  # Raises what the pieces raised.

    with ThreadPoolExecutor(1) as pool:
        try:
            yield received(pool.submit(fill))
        finally:
            given_up.set()


class _RangedFile(io.RawIOBase):
    """An object as a file: every read is a ranged request of at most some megabytes."""

    def __init__(self, storage: Storage, name: str, size: int) -> None:
        super().__init__()
        self._storage, self._name, self._size = storage, name, size
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        length = max(0, min(len(buffer), _CHUNK_BYTES, self._size - self._position))
        if length:
            buffer[:length] = self._storage.read_range(self._name, self._position, length)
            self._position += length
        return length


def open_storage(
    url: str | os.PathLike[str],
    *,
    create: bool = False,
    options: Mapping[str, str] | None = None,
    retry: RetryPolicy | None = None,
) -> Storage:
    """Open a root: a local path, ``file://``, ``s3://``, ``gs://``, ``az://`` or ``https://``.

    Args:
        url: the root. Credentials of object stores come from their usual environment variables and files.
        create: make the local folder if it is missing; without it a missing local root is an error.
        options: settings of the object store as obstore names them, for example ``{"aws_endpoint": "…"}``.
        retry: how long broken connections are tried again; by default some minutes.

    Raises:
        StorageError: the local root is missing, not a folder or cannot be made, or the URL is of no known kind.
    """
    text = os.fspath(url)
    if is_remote(text):
        return _open_remote(text, options or {}, retry or RetryPolicy())
    root = Path(text.removeprefix("file://")).expanduser().absolute()
    if create and not root.exists():
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"{root}: cannot make this folder: {error.strerror}; give another folder") from error
    if not root.is_dir():
        problem = "is a file, not a folder" if root.exists() else "does not exist"
        raise StorageError(f"{root}: {problem}; give the folder that holds the data set")
    return Storage(str(root), LocalStore(root), root)


def _open_remote(url: str, options: Mapping[str, str], retry: RetryPolicy) -> Storage:
    if url.startswith(("s3://", "s3a://")):
        options = with_aws_profile(options)
    # No limit on a whole request, for large objects take long; a stalled one shows by its silence.
    client_options: dict[str, Any] = {
        "timeout": timedelta(days=1),
        "read_timeout": timedelta(seconds=retry.read_timeout),
    }
    if _plain_http(url, options):
        client_options["allow_http"] = True
    try:
        # A web server would be asked for //name below a root that ends in a slash.
        store, content_store = (
            from_url(
                url.rstrip("/"),
                config=cast(Any, dict(options)),
                client_options=cast(Any, client_options),
                retry_config=cast(Any, {"max_retries": retries, "retry_timeout": timedelta(seconds=180)}),
            )
            for retries in (retry.requests, 0)
        )
    except (ValueError, BaseError) as error:
        raise StorageError(
            f"{url}: cannot open this root: {error}; expected a local path or an s3://, gs://, az:// or https:// URL"
        ) from error
    return Storage(url, store, None, retry, content_store)


def _plain_http(url: str, options: Mapping[str, str] | None) -> bool:
    endpoints = [value for key, value in (options or {}).items() if "endpoint" in key.lower()]
    endpoints += [os.environ.get("AWS_ENDPOINT_URL", ""), os.environ.get("AWS_ENDPOINT", "")]
    return url.startswith("http://") or any(value.startswith("http://") for value in endpoints)
