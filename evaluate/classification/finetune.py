"""Fine-tuning of the video network (paper, section 5)."""

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from avid_pipeline.collectives import RankGroup
from avid_pipeline.embedding import evaluation_mode
from avid_pipeline.errors import ConfigError
from avid_pipeline.evaluate.checkpoint import EvaluatedModel
from avid_pipeline.evaluate.classification.config import FinetuneConfig
from avid_pipeline.evaluate.classification.data import ClipSource, Task
from avid_pipeline.evaluate.classification.learner import Stage, autocast, weights_dtype
from avid_pipeline.evaluate.classification.networks import FinetunedNetwork, dropout_mask
from avid_pipeline.evaluate.classification.progress import EvaluationFolder
from avid_pipeline.evaluate.classification.reporting import planned_results
from avid_pipeline.evaluate.classification.run import Classification
from avid_pipeline.evaluate.data import EvaluationData
from avid_pipeline.evaluate.results import Results
from avid_pipeline.models.video import R2Plus1D
from avid_pipeline.optimisation import learning_rate
from avid_pipeline.shards_spec.storage import Storage

__all__ = ["NETWORK", "Finetuning", "run_finetune"]

NETWORK = "network"
"""Name of the one classifier in results."""

# By how much the last layer of R(2+1)D is shorter, and less high and wide, than the clip.
_SHRINKS_TIME, _SHRINKS_SIDE = 8, 32


def run_finetune(
    config: FinetuneConfig,
    evaluated: EvaluatedModel,
    train_data: EvaluationData,
    test_data: EvaluationData,
    output: Storage,
    group: RankGroup,
    *,
    say: Callable[[str], object],
    overwrite: bool = False,
) -> Results:
    """Fine-tune the video network and classify the test data; every rank calls this.

    First the classifier alone learns, on the frozen network, whose batch norms keep their statistics; then everything.
    The same call goes on where an earlier one stopped, and only gives the results where that was done.

    Args:
        config: the settings.
        evaluated: the model; it is left as it is.
        train_data: instances to learn from.
        test_data: instances to classify.
        output: folder of this fine-tuning alone; the same on all ranks.
        group: the ranks, which share every batch.
        say: is told of epochs, on the first rank, and of clips that cannot be decoded, on each.
        overwrite: remove what an earlier evaluation left in ``output``, and begin anew.

    Returns:
        The results, as they are in ``output``.

    Raises:
        ConfigError: the data lack classes, labels or pictures, the settings do not fit, or ``output`` holds something
            else.
        CheckpointError: the progress in ``output`` is damaged.
        PlanError: the data or the batch cannot be divided as asked.
        AvidPipelineError: the data cannot be read, or ``output`` not written.
    """
    task = Task(train_data, test_data, "video", config, None, say)
    folder = EvaluationFolder(output, planned_results("finetune", evaluated, task, config.plain()), group)
    done = folder.begin(overwrite=overwrite)
    if done is not None:
        return done
    first_epoch = task.plan(0)
    first_epoch.check_world_size(group.size)
    _check_batch_norm(config)
    learner = Finetuning(config, evaluated.model.video_model, task.num_classes, first_epoch.num_batches, group)
    source = ClipSource(task, group, first_epoch.num_batches)
    return Classification(config, task, folder, group, say).run(learner, source, learner.device)


def _check_batch_norm(config: FinetuneConfig) -> None:
    """Refuse a lone clip of which nothing is left in the last layer to take a mean over."""
    shrunk = -(-config.clip.num_frames // _SHRINKS_TIME), -(-config.clip.crop_size // _SHRINKS_SIDE)
    if config.data.batch_size == 1 and shrunk == (1, 1):
        raise ConfigError(
            f"data.batch_size: 1 clip of {config.clip.num_frames} frames of {config.clip.crop_size} pixels is a single "
            "value in the last layer, which batch norm cannot normalise; take more clips, or larger ones"
        )


class Finetuning:
    """The network and its classifier, and the two stages in which they learn.

    Args:
        config: the settings.
        network: pre-trained; it is copied.
        num_classes: C.
        steps_per_epoch: of both stages.
        group: the ranks.

    Attributes:
        module: network and classifier.
        names: :data:`NETWORK` alone.
        stages: the classifier's, then the whole network's.
        device: of the module.
    """

    def __init__(
        self, config: FinetuneConfig, network: R2Plus1D, num_classes: int, steps_per_epoch: int, group: RankGroup
    ) -> None:
        self.device = next(network.parameters()).device
        model = FinetunedNetwork(copy.deepcopy(network), num_classes, config.seed)
        self._model = model.to(self.device, weights_dtype(config.compute))
        if config.compute.channels_last:
            self._model.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        self.module: nn.Module = self._model
        self.names: tuple[str, ...] = (NETWORK,)
        optimizer = config.optimizer

        def rate(step: int) -> float:
            return learning_rate(optimizer, step, steps_per_epoch, config.epochs)

        self.stages: tuple[Stage, ...] = (
            Stage("classifier", config.classifier_epochs, self._model.classifier, lambda step: optimizer.learning_rate),
            Stage("network", config.epochs, self._model, rate),
        )
        self._config = config
        self._group = group

    def logits(self, stage: Stage, network: nn.Module, inputs: Mapping[str, Tensor], step: int) -> dict[str, Tensor]:
        """See :class:`~avid_pipeline.evaluate.classification.learner.Learner`."""
        video_BCTHW = inputs["video"]
        mask_BF = self._own_mask(len(video_BCTHW), step)
        if stage is self.stages[1]:
            return {NETWORK: network(video_BCTHW, mask_BF)}
        with torch.no_grad():
            features_BF = self._model.network(video_BCTHW)
        return {NETWORK: network(features_BF * mask_BF)}

    def classify(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Logits [B, C] of clips as the network is now, in evaluation mode, on the CPU."""
        video_BCTHW = inputs["video"].to(self.device, weights_dtype(self._config.compute), non_blocking=True)
        with evaluation_mode(self._model), torch.inference_mode(), autocast(self._config.compute, self.device):
            return {NETWORK: self._model(video_BCTHW).float().cpu()}

    def _own_mask(self, clips: int, step: int) -> Tensor:
        """This rank's rows of the step's dropout mask."""
        config, first = self._config, self._group.rank * clips
        mask_BF = dropout_mask(config.dropout, config.data.batch_size, R2Plus1D.out_channels, config.seed, step)
        return mask_BF[first : first + clips].to(self.device, weights_dtype(config.compute), non_blocking=True)
