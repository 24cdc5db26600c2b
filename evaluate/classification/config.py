"""Settings of fine-tuning and of linear probes, read from YAML: see ``configs/finetune`` and ``configs/linear``."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from avid_pipeline.clips.loading import LoadingSettings
from avid_pipeline.clips.settings import AugmentationSettings, ClipSettings
from avid_pipeline.config import Settings
from avid_pipeline.optimisation import OptimizerSettings

__all__ = [
    "FREE_TO_CHANGE",
    "AccuracySettings",
    "CacheSettings",
    "ClassificationConfig",
    "ClassificationData",
    "ComputeSettings",
    "FinetuneConfig",
    "LinearConfig",
]

FREE_TO_CHANGE = frozenset(
    {
        "save_every_steps",
        "data.workers",
        "data.max_failure_rate",
        "data.connections",
        "data.read_ahead_megabytes",
        "data.cache_folder",
        "data.cache_gigabytes",
    }
)
"""Settings that may differ when an interrupted evaluation goes on, for they do not change its numbers."""

Layer = Literal["conv2x", "conv3x", "conv4x", "conv5x", "pool"]


class ClassificationData(LoadingSettings):
    """How training clips are read, and in which order.

    Attributes:
        batch_size: clips in a step, over all ranks.
        clips_per_instance: visits of every training instance in an epoch.
        canonical_streams: into at least how many streams the order is cut; see ``docs/streaming.md``.
        block_size: neighbouring instances that a stream reads in a row.
    """

    batch_size: int = Field(ge=1)
    clips_per_instance: int = Field(1, ge=1)
    canonical_streams: int = Field(64, ge=1)
    block_size: int = Field(8, ge=1)


class ComputeSettings(Settings):
    """How a step is computed.

    Attributes:
        precision: of the network and the classifiers; ``bfloat16`` is autocast, ``float64`` is for comparing runs.
        channels_last: memory layout of pictures and features; faster on GPUs.
    """

    precision: Literal["float32", "bfloat16", "float64"] = "float32"
    channels_last: bool = False


class AccuracySettings(Settings):
    """How test instances are classified; their clips are spread evenly over each.

    Attributes:
        every: epochs between two tests while training; there always is one after the last.
        clips_per_instance: clips of each test instance in those.
        clip_level_clips: clips of each that the final Clip@k are the mean over.
        video_level_clips: clips of each whose softmax is averaged for the final Video@k.
        batch_size: clips in a forward pass, on each rank.
    """

    every: int = Field(1, ge=1)
    clips_per_instance: int = Field(1, ge=1)
    clip_level_clips: int = Field(25, ge=1)
    video_level_clips: int = Field(10, ge=1)
    batch_size: int = Field(32, ge=1)


class ClassificationConfig(Settings):
    """What fine-tuning and linear probes have in common.

    Attributes:
        seed: of every random choice.
        epochs: passes over the training data; of the whole network, in fine-tuning.
        clip: length and size of clips; which modality they have is not for it to say.
        augmentation: of training clips.
        data: how training clips are read.
        optimizer: of the training; a new one for each stage of it.
        compute: how a step is computed.
        test: how test instances are classified.
        save_every_steps: steps between two saves within an epoch, beside the one after it; None for none.
    """

    seed: int = Field(0, ge=0)
    epochs: int = Field(ge=1)
    clip: ClipSettings = ClipSettings()
    augmentation: AugmentationSettings = AugmentationSettings()
    data: ClassificationData
    optimizer: OptimizerSettings
    compute: ComputeSettings = ComputeSettings()
    test: AccuracySettings = AccuracySettings()
    save_every_steps: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _no_idle_settings(self) -> Self:
        if self.clip.modalities is not None:
            raise ValueError(
                "clip.modalities has no meaning here: fine-tuning reads the picture, a linear probe what its "
                "modality says; leave it out"
            )
        return self

    def plain(self, **more: Any) -> dict[str, Any]:
        """The settings as plain data, for results, with further ones."""
        return self.model_dump(mode="json") | more


class FinetuneConfig(ClassificationConfig):
    """Fine-tuning of the whole video network (paper, section 5).

    Attributes:
        classifier_epochs: passes before the others in which the classifier alone learns, at the optimizer's first rate.
        dropout: share of the pooled features that a training step leaves out.
    """

    classifier_epochs: int = Field(5, ge=0)
    dropout: float = Field(0.5, ge=0, lt=1)


class CacheSettings(Settings):
    """Frozen features that are computed once (``--cache-features``).

    Attributes:
        dtype: that they are stored as.
        mixed_chunks: chunks, of one clip of 256 instances each, whose clips are shuffled together; for a moment, twice
            as many are in memory. A chunk of all four layers is 18 MB in float16.
    """

    dtype: Literal["float16", "float32"] = "float16"
    mixed_chunks: int = Field(16, ge=1)


class LinearConfig(ClassificationConfig):
    """One linear classifier on each of some layers of a frozen network (paper, section 5).

    Attributes:
        modality: whose network is probed.
        layers: that get a classifier each, trained together.
        cache: used with ``--cache-features`` alone.
    """

    modality: Literal["video", "audio"] = "video"
    layers: tuple[Layer, ...] = Field(("conv2x", "conv3x", "conv4x", "conv5x"), min_length=1)
    cache: CacheSettings = CacheSettings()

    @property
    def features(self) -> dict[str, str]:
        """Layer to the name of its features in :mod:`avid_pipeline.evaluate.layers`."""
        return {layer: f"{self.modality}.{layer}" for layer in self.layers}

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if len(set(self.layers)) != len(self.layers):
            raise ValueError(f"layers: expected each once, found {', '.join(self.layers)}")
        if self.data.batch_size < 2:
            raise ValueError("data.batch_size: expected at least 2, for batch norm compares clips; found 1")
        return self
