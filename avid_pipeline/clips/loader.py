"""Batches of clips: threads read and decode ahead, torch tensors come out, in the order of the plan."""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from avid_pipeline.clips.batch import ClipBatch, Recipe
from avid_pipeline.clips.engines import Engine, Work
from avid_pipeline.clips.failures import FailurePolicy
from avid_pipeline.clips.host_engine import HostEngine
from avid_pipeline.clips.reading import ClipChoice
from avid_pipeline.clips.settings import ClipSettings, resolve_modalities
from avid_pipeline.errors import ConfigError, ManifestError
from avid_pipeline.shards_spec.manifest import Modality, SpectrogramStatistics
from avid_pipeline.shards_spec.reader import ShardReader
from avid_pipeline.shards_spec.spectrogram import NUM_FREQUENCIES
from avid_pipeline.streams.batches import Batch, IntArray
from avid_pipeline.streams.fetching import SampleFetcher

__all__ = ["ClipBatch", "ClipLoader", "evaluation_batches"]

_BATCHES_DECODED_AHEAD = 3
# A clip of the default length and size is 5 MB.
_CLIPS_DECODED_AHEAD = 96
# Requests cost no memory before they start, and how many start is the fetcher's to decide.
_BATCHES_REQUESTED_AHEAD = 8

Item = TypeVar("Item")
Result = TypeVar("Result")


class ClipLoader:
    """Loads the clips of a list of batches, in order.

    Args:
        reader: the data set.
        batches: which visits each batch holds, for example ``plan(…).rank_batches(…)``; none is larger than the first.
        clip: length and size of clips; their modalities are those that every sample has, unless given (see
            :func:`~avid_pipeline.clips.settings.resolve_modalities` for a subset).
        choice: how clips are chosen and augmented.
        statistics: of spectrograms, for normalisation; those of the data set's own manifest by default. Give the
            training set's when evaluating on another split.
        device: ``cpu`` decodes with PyAV; ``gpu`` decodes and augments with DALI on the current CUDA device.
        operators: what augments on the CPU: ``opencv``, or ``dali``, which is slower and the reference.
        workers: threads that read and decode; by default one for each core this process may use.
        failures: what becomes of samples that cannot be decoded; by default they are an error.
        fetcher: what reads the samples ahead; by default one with default buffers. It is closed after every pass.

    Raises:
        ConfigError: ``gpu`` without a CUDA device, or clip frame rates that the stored one is no multiple of.
        ManifestError: sound is wanted, but there are no spectrogram statistics.
    """

    def __init__(
        self,
        reader: ShardReader,
        batches: Sequence[Batch],
        clip: ClipSettings,
        choice: ClipChoice,
        *,
        statistics: SpectrogramStatistics | None = None,
        device: Literal["cpu", "gpu"] = "cpu",
        operators: Literal["opencv", "dali"] = "opencv",
        workers: int | None = None,
        failures: FailurePolicy | None = None,
        fetcher: Callable[[ShardReader], SampleFetcher] = SampleFetcher,
    ) -> None:
        clip = clip if clip.modalities else resolve_modalities(clip, reader.manifest)
        self._reader = reader
        self._batches = batches
        self._workers = workers or len(os.sched_getaffinity(0))
        self._fetcher = fetcher
        self.failures = failures or FailurePolicy()
        recipe = Recipe(clip, choice, *_normalisation(reader, clip.modalities or (), statistics))
        largest = len(batches[0]) if batches else 1
        self._decoded_ahead = max(1, min(_BATCHES_DECODED_AHEAD, _CLIPS_DECODED_AHEAD // largest))
        self._engine = _engine(recipe, reader, largest, self._workers, device, operators)

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Generator[ClipBatch, None, None]:
        """Yield the batches.

        Raises:
            ShardError: a shard is damaged.
            StorageError: it cannot be read.
            SampleError: a sample cannot be decoded and may not be replaced, or too many cannot.
        """
        with (
            ThreadPoolExecutor(self._workers, thread_name_prefix="clip-loader") as pool,
            self._fetcher(self._reader) as fetcher,
        ):
            numbered = enumerate(self._batches)
            requests = _ahead(
                numbered,
                lambda item: Work(*item, [fetcher.request(int(instance)) for instance in item[1].instances]),
                _BATCHES_REQUESTED_AHEAD,
            )
            started = _ahead(
                requests,
                lambda work: self._engine.start(work, pool, self._reader, self.failures),
                self._decoded_ahead,
            )
            try:
                with closing(self._engine.finish(started, len(self._batches))) as batches:
                    yield from batches
            finally:
                # What has not begun never will; what has begun ends before the threads do.
                pool.shutdown(wait=False, cancel_futures=True)


def _ahead(items: Iterator[Item], start: Callable[[Item], Result], count: int) -> Iterator[Result]:
    """Results of ``start``, which is called ``count`` items before its result is wanted."""
    waiting: deque[Result] = deque()
    for item in items:
        waiting.append(start(item))
        if len(waiting) > count:
            yield waiting.popleft()
    yield from waiting


def _engine(
    recipe: Recipe,
    reader: ShardReader,
    batch_size: int,
    workers: int,
    device: Literal["cpu", "gpu"],
    operators: Literal["opencv", "dali"],
) -> Engine:
    if device == "cpu" and operators == "opencv":
        return HostEngine(recipe)
    # DALI is imported only where it is used.
    from avid_pipeline.clips.dali_engine import DaliEngine

    return DaliEngine(recipe, reader.manifest, batch_size, workers, _cuda_device() if device == "gpu" else None)


def _normalisation(
    reader: ShardReader, modalities: tuple[Modality, ...], statistics: SpectrogramStatistics | None
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    statistics = statistics or reader.manifest.spectrogram_statistics
    if statistics is not None:
        return statistics.arrays()
    if "audio" in modalities:
        raise ManifestError(f"{reader.storage.url}: the manifest has no spectrogram_statistics (no sound)")
    return np.zeros(NUM_FREQUENCIES, dtype=np.float32), np.ones(NUM_FREQUENCIES, dtype=np.float32)


def evaluation_batches(
    instances: int | IntArray, clips_per_instance: int, batch_size: int, rank: int = 0, world_size: int = 1
) -> list[Batch]:
    """Every clip of every instance once, in order; the last batch may be smaller.

    Args:
        instances: how many there are, for all of a data set, or the indices of a subset, int64 [n].
        clips_per_instance: clips of each.
        batch_size: clips in a batch.
        rank: of this process.
        world_size: number of processes. Ranks get neighbouring runs of instances whose lengths differ by at most one,
            so that nothing is seen twice.
    """
    indices = np.arange(instances, dtype=np.int64) if isinstance(instances, int) else instances
    own = indices[rank * len(indices) // world_size : (rank + 1) * len(indices) // world_size]
    repeated = np.repeat(own, clips_per_instance)
    visits = np.tile(np.arange(clips_per_instance, dtype=np.int64), len(own))
    return [
        Batch(repeated[start : start + batch_size], visits[start : start + batch_size])
        for start in range(0, len(repeated), batch_size)
    ]


def _cuda_device() -> int:
    if not torch.cuda.is_available():
        raise ConfigError("device: gpu: torch finds no CUDA device; use device cpu")
    return torch.cuda.current_device()
