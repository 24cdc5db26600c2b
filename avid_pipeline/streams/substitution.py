"""Which instance takes the place of one that cannot be decoded: a pure function, the same for every rank."""

from functools import lru_cache

import numpy as np

from avid_pipeline.streams.batches import IntArray
from avid_pipeline.streams.plan import EpochPlan

# First word of the key of the generator, apart from those of the plan.
_SUBSTITUTE = 100


class Substitutes:
    """Draws instances that are not in the global batch already.

    The draw is keyed by (seed, epoch, instance, visit, attempt). Two instances of one global batch may get the same
    substitute; the memory bank resolves that as it resolves any repeated instance.

    Args:
        epoch_plan: of the epoch.
        instances: int64 [n], those to draw from.
        seed: of the training run.
        epoch: its number.
        first: the step of the epoch that the loader's first batch belongs to.
    """

    def __init__(self, epoch_plan: EpochPlan, instances: IntArray, seed: int, epoch: int, first: int = 0) -> None:
        self._instances = instances
        self._key = (_SUBSTITUTE, seed, epoch)
        self._in_batch = lru_cache(maxsize=16)(
            lambda number: frozenset(epoch_plan.global_batch(first + number).instances.tolist())
        )

    def __call__(self, number: int, instance: int, visit: int, attempt: int) -> int:
        """The substitute of an instance in batch ``number`` of the loader; itself where there is no other."""
        taken = self._in_batch(number)
        generator = np.random.default_rng([*self._key, instance, visit, attempt])
        if len(self._instances) > 2 * len(taken):
            while True:
                drawn = int(self._instances[generator.integers(len(self._instances))])
                if drawn not in taken:
                    return drawn
        free = [other for other in self._instances.tolist() if other not in taken]
        return int(free[generator.integers(len(free))]) if free else instance
