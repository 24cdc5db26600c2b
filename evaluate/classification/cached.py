"""Frozen features that were computed once, in place of clips: training batches and tests from a feature store."""

from collections.abc import Generator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from avid_pipeline.collectives import RankGroup
from avid_pipeline.errors import ConfigError
from avid_pipeline.evaluate.classification.data import TrainingBatch
from avid_pipeline.evaluate.classification.testing import Classifier, Outcome, Tally, gather
from avid_pipeline.evaluate.data import EvaluationData
from avid_pipeline.evaluate.feature_store import Block, FeatureStore
from avid_pipeline.streams.batches import IntArray

__all__ = ["CachedSource", "cached_order", "check_labels", "classify_cached"]

# First word of the key of the generator, apart from those of the networks.
_ORDER = 202


def cached_order(blocks: Sequence[IntArray], seed: int, epoch: int, mixed: int) -> tuple[IntArray, IntArray]:
    """The order of an epoch over cached clips.

    Chunks are shuffled, and the clips of each ``mixed`` chunks that follow each other are shuffled together; the
    generator is keyed by (seed, epoch). So no more chunks are needed at a time than the groups of ``mixed`` have that a
    batch reaches into: one group or, where one ends, two.

    Args:
        blocks: the clips of each chunk, any numbers.
        seed: of the run.
        epoch: from 0.
        mixed: chunks.

    Returns:
        All clips in their order, int64 [n], and the chunk that each is of, int64 [n].
    """
    generator = np.random.default_rng([_ORDER, seed, epoch])
    shuffled = generator.permutation(len(blocks))
    clips, chunks = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
    for start in range(0, len(shuffled), mixed):
        group = shuffled[start : start + mixed]
        of_group = np.concatenate([blocks[number] for number in group])
        owners = np.repeat(group, [len(blocks[number]) for number in group])
        order = generator.permutation(len(of_group))
        clips.append(of_group[order])
        chunks.append(owners[order])
    return np.concatenate(clips), np.concatenate(chunks)


class CachedSource:
    """Training batches of cached features.

    Differently from training on clips, every epoch has the same augmented clips, those of the plan's first epoch; an
    instance may be in a batch twice; and a clip that could not be decoded is left out, not replaced.

    Args:
        store: features of training clips.
        names: classifier to the feature it is for.
        data: the training data.
        group: the ranks; each reads all chunks and takes its rows of every batch.
        batch_size: of a global batch; the last one of an epoch is dropped where it is incomplete.
        seed: of the run.
        mixed: chunks that are shuffled together.

    Raises:
        ConfigError: an instance has no label or several, or there are fewer clips than a batch has.
        StorageError: the features are missing or damaged.
    """

    def __init__(
        self,
        store: FeatureStore,
        names: dict[str, str],
        data: EvaluationData,
        group: RankGroup,
        *,
        batch_size: int,
        seed: int,
        mixed: int,
    ) -> None:
        check_labels(store, data, all_labelled=True)
        self._store, self._names, self._group = store, names, group
        self._batch_size, self._seed, self._mixed = batch_size, seed, mixed
        self._blocks = store.blocks()
        self._labels = store.labels()
        found = store.found()
        # A clip's number is its clip times the instances plus the instance's place.
        self._clips = [
            b.clip * len(store.index) + b.start + np.flatnonzero(found[b.clip, b.start : b.stop]) for b in self._blocks
        ]
        self.steps_per_epoch = sum(map(len, self._clips)) // batch_size
        if self.steps_per_epoch == 0:
            raise ConfigError(
                f"data.batch_size: {batch_size} clips in a batch, but only {sum(map(len, self._clips))} have features; "
                "choose a smaller one, or more data.clips_per_instance"
            )

    def batches(self, epoch: int, first: int) -> Generator[TrainingBatch, None, None]:
        """This rank's batches of an epoch from step ``first`` on.

        Raises:
            StorageError: the features are missing or damaged.
        """
        clips, chunks = cached_order(self._clips, self._seed, epoch, self._mixed)
        last_use = np.zeros(len(self._blocks), dtype=np.int64)
        np.maximum.at(last_use, chunks, np.arange(len(chunks)))
        loaded: dict[int, dict[str, npt.NDArray[np.generic]]] = {}
        share = self._batch_size // self._group.size
        for step in range(first, self.steps_per_epoch):
            begin = step * self._batch_size
            for number in [number for number in loaded if last_use[number] < begin]:
                del loaded[number]
            own = slice(begin + self._group.rank * share, begin + (self._group.rank + 1) * share)
            for number in np.unique(chunks[own]).tolist():
                if number not in loaded:
                    loaded[number] = self._load(self._blocks[number])
            yield self._batch(clips[own], chunks[own], loaded)

    def _load(self, block: Block) -> dict[str, npt.NDArray[np.generic]]:
        rows = slice(block.start, block.stop)
        return {name: self._store.features(feature, block.clip, rows) for name, feature in self._names.items()}

    def _batch(
        self, clips: IntArray, chunks: IntArray, loaded: dict[int, dict[str, npt.NDArray[np.generic]]]
    ) -> TrainingBatch:
        places = clips % len(self._store.index)
        inputs = {}
        for name in self._names:
            like = next(iter(loaded.values()))[name]
            values = np.empty((len(clips), like.shape[1]), dtype=like.dtype)
            for number in np.unique(chunks):
                rows = np.flatnonzero(chunks == number)
                values[rows] = loaded[int(number)][name][places[rows] - self._blocks[number].start]
            inputs[name] = torch.from_numpy(values)
        return TrainingBatch(inputs, torch.from_numpy(self._labels[places]))


