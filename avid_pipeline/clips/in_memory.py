"""Clips of samples that are in memory already, made as :class:`~avid_pipeline.clips.loader.ClipLoader` makes them."""

import os
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import cast

from avid_pipeline.clips.batch import ClipBatch, Recipe
from avid_pipeline.clips.engines import Work
from avid_pipeline.clips.failures import FailurePolicy
from avid_pipeline.clips.host_engine import HostEngine
from avid_pipeline.shards_spec.reader import ShardReader
from avid_pipeline.shards_spec.sample import Sample
from avid_pipeline.streams.batches import Batch

__all__ = ["clips_in_memory"]


class _Samples:
    """Samples where a data set is expected: an instance is a place in the list."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self._samples = samples

    def read(self, index: int) -> Sample:
        return self._samples[index]


def clips_in_memory(
    samples: Sequence[Sample], batches: Sequence[Batch], recipe: Recipe, workers: int | None = None
) -> Generator[ClipBatch, None, None]:
    """Yield the clips of a list of batches, in order; on the CPU.

    Args:
        samples: as they lie in shards.
        batches: which clips each batch holds; an instance is a place in ``samples``.
        recipe: what clips are made of; every sample has its modalities.
        workers: threads that decode; by default one for each core this process may use.

    Raises:
        ManifestError: a sample lacks a modality of the recipe.
        SampleError: a sample cannot be decoded.
    """
    engine = HostEngine(recipe)
    # Reading instances is all that the engine asks of a reader.
    reader = cast(ShardReader, _Samples(samples))
    failures = FailurePolicy()
    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0)), thread_name_prefix="clips") as pool:
        started = (
            engine.start(Work(number, batch, [None] * len(batch)), pool, reader, failures)
            for number, batch in enumerate(batches)
        )
        with closing(engine.finish(started, len(batches))) as finished:
            yield from finished
