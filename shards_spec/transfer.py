"""Reading from object stores over networks that break: a transfer goes on at the byte that it reached."""

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
    PreconditionError,
)


@dataclass(frozen=True)
class RetryPolicy:
    """How long broken reads are tried again.

    Attributes:
        attempts: in a row that bring no byte; every byte begins the count anew.
        first_wait: seconds before the second attempt; each later wait is twice as long.
        longest_wait: seconds, at most.
        requests: times that the store's client repeats one request by itself, for example after a status of 500 or
            503, with waits of its own.
        read_timeout: seconds without a byte after which a connection counts as broken.
    """

    attempts: int = 4
    first_wait: float = 0.2
    longest_wait: float = 15.0
    requests: int = 8
    read_timeout: float = 30.0


class BrokenTransferError(Exception):
    """A read that failed for good.

    Attributes:
        reached: the byte offset up to which content arrived.
        cause: the last failure; None where the object ended too soon.
    """

    def __init__(self, reached: int, cause: Exception | None) -> None:
        super().__init__(str(cause) if cause else "the object ends there")
        self.reached = reached
        self.cause = cause


def stream(store: Any, name: str, start: int, stop: int | None, policy: RetryPolicy) -> Iterator[bytes]:
    """The bytes of an object from ``start`` to ``stop`` (None: its end), in pieces of some megabytes.

    After a failure the next request begins at the byte reached, and only serves the same version of the object.

    Raises:
        BrokenTransferError: the object does not exist, is shorter, has changed on the way, or its bytes stopped
            coming for as long as the policy allows.
    """
    reached, failures = start, 0
    version: str | None = None
    while stop is None or reached < stop:
        failure: Exception | None = None
        try:
            answer = obstore.get(store, name, options=_request(reached, stop, version))
            version = answer.meta["e_tag"]
            stop = answer.meta["size"] if stop is None else stop
            if stop > answer.meta["size"]:
                raise BrokenTransferError(answer.meta["size"], None)
            for piece in answer.stream(min_chunk_size=_PIECE_BYTES):
                data = bytes(piece)
                reached += len(data)
                failures = 0
                yield data
        except _FINAL as error:
            raise BrokenTransferError(reached, error) from error
        except (OSError, BaseError) as error:
            failure = error
        if stop is not None and reached >= stop:
            return
        failures += 1
        if failures >= policy.attempts:
            raise BrokenTransferError(reached, failure) from failure
        time.sleep(min(policy.longest_wait, policy.first_wait * 2 ** (failures - 1)))


def _request(start: int, stop: int | None, version: str | None) -> Any:
    options: dict[str, Any] = {}
    if stop is not None:
        options["range"] = (start, stop)
    # Weak tags never match, says RFC 9110, section 13.1.1.
    if version is not None and not version.startswith("W/"):
        options["if_match"] = version
    return options
