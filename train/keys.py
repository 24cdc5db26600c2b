"""Keys of random generators: every stream of random numbers in training has a name and a place."""

from __future__ import annotations

import zlib

import numpy as np

__all__ = ["derive_key"]


def derive_key(seed: int, purpose: str, *place: int) -> int:
    """Derives a 64-bit key for one generator from the run's seed, what it is for and where it is used.

    Args:
        seed: Seed of the training run, not negative.
        purpose: Name of the stream, for example ``"negatives"``; other names give unrelated numbers.
        *place: Counters within the stream, for example the step; not negative.

    Returns:
        A key in ``[0, 2**64)``, the same on every machine.
    """
    sequence = np.random.SeedSequence((seed, zlib.crc32(purpose.encode()), *place))
    return int(sequence.generate_state(1, np.uint64)[0])