def classify_cached(
    store: FeatureStore, names: dict[str, str], data: EvaluationData, classify: Classifier, group: RankGroup
) -> Outcome:
    """Classify all clips of a store of test features; every rank calls this and gets the whole.

    Args:
        store: the features.
        names: classifier to the feature it is for.
        data: the test data.
        classify: gives logits of features.
        group: the ranks, which share the instances.

    Raises:
        ConfigError: an instance has several labels.
        StorageError: the features are missing or damaged.
    """

    def own() -> Outcome:
        check_labels(store, data, all_labelled=False)
        labels, found = torch.from_numpy(store.labels()), torch.from_numpy(store.found())
        tally = Tally(tuple(names), store.clips)
        blocks = [block for block in store.blocks() if block.clip == 0]
        mine = range(group.rank * len(blocks) // group.size, (group.rank + 1) * len(blocks) // group.size)
        for rows in (slice(blocks[number].start, blocks[number].stop) for number in mine):
            of_clips = [_classify_rows(store, names, classify, clip, rows) for clip in range(store.clips)]
            logits = {name: torch.stack([of_clip[name] for of_clip in of_clips], dim=1) for name in names}
            tally.add(logits, labels[rows], found[:, rows].T)
        return tally.outcome()

    return gather(group, own)


def _classify_rows(
    store: FeatureStore, names: dict[str, str], classify: Classifier, clip: int, rows: slice
) -> dict[str, Tensor]:
    return classify({name: torch.from_numpy(store.features(feature, clip, rows)) for name, feature in names.items()})


def check_labels(store: FeatureStore, data: EvaluationData, *, all_labelled: bool) -> None:
    """Check that every instance whose features are there has one label, or none where that is allowed.

    Raises:
        ConfigError: it has not; the message names the first.
    """
    counts = np.unpackbits(store.label_sets(), axis=1).sum(axis=1)
    wrong = counts > 1
    if all_labelled:
        wrong |= (counts == 0) & store.found().any(axis=0)
    if wrong.any():
        place = int(np.flatnonzero(wrong)[0])
        raise ConfigError(
            f"{data.url}: instance {store.index[place]} has {counts[place]} labels, and this evaluation needs exactly "
            "one of each; give a data set with one label for each sample"
        )
