"""The data of a training run: which clips each step sees, and the loader that brings them."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from avid_pipeline.clips.failures import Failure, FailurePolicy
from avid_pipeline.clips.loader import ClipLoader
from avid_pipeline.clips.loading import open_cache, sample_fetcher
from avid_pipeline.clips.reading import TrainingChoice
from avid_pipeline.clips.settings import resolve_modalities
from avid_pipeline.errors import ManifestError
from avid_pipeline.shards_spec.manifest import Manifest, SpectrogramStatistics
from avid_pipeline.shards_spec.reader import ShardReader, open_dataset
from avid_pipeline.streams.fetching import SampleFetcher
from avid_pipeline.streams.plan import EpochPlan, plan
from avid_pipeline.streams.substitution import Substitutes
from avid_pipeline.train.config import TrainConfig


class TrainingData:
    """The clips of a run, in the order of its plan.

    Args:
        config: the run.
        root: URL of the training data.
        options: of its object store.

    Attributes:
        reader: of the data set.
        statistics: of its spectrograms.
        fingerprint: of its manifest.

    Raises:
        StorageError: the root cannot be read.
        ManifestError: it is no data set.
        ConfigError: not every sample to train on has picture and sound.
    """

    def __init__(self, config: TrainConfig, root: str, options: Mapping[str, str] | None = None) -> None:
        self.reader: ShardReader = open_dataset(root, options)
        self._config = config
        both = config.clip.model_copy(update={"modalities": ("video", "audio")})
        self._clip = resolve_modalities(both, self.reader.manifest, config.data.subset)
        self.statistics = _statistics(self.reader)
        manifest, subset = self.reader.manifest, config.data.subset
        self._instances = (
            np.arange(manifest.num_samples, dtype=np.int64) if subset is None else manifest.subset_indices(subset)
        )
        self.fingerprint = manifest.fingerprint()
        self._cache = open_cache(config.data, self.reader)

    @property
    def manifest(self) -> Manifest:
        """What the data set holds."""
        return self.reader.manifest

    @property
    def instances(self) -> NDArray[np.int64]:
        """The instances trained on, ascending: row ``i`` of the memory bank belongs to the ``i``-th."""
        return self._instances

    @property
    def num_instances(self) -> int:
        """How many instances the run trains on, which is the number of rows of its memory bank."""
        return len(self._instances)

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """The memory bank's rows of instances, int64 [B]: places among those trained on, so that no row stays noise."""
        return torch.from_numpy(np.searchsorted(self._instances, index.numpy()))

    def plan(self, epoch: int) -> EpochPlan:
        """The order of an epoch.

        Raises:
            PlanError: the data cannot be divided as the configuration asks.
        """
        data = self._config.data
        return plan(
            self.manifest,
            seed=self._config.seed,
            epoch=epoch,
            clips_per_instance=data.clips_per_instance,
            global_batch_size=data.batch_size,
            canonical_streams=data.canonical_streams,
            block_size=data.block_size,
            subset=data.subset,
        )

    def loader(
        self, epoch: int, first: int, rank: int, world_size: int, on_failure: Callable[[Failure], object]
    ) -> ClipLoader:
        """A rank's clips of an epoch from step ``first`` on.

        Args:
            epoch: from 0.
            first: step of the epoch.
            rank: of this process.
            world_size: number of processes.
            on_failure: called for every instance that cannot be decoded.
        """
        config, epoch_plan = self._config, self.plan(epoch)
        substitutes = Substitutes(epoch_plan, self._instances, config.seed, epoch, first)
        return ClipLoader(
            self.reader,
            epoch_plan.rank_batches(rank, world_size, first, config.compute.accumulate),
            self._clip,
            TrainingChoice(config.seed, epoch, config.augmentation),
            device=config.data.device,
            operators=config.data.operators,
            workers=config.data.workers,
            failures=FailurePolicy(substitutes, config.data.max_failure_rate, on_failure),
            fetcher=self._fetcher,
        )

    def _fetcher(self, reader: ShardReader) -> SampleFetcher:
        return sample_fetcher(reader, self._config.data, self._cache)


def _statistics(reader: ShardReader) -> SpectrogramStatistics:
    statistics = reader.manifest.spectrogram_statistics
    if statistics is None:
        raise ManifestError(f"{reader.storage.url}: the manifest has no spectrogram_statistics (no sound)")
    return statistics
