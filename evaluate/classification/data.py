"""What is classified: labelled training and test instances, and the batches of clips made of them."""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from avid_pipeline.clips.batch import ClipBatch
from avid_pipeline.clips.failures import Failure, FailurePolicy
from avid_pipeline.clips.loader import ClipLoader
from avid_pipeline.clips.loading import open_cache, sample_fetcher
from avid_pipeline.clips.reading import EvaluationChoice, TrainingChoice
from avid_pipeline.collectives import RankGroup
from avid_pipeline.errors import ConfigError
from avid_pipeline.evaluate.classification.config import ClassificationConfig
from avid_pipeline.evaluate.data import EvaluationData, open_data, open_fold, require_same_classes
from avid_pipeline.evaluate.extraction import leave_out
from avid_pipeline.shards_spec.manifest import Modality, SpectrogramStatistics
from avid_pipeline.streams.batches import Batch, IntArray
from avid_pipeline.streams.plan import EpochPlan, plan
from avid_pipeline.streams.substitution import Substitutes

__all__ = ["ClipSource", "InstanceBlock", "Task", "TrainingBatch", "only_label", "open_parts"]


@dataclass(frozen=True)
class TrainingBatch:
    """This rank's part of a global batch, in the order of its slots.

    Attributes:
        inputs: clips (``video`` or ``audio``) or features by layer, [B, ...].
        labels: int64 [B], the class of each.
    """

    inputs: dict[str, Tensor]
    labels: Tensor


@dataclass(frozen=True)
class InstanceBlock:
    """Neighbouring test instances, all of whose clips are classified in the same forward passes on any rank.

    Attributes:
        instances: their indices, int64 [n].
        batches: their clips, those of an instance side by side.
    """

    instances: IntArray
    batches: tuple[Batch, ...]


