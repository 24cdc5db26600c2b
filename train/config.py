"""Everything a training run is made of, as typed settings read from YAML."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from avid_pipeline.clips.loading import LoadingSettings
from avid_pipeline.clips.settings import AugmentationSettings, ClipSettings
from avid_pipeline.config import Settings
from avid_pipeline.optimisation import OptimizerSettings

AgreementKind = Literal["consensus", "union", "video", "audio"]

# What may differ when a run is resumed, for a resumed run must equal an undisturbed one.
_FREE_TO_CHANGE = (
    "epochs",
    "start_from",
    "log_every",
    "checkpoint",
    "evaluation",
    "compute.compile",
    "memory.init",
    "data.workers",
    "data.max_failure_rate",
    "data.connections",
    "data.read_ahead_megabytes",
    "data.cache_folder",
    "data.cache_gigabytes",
)


class ModelSettings(Settings):
    """The networks.

    Attributes:
        video_depth: depth of R(2+1)D: 10, 18 or 34.
        projection: sizes of the layers of each projection head; the last is the embedding's.
        batch_norm_clips: clips that are normalised together while training, at most: several groups on a rank, or one
            over several ranks, so that the number of ranks does not change the result. None for the whole batch.
    """

    video_depth: Literal[10, 18, 34] = 18
    projection: tuple[Annotated[int, Field(ge=1)], ...] = Field((512, 512, 128), min_length=1)
    batch_norm_clips: int | None = Field(None, ge=1)


class DataSettings(LoadingSettings):
    """How the data are read, and in which order.

    Attributes:
        batch_size: clips in a step, over all ranks.
        clips_per_instance: visits of every instance in an epoch.
        canonical_streams: into at least how many streams the order is cut; see ``docs/streaming.md``.
        block_size: neighbouring instances that a stream reads in a row.
        subset: named subset of the data set to train on, for example ``with-audio``; None for all.
    """

    batch_size: int = Field(ge=1)
    clips_per_instance: int = Field(1, ge=1)
    canonical_streams: int = Field(64, ge=1)
    block_size: int = Field(8, ge=1)
    subset: str | None = None


class LossSettings(Settings):
    """Noise-contrastive estimation of instances (paper, section 3).

    Attributes:
        num_negatives: negatives of each clip.
        temperature: of the scores.
        cross: weight of the terms between modalities.
        within: weight of the terms within a modality.
    """

    num_negatives: int = Field(1024, ge=1)
    temperature: float = Field(0.07, gt=0)
    cross: float = Field(1.0, ge=0)
    within: float = Field(0.0, ge=0)


class AgreementSettings(Settings):
    """Cross-modal agreement: AVID+CMA, which has other instances as positives beside the own one (paper, section 4).

    Attributes:
        kind: what makes another instance a positive: the smaller of its video and audio similarity (consensus), the
            larger (union), or one of them.
        num_positives: the most similar so many.
        resample_every: epochs after which positives are searched again.
        cross: weight of the positives' terms between modalities.
        within: weight of the positives' terms within a modality.
        num_within_negatives: negatives of those within a modality: the first so many of ``loss.num_negatives``.
    """

    kind: AgreementKind = "consensus"
    num_positives: int = Field(32, ge=1)
    resample_every: int = Field(1, ge=1)
    cross: float = Field(0.0, ge=0)
    within: float = Field(1.0, ge=0)
    num_within_negatives: int = Field(64, ge=1)


class MemorySettings(Settings):
    """The memory bank.

    Attributes:
        momentum: share of a row that an update keeps.
        dtype: how rows are stored; arithmetic is float32.
        init: first rows: ``random`` unit vectors, ``forward``, one pass of the network over the data, or those of the
            ``checkpoint`` that the run starts from, which is the default where it starts from one.
    """

    momentum: float = Field(0.5, ge=0, lt=1)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    init: Literal["random", "forward", "checkpoint"] | None = None


class ComputeSettings(Settings):
    """How a step is computed.

    Attributes:
        precision: of the networks; ``bfloat16`` is autocast, ``float64`` is for comparing runs. The loss is float32.
        channels_last: memory layout of pictures and features; faster on GPUs.
        compile: run the networks through ``torch.compile``; slow to begin, then faster.
        accumulate: parts that a step's batch is computed in, one after the other, to save memory.
    """

    precision: Literal["float32", "bfloat16", "float64"] = "float32"
    channels_last: bool = False
    compile: bool = False
    accumulate: int = Field(1, ge=1)


class EvaluationSettings(Settings):
    """Retrieval on held-out data while training.

    Attributes:
        data: root URL of the held-out data.
        every: epochs between two evaluations; the last epoch always has one.
        clips_per_instance: clips that an instance's vector is the mean of.
        batch_size: clips in a pass, on each rank.
    """

    data: str
    every: int = Field(1, ge=1)
    clips_per_instance: int = Field(1, ge=1)
    batch_size: int = Field(32, ge=1)


class CheckpointSettings(Settings):
    """When checkpoints are written, and how many stay. One is also written on SIGTERM.

    Attributes:
        every_epochs: epochs between two; the last epoch always has one.
        every_steps: steps between two, beside those; None for none.
        keep: newest checkpoints that stay; None for all.
    """

    every_epochs: int = Field(1, ge=1)
    every_steps: int | None = Field(None, ge=1)
    keep: int | None = Field(None, ge=1)


class TrainConfig(Settings):
    """A training run; ``configs/`` has one file for each published experiment.

    Attributes:
        seed: of every random choice.
        epochs: passes of the plan.
        start_from: checkpoint whose model, memory bank and partition function the run starts with: a run or checkpoint
            folder, or a published ``.pth.tar`` file; None for none.
        agreement: makes the run AVID+CMA; None for AVID.
        evaluation: None for none.
        log_every: steps between two lines in the logs.
    """

    seed: int = Field(0, ge=0)
    epochs: int = Field(ge=1)
    start_from: str | None = None
    model: ModelSettings = ModelSettings()
    clip: ClipSettings = ClipSettings()
    augmentation: AugmentationSettings = AugmentationSettings()
    data: DataSettings
    loss: LossSettings = LossSettings()
    agreement: AgreementSettings | None = None
    memory: MemorySettings = MemorySettings()
    optimizer: OptimizerSettings
    compute: ComputeSettings = ComputeSettings()
    evaluation: EvaluationSettings | None = None
    checkpoint: CheckpointSettings = CheckpointSettings()
    log_every: int = Field(10, ge=1)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        extra = 0.0 if self.agreement is None else self.agreement.cross + self.agreement.within
        if self.loss.cross + self.loss.within + extra == 0:
            raise ValueError("loss.cross and loss.within are both 0; one of them must be positive")
        if self.agreement is not None and self.agreement.num_within_negatives > self.loss.num_negatives:
            raise ValueError(
                f"agreement.num_within_negatives is {self.agreement.num_within_negatives}, but loss.num_negatives, "
                f"which they are the first of, only {self.loss.num_negatives}"
            )
        if self.memory.init == "checkpoint" and self.start_from is None:
            raise ValueError("memory.init is checkpoint, but start_from names none")
        return self


def changed_settings(before: Any, now: Any) -> list[str]:
    """What a run may not be resumed with: ``field was … and is now …`` for every such difference.

    Args:
        before: a configuration as plain data.
        now: another.
    """
    # Only a cosine looks ahead to the end of the run.
    looks_ahead = any(config.get("optimizer", {}).get("schedule") == "cosine" for config in (before, now))
    free = set(_FREE_TO_CHANGE) - ({"epochs"} if looks_ahead else set())
    return _changes(before, now, "", free)


def _changes(before: Any, now: Any, field: str, free: set[str]) -> list[str]:
    if field in free:
        return []
    if isinstance(before, dict) and isinstance(now, dict):
        return [
            change
            for key in sorted(before.keys() | now.keys())
            for change in _changes(before.get(key), now.get(key), f"{field}.{key}" if field else key, free)
        ]
    return [] if before == now else [f"{field} was {before!r} and is now {now!r}"]
