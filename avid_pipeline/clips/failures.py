"""Samples that cannot be decoded although their shard is sound: counted, reported, and replaced by others."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from avid_pipeline.errors import DecodeError, SampleError

Made = TypeVar("Made")

# (number of the batch, instance, visit, attempt from 0) to the instance that takes its place.
Substitute = Callable[[int, int, int, int], int]

_ATTEMPTS = 10
# The rate of a few clips says nothing.
_LEAST_FAILURES = 10


@dataclass(frozen=True)
class Failure:
    """A sample that could not be decoded: its instance index, and why."""

    instance: int
    reason: str


class FailurePolicy:
    """Decides what becomes of clips that cannot be decoded.

    Args:
        substitute: gives an instance to take the place of another, as a pure function; None: every failure is an error.
        max_rate: share of clips that may fail; more is an error, once ten have failed.
        on_failure: called once for every instance that fails, from any thread.

    Attributes:
        clips: tried so far.
        failures: of them.
    """

    def __init__(
        self,
        substitute: Substitute | None = None,
        max_rate: float = 0.01,
        on_failure: Callable[[Failure], object] = lambda failure: None,
    ) -> None:
        self._substitute = substitute
        self._max_rate = max_rate
        self._on_failure = on_failure
        self._lock = threading.Lock()
        self._failed: set[int] = set()
        self.clips = 0
        self.failures = 0

    def make(self, number: int, instance: int, visit: int, read: Callable[[int], Made]) -> Made:
        """What ``read`` gives for the instance, or for the one that takes its place.

        Args:
            number: of the batch.
            instance: to read.
            visit: its visit.
            read: makes the clip of an instance.

        Raises:
            SampleError: it failed and nothing may take its place, or too many have failed.
        """
        chosen = instance
        for attempt in range(_ATTEMPTS):
            try:
                made = read(chosen)
            except DecodeError as error:
                self._count(chosen, error)
                if self._substitute is None:
                    raise
                chosen = self._substitute(number, instance, visit, attempt)
            else:
                with self._lock:
                    self.clips += 1
                return made
        raise SampleError(f"instance {instance}: it and {_ATTEMPTS - 1} others in its place cannot be decoded")

    def _count(self, instance: int, error: DecodeError) -> None:
        with self._lock:
            self.clips += 1
            self.failures += 1
            new = instance not in self._failed
            self._failed.add(instance)
            too_many = self.failures > max(_LEAST_FAILURES, self._max_rate * self.clips)
        if new:
            self._on_failure(Failure(instance, str(error)))
        if too_many and self._substitute is not None:
            raise SampleError(
                f"{self.failures} of {self.clips} clips could not be decoded, more than the allowed share of "
                f"{self._max_rate:g}; the last: {error}; look at the data with avid-shards validate --deep"
            ) from error
