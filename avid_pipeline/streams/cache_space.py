"""The size bound of a cache folder, held by all processes of a node together."""

import fcntl
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

_LOCK_NAME = ".used-bytes"
_WRITING_PREFIX = ".writing-"
# Making room frees this share of the bound more than is needed, so that it is rare.
_SPARE_SHARE = 10


class CacheSpace:
    """Files below a folder whose sizes together stay below a bound.

    A lock file holds the number of bytes in use. Bytes are reserved before they are written, so that a process that is
    killed at any point leaves the number too high, never too low; counting the files corrects it. A file is written
    under another name while its writer holds a lock on it, which ends with its process: that tells what killed writers
    left behind. Among finished files the least recently used go first, by their modification time, which
    :meth:`touch` sets.

    Args:
        folder: made if it is missing; used by nothing else.
        max_bytes: the bound.

    Raises:
        OSError: the folder cannot be used.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder, self._max_bytes = folder, max_bytes
        folder.mkdir(parents=True, exist_ok=True)
        with self._locked() as counter:
            counter.value = self._make_room(max_bytes)

    def write(self, path: Path, data: bytes) -> None:
        """Write a file below the folder atomically; nothing is done where it exists or can have no room.

        Raises:
            OSError: it cannot be written, for example on a full disk; nothing is left of it.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{_WRITING_PREFIX}{len(data)}-{secrets.token_hex(8)}")
        file = self._begin(partial, len(data))
        if file is None:
            return
        kept = False
        with file:
            try:
                left = memoryview(data)
                while left:
                    left = left[file.write(left) :]
                kept = self._finish(partial, path)
            finally:
                # While it is locked, so that nobody else removes it, and its bytes from the count, as abandoned.
                if not kept:
                    with self._locked() as counter:
                        partial.unlink(missing_ok=True)
                        counter.value = max(0, counter.value - len(data))

    def remove(self, path: Path) -> None:
        """Remove a finished file, if it is there."""
        with self._locked() as counter:
            try:
                size = path.stat().st_size
                path.unlink()
            except FileNotFoundError:
                return
            counter.value = max(0, counter.value - size)

    @staticmethod
    def touch(file_descriptor: int) -> None:
        """Note that an open file was used now."""
        os.utime(file_descriptor)

    def used_bytes(self) -> int:
        """Bytes in use, as the processes count them."""
        with self._locked() as counter:
            return counter.value

    def _begin(self, partial: Path, size: int) -> FileIO | None:
        """Reserve room and, before anybody else counts the files, make the file that stands for it."""
        with self._locked() as counter:
            if counter.value + size > self._max_bytes:
                counter.value = self._make_room(self._max_bytes - size - self._max_bytes // _SPARE_SHARE)
            if counter.value + size > self._max_bytes:
                return None
            file = FileIO(partial, "x")
            fcntl.flock(file, fcntl.LOCK_EX)
            counter.value += size
            return file

    def _finish(self, partial: Path, path: Path) -> bool:
        """Give a written file its name, unless another process was first."""
        with self._locked():
            if path.exists():
                return False
            partial.rename(path)
            return True

    @contextmanager
    def _locked(self) -> "Iterator[_Counter]":
        descriptor = os.open(self._folder / _LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            text = os.pread(descriptor, 20, 0)
            # Where the number was lost, the bound is the safe one: room is made, and the files counted.
            counter = _Counter(int(text) if text.isdigit() else self._max_bytes)
            before = counter.value
            yield counter
            if counter.value != before or not text:
                os.pwrite(descriptor, b"%020d" % counter.value, 0)
        finally:
            os.close(descriptor)

    def _make_room(self, target: int) -> int:
        """Remove what killed writers left, and files until at most ``target`` bytes are left; gives what is left."""
        files: list[tuple[int, int, Path]] = []
        used = 0
        for path in self._folder.rglob("*"):
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            if not stat.S_ISREG(status.st_mode) or path.name == _LOCK_NAME:
                continue
            if not path.name.startswith(_WRITING_PREFIX):
                files.append((status.st_mtime_ns, status.st_size, path))
                used += status.st_size
            elif not _remove_if_abandoned(path):
                used += _announced_size(path)
        for _, size, path in sorted(files):
            if used <= target:
                break
            path.unlink(missing_ok=True)
            used -= size
        return used


class _Counter:
    def __init__(self, value: int) -> None:
        self.value = value


def _announced_size(path: Path) -> int:
    size = path.name.removeprefix(_WRITING_PREFIX).partition("-")[0]
    return int(size) if size.isdigit() else 0


def _remove_if_abandoned(path: Path) -> bool:
    """Remove a file that is no longer being written: nobody holds its lock."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return False
    return True
