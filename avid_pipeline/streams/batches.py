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
    """A sequence of batches that are made when they are asked for.

    Args:
        make: gives the batch of a number.
        count: how many there are.
    """

    def __init__(self, make: Callable[[int], Batch], count: int) -> None:
        self._make = make
        self._count = count

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, number: int) -> Batch: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[Batch]: ...
    def __getitem__(self, number: int | slice) -> Batch | Sequence[Batch]:
        wanted = range(self._count)[number]
        return self._make(wanted) if isinstance(wanted, int) else [self._make(each) for each in wanted]
