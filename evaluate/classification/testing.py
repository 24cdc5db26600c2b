"""Classifying test instances: every clip of every instance once, over all ranks."""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor
from tqdm import tqdm

from avid_pipeline.clips.batch import ClipBatch
from avid_pipeline.collectives import RankGroup
from avid_pipeline.evaluate.classification.data import InstanceBlock, Task, only_label
from avid_pipeline.evaluate.metrics import (
    TopAccuracy,
    accuracy_of_places,
    confusion_counts,
    label_places,
    mean_class_accuracy,
    predicted_classes,
    video_scores,
)
from avid_pipeline.together import run_together

__all__ = ["KS", "Classifier", "Outcome", "Tally", "classify_clips", "gather"]

KS = (1, 5)

Classifier = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
"""Clips (``video`` or ``audio``) to logits [B, C] on the CPU, by the name of the classifier."""


@dataclass(frozen=True)
class Outcome:
    """How N test instances were classified from V clips each, in the order of their indices.

    Places are those of the true class by :func:`~avid_pipeline.evaluate.metrics.label_places`; 0 for what was left out.

    Attributes:
        labels: int64 [N]; -1 without label, or where no clip could be decoded.
        found: bool [N, V], False for clips that could not be decoded.
        clip_places: classifier to int64 [N, V].
        video_places: classifier to int64 [N], by the mean softmax of the clips.
        predicted: classifier to int64 [N], likewise.
    """

    labels: Tensor
    found: Tensor
    clip_places: dict[str, Tensor]
    video_places: dict[str, Tensor]
    predicted: dict[str, Tensor]

    @property
    def undecodable(self) -> int:
        """Instances none of whose clips could be decoded."""
        return int((~self.found.any(1)).sum())

    @property
    def unlabelled(self) -> int:
        """Instances that were read and have no label."""
        return int((self.found.any(1) & (self.labels < 0)).sum())

    def clip_accuracy(self, name: str) -> TopAccuracy:
        """Of a classifier, each clip by itself, at :data:`KS`."""
        return accuracy_of_places(self.clip_places[name], KS)

    def video_accuracy(self, name: str) -> TopAccuracy:
        """Of a classifier, by the mean softmax of each instance's clips, at :data:`KS`."""
        return accuracy_of_places(self.video_places[name], KS)

    def confusion(self, name: str, num_classes: int) -> Tensor:
        """Counts of instances, int64 [C, C], rows the true class, columns the predicted one."""
        return confusion_counts(self.predicted[name], self.labels, num_classes)

    def mean_class_accuracy(self, name: str, num_classes: int) -> float | None:
        """Mean over classes of the share of instances that were recognised."""
        return mean_class_accuracy(self.confusion(name, num_classes))


@dataclass
class Tally:
    """Collects an :class:`Outcome` from blocks of instances.

    Attributes:
        names: of the classifiers.
        clips: V.
        parts: outcomes of the blocks so far.
    """

    names: Sequence[str]
    clips: int
    parts: list[Outcome] = field(default_factory=list)

    def add(self, logits: Mapping[str, Tensor], labels_N: Tensor, found_NV: Tensor) -> None:
        """Count a block.

        Args:
            logits: classifier to float [N, V, C].
            labels_N: int64 [N], -1 without one.
            found_NV: bool [N, V].
        """
        decoded_N = found_NV.any(1)
        labels_N = torch.where(decoded_N, labels_N, -1)
        clip_places, video_places, predicted = {}, {}, {}
        for name in self.names:
            of_clips = label_places(logits[name].flatten(0, 1), labels_N.repeat_interleave(self.clips))
            clip_places[name] = of_clips.view(-1, self.clips) * found_NV
            scores = video_scores(logits[name], found_NV)
            video_places[name] = label_places(scores, labels_N)
            predicted[name] = predicted_classes(scores, labels_N)
        self.parts.append(Outcome(labels_N, found_NV, clip_places, video_places, predicted))

    def outcome(self) -> Outcome:
        """Of all blocks, in the order in which they were added."""
        empty, none = torch.zeros(0, dtype=torch.int64), torch.zeros(0, self.clips, dtype=torch.int64)
        start = Outcome(
            empty,
            none.bool(),
            dict.fromkeys(self.names, none),
            dict.fromkeys(self.names, empty),
            dict.fromkeys(self.names, empty),
        )
        return _joined([start, *self.parts])


def classify_clips(task: Task, names: Sequence[str], classify: Classifier, clips: int, group: RankGroup) -> Outcome:
    """Classify so many clips of every test instance; every rank calls this and gets the whole.

    Args:
        task: its test data.
        names: of the classifiers.
        classify: gives their logits; it must be the same on all ranks.
        clips: of each instance.
        group: the ranks, which share the instances.

    Raises:
        ConfigError: an instance has several labels.
        ShardError: a shard is damaged.
        SampleError: too many clips cannot be decoded.
    """

    def own() -> Outcome:
        blocks = task.test_blocks(clips, group)
        tally = Tally(names, clips)
        hidden = group.rank > 0 or not sys.stderr.isatty()
        total = sum(len(block.batches) for block in blocks)
        with (
            closing(task.test_batches(blocks, clips)) as made,
            tqdm(made, total=total, unit="batch", disable=hidden, desc="test", leave=False) as bar,
        ):
            batches = iter(bar)
            for block in blocks:
                _classify_block(task, block, islice(batches, len(block.batches)), classify, tally)
        return tally.outcome()

    return gather(group, own)


def gather(group: RankGroup, own: Callable[[], Outcome]) -> Outcome:
    """The outcomes of all ranks, whose instances follow each other in the order of ranks.

    Args:
        group: the ranks; each must call this.
        own: gives this rank's part; it must not wait for other ranks.

    Raises:
        AvidPipelineError: ``own`` failed on a rank.
    """
    return _joined(run_together(group, own))


def _joined(parts: Sequence[Outcome]) -> Outcome:
    def join(of: Callable[[Outcome], dict[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.cat([of(part)[name] for part in parts]) for name in of(parts[0])}

    return Outcome(
        torch.cat([part.labels for part in parts]),
        torch.cat([part.found for part in parts]),
        join(lambda part: part.clip_places),
        join(lambda part: part.video_places),
        join(lambda part: part.predicted),
    )


def _classify_block(
    task: Task, block: InstanceBlock, batches: Iterable[ClipBatch], classify: Classifier, tally: Tally
) -> None:
    pieces: list[dict[str, Tensor]] = []
    index: list[Tensor] = []
    labels: list[tuple[int, ...]] = []
    for batch in batches:
        pieces.append(classify({task.modality: batch[task.modality]}))
        index.append(batch["index"])
        labels += batch["labels"]
    count, clips = len(block.instances), tally.clips
    logits = {name: torch.cat([piece[name] for piece in pieces]).view(count, clips, -1) for name in tally.names}
    # Another instance stands where one could not be decoded.
    found = torch.cat(index).view(count, clips) == torch.from_numpy(block.instances)[:, None]
    classes = torch.full_like(found, -1, dtype=torch.int64)
    for row, clip in found.nonzero().tolist():
        classes[row, clip] = only_label(task.test, int(block.instances[row]), labels[row * clips + clip])
    tally.add(logits, classes.amax(1), found)
