"""One way to open any URL: a folder on disk, S3, GCS, Azure or HTTP, through obstore.

A :class:`Storage` is a root (a folder or a prefix) plus the operations that shards need on the names below it.
Writes are atomic: a name either holds all of what was written or does not exist.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO, cast

import obstore
from obstore.exceptions import BaseError
from obstore.store import LocalStore, from_url

from avid_pipeline.shards_spec.errors import StorageError


@dataclass(frozen=True)
class Storage:
    """A root URL and what can be read and written below it.

    Build it with :func:`open_storage`. ``store`` is the obstore object store whose prefix is the root.
    """

    url: str
    store: Any
    local_root: Path | None

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
        try:
            return bytes(obstore.get(self.store, name).bytes())
        except (FileNotFoundError, OSError, BaseError) as error:
            raise self._failure("read", name, error) from error

    def read_range(self, name: str, start: int, length: int) -> bytes:
        """``length`` bytes from offset ``start``, in one ranged request.

        Raises:
            StorageError: the name does not exist, cannot be read, or is shorter than that.
        """
        try:
            data = bytes(obstore.get_range(self.store, name, start=start, length=length))
        except (FileNotFoundError, OSError, BaseError) as error:
            raise self._failure("read", name, error) from error
        if len(data) != length:
            raise StorageError(
                f"{self.url_of(name)}: expected {length} bytes at offset {start}, found {len(data)}; "
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
            return cast(BinaryIO, obstore.open_reader(self.store, name))
        except (FileNotFoundError, OSError, BaseError) as error:
            raise self._failure("open", name, error) from error

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
        reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        return StorageError(f"{self.url_of(name)}: cannot {action}: {reason}")


def open_storage(
    url: str | os.PathLike[str], *, create: bool = False, options: Mapping[str, str] | None = None
) -> Storage:
    """Open a root: a local path, ``file://``, ``s3://``, ``gs://``, ``az://`` or ``https://``.

    Args:
        url: the root. Credentials of object stores come from their usual environment variables.
        create: make the local folder if it is missing; without it a missing local root is an error.
        options: settings of the object store as obstore names them, for example ``{"aws_endpoint": "…"}``.

    Raises:
        StorageError: the local root is missing, not a folder or cannot be made, or the URL is of no known kind.
    """
    text = os.fspath(url)
    if "://" in text and not text.startswith("file://"):
        client_options = {"allow_http": True} if _plain_http(text, options) else {}
        try:
            store = from_url(
                text,
                config=cast(Any, dict(options or {})),
                client_options=cast(Any, client_options),
                retry_config=cast(Any, {"max_retries": 8, "retry_timeout": timedelta(seconds=120)}),
            )
        except (ValueError, BaseError) as error:
            raise StorageError(
                f"{text}: cannot open this root: {error}; expected a local path or an s3://, gs://, az:// "
                "or https:// URL"
            ) from error
        return Storage(text, store, None)
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


def _plain_http(url: str, options: Mapping[str, str] | None) -> bool:
    endpoints = [value for key, value in (options or {}).items() if "endpoint" in key.lower()]
    endpoints += [os.environ.get("AWS_ENDPOINT_URL", ""), os.environ.get("AWS_ENDPOINT", "")]
    return url.startswith("http://") or any(value.startswith("http://") for value in endpoints)
