"""Reading from object stores over networks that break: a transfer goes on at the byte that it reached."""

import re
import secrets
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import obstore
from obstore.exceptions import (
    BaseError,
    InvalidPathError,
    NotSupportedError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)

_PIECE_BYTES = 8 << 20
# Trying again cannot help.
_FINAL = (
    FileNotFoundError,
    PermissionDeniedError,
    UnauthenticatedError,
    NotSupportedError,
    InvalidPathError,
)
_STATUS = re.compile(r"status code: (\d{3})")
# Request timeout, too early, too many requests: the only refusals that pass by themselves.
_PASSING_REFUSALS = (408, 425, 429)


@dataclass(frozen=True)
class RetryPolicy:
    """How long broken reads are tried again.

    Attributes:
        attempts: in a row that bring less than ``least_bytes``; an attempt that brings more begins the count anew.
        first_wait: seconds before the second attempt; each later wait is twice as long, and up to half of it shorter
            by chance, so that many readers do not come back together.
        longest_wait: seconds, at most.
        read_timeout: seconds without a byte after which a connection counts as broken.
        least_bytes: that a connection must bring in ``read_timeout`` seconds, else it counts as broken.
        requests: times that the store's client repeats a request that does not read content (writing, listing) by
            itself, with waits of its own.
    """

    attempts: int = 12
    first_wait: float = 0.2
    longest_wait: float = 15.0
    read_timeout: float = 30.0
    least_bytes: int = 64 << 10
    requests: int = 8


class BrokenTransferError(Exception):
    """A read that failed for good.

    Attributes:
        reached: the byte offset up to which content arrived.
        attempts: how many requests in a row failed.
        cause: the last failure; None where the object ended too soon.
    """

    def __init__(self, reached: int, attempts: int, cause: Exception | None) -> None:
        super().__init__(str(cause) if cause else "the object ends there")
        self.reached = reached
        self.attempts = attempts
        self.cause = cause


class ObjectChangedError(Exception):
    """The object is not the one that the transfer began with."""

    def __init__(self) -> None:
        super().__init__("the object was replaced while it was read; start again")


def stream(
    store: Any,
    name: str,
    start: int,
    stop: int | None,
    policy: RetryPolicy,
    given_up: threading.Event | None = None,
) -> Iterator[bytes]:
    """The bytes of an object from ``start`` to ``stop`` (None: its end), in pieces of some megabytes.

    After a failure the next request begins at the byte reached, and only serves the same version of the object.

    Args:
        store: an obstore object store that does not repeat requests by itself, so that the policy counts.
        name: of the object.
        start: first byte.
        stop: the byte after the last one.
        policy: how long to try.
        given_up: once it is set, nothing is tried again.

    Raises:
        BrokenTransferError: the object does not exist, is shorter, has changed on the way, or its bytes stopped
            coming for as long as the policy allows.
    """
    transfer = _Transfer(store, name, start, stop, policy)
    gathered: list[bytes] = []
    size = failures = 0
    given_up = given_up or threading.Event()
    while not transfer.is_complete():
        began, failure = transfer.reached, None
        try:
            for piece in transfer.attempt():
                gathered.append(piece)
                size += len(piece)
                if size >= _PIECE_BYTES:
                    yield b"".join(gathered)
                    gathered, size = [], 0
        except (OSError, BaseError) as error:
            failure = error
        if transfer.is_complete():
            break
        failures = 0 if transfer.reached - began >= policy.least_bytes else failures + 1
        if failures >= policy.attempts or _is_final(failure) or given_up.is_set():
            raise BrokenTransferError(transfer.reached, failures, failure) from failure
        wait = min(policy.longest_wait, policy.first_wait * 2 ** max(0, failures - 1))
        given_up.wait(wait * (1 - secrets.randbelow(512) / 1024))
    if gathered:
        yield gathered[0] if len(gathered) == 1 else b"".join(gathered)


class _Transfer:
    """A range of an object, the byte reached in it, and what the object was like at first."""

    def __init__(self, store: Any, name: str, start: int, stop: int | None, policy: RetryPolicy) -> None:
        self._store, self._name, self._stop, self._policy = store, name, stop, policy
        self.reached = start
        self._version: tuple[str | None, int] | None = None

    def is_complete(self) -> bool:
        return self._stop is not None and self.reached >= self._stop

    def attempt(self) -> Iterator[bytes]:
        """One request for what is left: its bytes as they come."""
        try:
            answer = obstore.get(self._store, self._name, options=self._request())
        except PreconditionError as error:
            raise BrokenTransferError(self.reached, 1, ObjectChangedError()) from error
        version = answer.meta["e_tag"], answer.meta["size"]
        if self._version is None:
            self._version = version
        elif version != self._version:
            raise BrokenTransferError(self.reached, 1, ObjectChangedError())
        if self._stop is None:
            self._stop = answer.meta["size"]
        if self._stop > answer.meta["size"]:
            raise BrokenTransferError(answer.meta["size"], 1, None)
        # Pieces as small as they come: those that wait to be joined would be lost with their connection.
        pieces = answer.stream(min_chunk_size=1)
        since, brought = time.monotonic(), 0
        for piece in pieces:
            now = time.monotonic()
            self.reached += len(piece)
            brought += len(piece)
            yield piece
            # What the consumer does with a piece does not count.
            since += time.monotonic() - now
            seconds = time.monotonic() - since
            if seconds >= self._policy.read_timeout:
                if brought < self._policy.least_bytes and not self.is_complete():
                    raise TimeoutError(f"only {brought} bytes came in {seconds:.1f} seconds")
                since, brought = time.monotonic(), 0

    def _request(self) -> Any:
        options: dict[str, Any] = {}
        if self._stop is not None:
            options["range"] = (self.reached, self._stop)
        elif self.reached:
            options["range"] = {"offset": self.reached}
        tag = self._version[0] if self._version else None
        # Weak tags never match, says RFC 9110, section 13.1.1.
        if tag is not None and not tag.startswith("W/"):
            options["if_match"] = tag
        return options


def _is_final(failure: Exception | None) -> bool:
    if isinstance(failure, _FINAL):
        return True
    status = _STATUS.search(str(failure)) if failure else None
    return status is not None and 300 <= int(status[1]) < 500 and int(status[1]) not in _PASSING_REFUSALS
