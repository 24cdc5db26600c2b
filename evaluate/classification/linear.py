"""Linear probes: a classifier on each of some layers of a frozen network (paper, section 5)."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from avid_pipeline.collectives import RankGroup
from avid_pipeline.embedding import evaluation_mode
from avid_pipeline.evaluate.checkpoint import EvaluatedModel
from avid_pipeline.evaluate.classification.config import LinearConfig
from avid_pipeline.evaluate.classification.data import ClipSource, Task
from avid_pipeline.evaluate.classification.feature_cache import FeatureCache
from avid_pipeline.evaluate.classification.learner import Stage, autocast, weights_dtype
from avid_pipeline.evaluate.classification.networks import LinearHeads
from avid_pipeline.evaluate.classification.progress import EvaluationFolder
from avid_pipeline.evaluate.classification.reporting import planned_results
from avid_pipeline.evaluate.classification.run import Classification
from avid_pipeline.evaluate.data import EvaluationData
from avid_pipeline.evaluate.layers import compute_features, feature_dim
from avid_pipeline.evaluate.results import Results
from avid_pipeline.models import AVModel
from avid_pipeline.optimisation import learning_rate
from avid_pipeline.shards_spec.manifest import fingerprint
from avid_pipeline.shards_spec.storage import Storage

__all__ = ["LinearProbes", "run_linear"]


def run_linear(
    config: LinearConfig,
    evaluated: EvaluatedModel,
    train_data: EvaluationData,
    test_data: EvaluationData,
    output: Storage,
    group: RankGroup,
    *,
    say: Callable[[str], object],
    cache_features: bool = False,
    overwrite: bool = False,
    options: Mapping[str, str] | None = None,
) -> Results:
    """Train linear classifiers of frozen features and classify the test data; every rank calls this.

    The same call goes on where an earlier one stopped, and only gives the results where that was done.

    Args:
        config: the settings.
        evaluated: the model; it is left as it is.
        train_data: instances to learn from.
        test_data: instances to classify.
        output: folder of this evaluation alone; the same on all ranks.
        group: the ranks, which share every batch.
        say: is told of epochs, on the first rank, and of clips that cannot be decoded, on each.
        cache_features: compute the features of the training clips, and of the clips of the tests between epochs, once
            into ``output``, and train on them.
        overwrite: remove what an earlier evaluation left in ``output``, and begin anew; cached features that fit stay.
        options: of the object store that ``output`` is in.

    Returns:
        The results, as they are in ``output``.

    Raises:
        ConfigError: the data lack classes, labels or the modality, the settings do not fit, or ``output`` holds
            something else.
        CheckpointError: the progress in ``output`` is damaged.
        PlanError: the data or the batch cannot be divided as asked.
        AvidPipelineError: the data cannot be read, or ``output`` not written.
    """
    task = Task(train_data, test_data, config.modality, config, evaluated.statistics, say)
    sound = None if config.modality != "audio" or task.statistics is None else task.statistics.model_dump(mode="json")
    settings = config.plain(cache_features=cache_features, sound_statistics=sound and fingerprint(sound))
    folder = EvaluationFolder(output, planned_results("linear", evaluated, task, settings), group)
    done = folder.begin(overwrite=overwrite)
    if done is not None:
        return done
    first_epoch = task.plan(0)
    first_epoch.check_world_size(group.size)
    model = copy.deepcopy(evaluated.model).eval().to(weights_dtype(config.compute))
    if config.compute.channels_last:
        model.to(memory_format=torch.channels_last_3d)
    evaluated = replace(evaluated, model=model, statistics=task.statistics)
    classification = Classification(config, task, folder, group, say)
    if not cache_features:
        probes = LinearProbes(config, model, task.num_classes, first_epoch.num_batches)
        return classification.run(probes, ClipSource(task, group, first_epoch.num_batches), probes.device)
    cache = FeatureCache(evaluated, task, config, output, group, say, options)
    if overwrite:
        cache.remove_others()
    source = cache.training_source()
    probes = LinearProbes(config, model, task.num_classes, source.steps_per_epoch)
    return classification.run(probes, source, probes.device, cache.test(probes.classify))


class LinearProbes:
    """A frozen network and a classifier on each of some of its layers.

    Args:
        config: the settings.
        model: the network's.
        num_classes: C.
        steps_per_epoch: of the training.

    Attributes:
        module: the classifiers.
        names: the layers.
        stages: one.
        device: of all.
    """

    def __init__(self, config: LinearConfig, model: AVModel, num_classes: int, steps_per_epoch: int) -> None:
        self.device = next(model.parameters()).device
        dims = {layer: feature_dim(feature, model) for layer, feature in config.features.items()}
        self._dtype = weights_dtype(config.compute)
        self._heads = LinearHeads(dims, num_classes, config.seed).to(self.device, self._dtype)
        self._model = model
        self._config = config
        self.module: nn.Module = self._heads
        self.names: tuple[str, ...] = config.layers

        def rate(step: int) -> float:
            return learning_rate(config.optimizer, step, steps_per_epoch, config.epochs)

        self.stages: tuple[Stage, ...] = (Stage("heads", config.epochs, self._heads, rate),)

    def logits(self, stage: Stage, network: nn.Module, inputs: Mapping[str, Tensor], step: int) -> dict[str, Tensor]:
        """See :class:`~avid_pipeline.evaluate.classification.learner.Learner`; inputs are clips or cached features."""
        return self._apply(network, self._features(inputs))

    def classify(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Logits [B, C] by layer of clips or cached features, as the classifiers are now, on the CPU."""
        on_device = {name: values.to(self.device, self._dtype, non_blocking=True) for name, values in inputs.items()}
        with evaluation_mode(self._heads), torch.no_grad():
            return {name: logits.cpu() for name, logits in self._apply(self._heads, self._features(on_device)).items()}

    def _features(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Features [B, F] by layer, of the type of the classifiers' weights."""
        if self._config.modality not in inputs:
            return dict(inputs)
        with torch.no_grad(), autocast(self._config.compute, self.device):
            features = compute_features(self._model, tuple(self._config.features.values()), inputs)
        return {layer: features[feature].to(self._dtype) for layer, feature in self._config.features.items()}

    def _apply(self, heads: nn.Module, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # Never in bfloat16: the classifiers are small.
        with torch.autocast(self.device.type, enabled=False):
            logits: dict[str, Tensor] = heads(features)
        return logits
