"""Everything a training run is made of, as typed settings read from YAML."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from avid_pipeline.clips.settings import AugmentationSettings, ClipSettings
from avid_pipeline.config import Settings

_DecayRate = Annotated[float, Field(ge=0, lt=1)]

# What may differ when a run is resumed, for a resumed run must equal an undisturbed one.
_FREE_TO_CHANGE = (
    "epochs",
    "log_every",
    "checkpoint_every",
    "checkpoint_every_steps",
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
    """

    video_depth: Literal[10, 18, 34] = 18
    projection: tuple[Annotated[int, Field(ge=1)], ...] = Field((512, 512, 128), min_length=1)


class DataSettings(Settings):
    """How the data are read.

    Attributes:
        batch_size: clips in a step, over all ranks.
        clips_per_instance: visits of every instance in an epoch.
        canonical_streams: into at least how many streams the order is cut; see ``docs/streaming.md``.
        block_size: neighbouring instances that a stream reads in a row.
        workers: threads of each rank that read and decode; None for one a core.
        device: where clips are decoded and augmented.
        operators: what augments on the CPU; ``dali`` is slower, and the reference.
        subset: named subset of the data set to train on, for example ``with-audio``; None for all.
        max_failure_rate: share of clips that may fail to decode and be replaced by others.
        connections: requests that a rank has under way at once, for data that are not on disk.
        read_ahead_megabytes: what a rank reads ahead, at most.
        cache_folder: local folder that keeps what was read of remote data, shared by the ranks of a node.
        cache_gigabytes: size of the cache, at most.
    """

    batch_size: int = Field(ge=1)
    clips_per_instance: int = Field(1, ge=1)
    canonical_streams: int = Field(64, ge=1)
    block_size: int = Field(8, ge=1)
    workers: int | None = Field(None, ge=1)
    device: Literal["cpu", "gpu"] = "cpu"
    operators: Literal["opencv", "dali"] = "opencv"
    subset: str | None = None
    max_failure_rate: float = Field(0.01, ge=0, le=1)
    connections: int = Field(8, ge=1)
    read_ahead_megabytes: int = Field(256, ge=1)
    cache_folder: str | None = None
    cache_gigabytes: int = Field(100, ge=1)


class LossSettings(Settings):
    """The AVID loss and its memory bank (paper, section 3).

    Attributes:
        num_negatives: negatives of each clip.
        temperature: of the scores.
        cross: weight of the cross-modal terms.
        within: weight of the within-modal terms.
        memory_momentum: share of a memory that an update keeps.
    """

    num_negatives: int = Field(1024, ge=1)
    temperature: float = Field(0.07, gt=0)
    cross: float = Field(1.0, ge=0)
    within: float = Field(0.0, ge=0)
    memory_momentum: float = Field(0.5, ge=0, lt=1)


class OptimizerSettings(Settings):
    """Adam, and a rate that falls at milestones.

    Attributes:
        learning_rate: at the start.
        weight_decay: L2 penalty.
        betas: Adam's decay rates.
        milestones: epochs after which the rate is multiplied by ``gamma``.
        gamma: that factor.
    """

    learning_rate: float = Field(gt=0)
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[_DecayRate, _DecayRate] = (0.9, 0.999)
    milestones: tuple[Annotated[int, Field(ge=1)], ...] = ()
    gamma: float = Field(0.1, gt=0, le=1)


class TrainConfig(Settings):
    """A training run; ``configs/`` has one file for each published experiment.

    Attributes:
        seed: of every random choice.
        epochs: passes of the plan.
        log_every: steps between two lines in the logs.
        checkpoint_every: epochs between two checkpoints; the last epoch always has one.
        checkpoint_every_steps: steps between two checkpoints, beside those; None for none within an epoch.
    """

    seed: int = Field(0, ge=0)
    epochs: int = Field(ge=1)
    model: ModelSettings = ModelSettings()
    clip: ClipSettings = ClipSettings()
    augmentation: AugmentationSettings = AugmentationSettings()
    data: DataSettings
    loss: LossSettings = LossSettings()
    optimizer: OptimizerSettings
    log_every: int = Field(10, ge=1)
    checkpoint_every: int = Field(1, ge=1)
    checkpoint_every_steps: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _some_loss(self) -> Self:
        if self.loss.cross + self.loss.within == 0:
            raise ValueError("loss.cross and loss.within are both 0; one of them must be positive")
        return self


def changed_settings(before: Any, now: Any, field: str = "") -> list[str]:
    """What a run may not be resumed with: ``field was … and is now …`` for every such difference.

    Args:
        before: a configuration as plain data.
        now: another.
        field: dotted path of the two, for messages.
    """
    if field in _FREE_TO_CHANGE:
        return []
    if isinstance(before, dict) and isinstance(now, dict):
        return [
            change
            for key in sorted(before.keys() | now.keys())
            for change in changed_settings(before.get(key), now.get(key), f"{field}.{key}" if field else key)
        ]
    return [] if before == now else [f"{field} was {before!r} and is now {now!r}"]
