"""One classification from beginning to end: training, final tests, report."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from avid_pipeline.collectives import RankGroup
from avid_pipeline.evaluate.classification.config import ClassificationConfig
from avid_pipeline.evaluate.classification.data import Task
from avid_pipeline.evaluate.classification.learner import Learner, Source
from avid_pipeline.evaluate.classification.progress import EvaluationFolder
from avid_pipeline.evaluate.classification.reporting import make_report
from avid_pipeline.evaluate.classification.testing import Outcome, classify_clips
from avid_pipeline.evaluate.classification.training import Training, train
from avid_pipeline.evaluate.results import Results

__all__ = ["Classification"]


@dataclass(frozen=True)
class Classification:
    """The parts of a fine-tuning or of linear probes.

    Attributes:
        config: the settings.
        task: the data.
        folder: where progress and results go.
        group: the ranks.
        say: is told of what goes on, on the first rank, and of clips that cannot be decoded, on each.
    """

    config: ClassificationConfig
    task: Task
    folder: EvaluationFolder
    group: RankGroup
    say: Callable[[str], object]

    def run(
        self, learner: Learner, source: Source, device: torch.device, test: Callable[[], Outcome] | None = None
    ) -> Results:
        """Train, test, and write weights, report and results; every rank calls this.

        Args:
            learner: what is trained.
            source: where training batches come from.
            device: of the learner.
            test: the test after an epoch; None to classify ``test.clips_per_instance`` clips of every instance.

        Raises:
            AvidPipelineError: as :func:`~avid_pipeline.evaluate.classification.training.train` does.
        """
        settings = self.config.test
        per_epoch = test or (lambda: self._classify(learner, settings.clips_per_instance))
        training = Training(self.config, learner, source, per_epoch, self.folder, self.group, device, self.say)
        train(training)
        if self.group.rank == 0:
            clips = f"{settings.clip_level_clips} clips of each, then {settings.video_level_clips}"
            self.say(f"final test of {len(self.task.test.instances):,} instances: {clips}")
        by_clip = self._classify(learner, settings.clip_level_clips)
        by_video = self._classify(learner, settings.video_level_clips)
        report = make_report(
            self.folder.planned, self.task.test.classes, learner.names, by_clip, by_video, training.history
        )
        self.folder.finish(report, learner.module.state_dict())
        return report.results

    def _classify(self, learner: Learner, clips: int) -> Outcome:
        return classify_clips(self.task, learner.names, learner.classify, clips, self.group)
