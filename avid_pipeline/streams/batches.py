"""What a step reads: a batch of visits, and long sequences of batches that are made when asked for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """Which visits a batch holds: instance indices and visit numbers, both int64 [size]."""

    instances: IntArray
    visits: IntArray

    def __len__(self) -> int:
        return len(self.instances)


class LazyBatches(Sequence[Batch]):
    """A sequence of batches that are made when they are asked for; so are those of its slices.

    Args:
        make: gives the batch of a number.
        numbers: of the batches, in their order.
    """

    def __init__(self, make: Callable[[int], Batch], numbers: range) -> None:
        self._make = make
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, place: int) -> Batch: ...
    @overload
    def __getitem__(self, place: slice) -> "LazyBatches": ...
    def __getitem__(self, place: int | slice) -> "Batch | LazyBatches":
        wanted = self._numbers[place]
        return self._make(wanted) if isinstance(wanted, int) else LazyBatches(self._make, wanted)