class Task:
    """Training and test data of one classification.

    Args:
        train: instances to learn from.
        test: instances to classify; of the same classes.
        modality: that is read.
        config: how clips are read and made.
        statistics: what sound is normalised with, in training and in tests; None for those of the training data.
        say: is told of clips that cannot be decoded.

    Attributes:
        train: as given.
        test: as given.
        modality: as given.
        clip: settings of the clips, with their modality.
        statistics: those that are used.

    Raises:
        ConfigError: the data have no classes, not the same, or lack the modality.
    """

    def __init__(
        self,
        train: EvaluationData,
        test: EvaluationData,
        modality: Modality,
        config: ClassificationConfig,
        statistics: SpectrogramStatistics | None,
        say: Callable[[str], object],
    ) -> None:
        for data in (train, test):
            data.require_classes()
        require_same_classes(train, test)
        self.train, self.test = train, test
        self.clip = train.clip_settings(config.clip, (modality,))
        test.clip_settings(config.clip, (modality,))
        self.statistics = statistics or train.manifest.spectrogram_statistics
        self._config = config
        self.modality: Modality = modality
        self._say = say
        self._caches = {id(data): open_cache(config.data, data.reader) for data in (train, test)}

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.train.classes)

    @property
    def training_choice(self) -> TrainingChoice:
        """How training clips of the first epoch are drawn."""
        return TrainingChoice(self._config.seed, 0, self._config.augmentation)

    def plan(self, epoch: int) -> EpochPlan:
        """The order of a training epoch.

        Raises:
            PlanError: the data cannot be divided as the configuration asks.
        """
        data = self._config.data
        return plan(
            self.train.manifest,
            seed=self._config.seed,
            epoch=epoch,
            clips_per_instance=data.clips_per_instance,
            global_batch_size=data.batch_size,
            canonical_streams=data.canonical_streams,
            block_size=data.block_size,
            subset=self.train.subset,
        )

    def training_batches(self, epoch: int, first: int, group: RankGroup) -> Generator[TrainingBatch, None, None]:
        """This rank's clips of an epoch from step ``first`` on.

        Raises:
            ConfigError: an instance has no label, or several.
            ShardError: a shard is damaged.
            SampleError: too many samples cannot be decoded.
        """
        seed, epoch_plan = self._config.seed, self.plan(epoch)
        substitutes = Substitutes(epoch_plan, self.train.instances, seed, epoch, first)

        def report(failure: Failure) -> None:
            self._say(f"warning: replaced by another instance: {failure.reason}")

        loader = self._loader(
            self.train,
            epoch_plan.rank_batches(group.rank, group.size, first),
            TrainingChoice(seed, epoch, self._config.augmentation),
            FailurePolicy(substitutes, self._config.data.max_failure_rate, report),
        )
        with closing(iter(loader)) as batches:
            for batch in batches:
                yield TrainingBatch({self.modality: batch[self.modality]}, self._labels(self.train, batch))

    def test_blocks(self, clips: int, group: RankGroup) -> list[InstanceBlock]:
        """This rank's share of the test instances, each once over all ranks.

        Ranks share whole blocks, so that an instance's scores do not depend on how many ranks there are.

        Args:
            clips: of each instance.
            group: the ranks.
        """
        most = self._config.test.batch_size
        size, instances = max(1, most // clips), self.test.instances
        count = -(-len(instances) // size)
        blocks = []
        for number in range(group.rank * count // group.size, (group.rank + 1) * count // group.size):
            own = instances[number * size : (number + 1) * size]
            repeated, visits = np.repeat(own, clips), np.tile(np.arange(clips, dtype=np.int64), len(own))
            starts = range(0, len(repeated), most)
            pieces = tuple(Batch(repeated[start : start + most], visits[start : start + most]) for start in starts)
            blocks.append(InstanceBlock(own, pieces))
        return blocks

    def test_batches(self, blocks: Sequence[InstanceBlock], clips: int) -> Generator[ClipBatch, None, None]:
        """The clips of these blocks, batch by batch; another instance stands where one cannot be decoded.

        Raises:
            ShardError: a shard is damaged.
            SampleError: too many clips cannot be decoded.
        """
        batches = [batch for block in blocks for batch in block.batches]
        failures = leave_out(self.test, self._config.data.max_failure_rate, self._say)
        loader = self._loader(self.test, batches, EvaluationChoice(clips), failures)
        with closing(iter(loader)) as made:
            yield from made

    def _loader(
        self,
        data: EvaluationData,
        batches: Sequence[Batch],
        choice: TrainingChoice | EvaluationChoice,
        failures: FailurePolicy,
    ) -> ClipLoader:
        loading = self._config.data
        return ClipLoader(
            data.reader,
            batches,
            self.clip,
            choice,
            statistics=self.statistics,
            device=loading.device,
            operators=loading.operators,
            workers=loading.workers,
            failures=failures,
            fetcher=partial(sample_fetcher, settings=loading, cache=self._caches[id(data)]),
        )

    def _labels(self, data: EvaluationData, batch: ClipBatch) -> Tensor:
        labels = []
        for instance, of_instance in zip(batch["index"].tolist(), batch["labels"], strict=True):
            label = only_label(data, instance, of_instance)
            if label < 0:
                raise ConfigError(f"{data.url}: training instance {instance} has no label; it cannot be learned from")
            labels.append(label)
        return torch.tensor(labels, dtype=torch.int64)


@dataclass(frozen=True)
class ClipSource:
    """Training batches of clips, in the order of the plan.

    Attributes:
        task: the data.
        group: the ranks.
        steps_per_epoch: global batches of every epoch.
    """

    task: Task
    group: RankGroup
    steps_per_epoch: int

    def batches(self, epoch: int, first: int) -> Generator[TrainingBatch, None, None]:
        """This rank's batches of an epoch from step ``first`` on."""
        return self.task.training_batches(epoch, first, self.group)


def open_parts(
    data: str, test_data: str | None, fold: int | None, options: Mapping[str, str] | None = None
) -> tuple[EvaluationData, EvaluationData]:
    """Training and test data: those of a fold, or two data sets.

    Args:
        data: root of a data set with folds, or of the training data.
        test_data: root of the test data.
        fold: from 1.
        options: of the object store.

    Raises:
        ConfigError: both or neither of ``test_data`` and ``fold`` are given, there is no such fold, or nothing is in
            a part.
        StorageError: a root cannot be read.
        ManifestError: it is no data set.
    """
    if (fold is None) == (test_data is None):
        raise ConfigError(
            f"{data}: what to test on must be said in one way: --fold N or --all-folds for a data set with folds, or "
            "--test-data for one whose test data lie elsewhere"
        )
    if fold is not None:
        return open_fold(data, fold, options)
    assert test_data is not None
    return open_data(data, options, role="train"), open_data(test_data, options, role="test")


def only_label(data: EvaluationData, instance: int, labels: Sequence[int]) -> int:
    """The class of an instance, -1 without one.

    Raises:
        ConfigError: it has several.
    """
    if len(labels) > 1:
        names = ", ".join(data.classes[label] for label in labels)
        raise ConfigError(
            f"{data.url}: instance {instance} has {len(labels)} labels ({names}), and this evaluation decides for one "
            "class; give a data set with one label for each sample"
        )
    return labels[0] if labels else -1
