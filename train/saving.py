"""A run's state to and from its checkpoints."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from avid_pipeline.collectives import RankGroup
from avid_pipeline.errors import CheckpointError, ConfigError
from avid_pipeline.models import AVModel
from avid_pipeline.models.batch_norm import averaged_statistics
from avid_pipeline.optimisation import make_optimizer
from avid_pipeline.shards_spec.storage import Storage
from avid_pipeline.streams.state import StreamState
from avid_pipeline.train.checkpoint import (
    CheckpointRecord,
    restore_bank,
    restore_model,
    restore_positives,
    restore_trainer_state,
    resume_newest,
    save_checkpoint,
)
from avid_pipeline.train.checkpoint_record import BANK_NAME
from avid_pipeline.train.config import TrainConfig, changed_settings
from avid_pipeline.train.data import TrainingData
from avid_pipeline.train.memory_bank import MemoryBank
from avid_pipeline.train.state import TrainState, make_criterion

__all__ = ["resume_state", "save_state"]


def save_state(root: Storage, state: TrainState, config: TrainConfig, clips: TrainingData) -> str:
    """Write a checkpoint; every rank calls this.

    Returns:
        Its name below the root.

    Raises:
        StorageError: the root cannot be written.
        ConfigError: the weights are not finite.
    """
    if not all(bool(parameter.isfinite().all()) for parameter in state.model.parameters()):
        raise ConfigError(
            f"the weights hold NaN or infinite numbers after step {state.step}: not saved; lower "
            "optimizer.learning_rate or set optimizer.clip_gradients, and go on from the newest checkpoint"
        )
    bank = state.criterion.bank
    trainer_state: dict[str, Any] = {
        "optimizer": state.optimizer.state_dict(),
        "criterion": state.criterion.state_dict(),
        "random": bank.group.gather_objects(_random_state()),
    }
    return save_checkpoint(
        root,
        stream=StreamState(clips.fingerprint, config.seed, state.epoch, state.step),
        config=config,
        statistics=clips.statistics,
        model=state.model,
        model_state=averaged_statistics(state.model, bank.group),
        trainer_state=trainer_state,
        bank=bank,
        positives=state.positives,
        keep=config.checkpoint.keep,
    )


@dataclass
class _Restored:
    """What a checkpoint holds beside the model and the bank."""

    stream: StreamState
    trainer: dict[str, Any]
    positives: Tensor | None


def resume_state(
    root: Storage,
    config: TrainConfig,
    clips: TrainingData,
    model: AVModel,
    bank: MemoryBank,
    warn: Callable[[str], object],
) -> TrainState | None:
    """The state of the newest checkpoint that is whole; None where the run has none.

    Args:
        root: of the run.
        config: the run.
        clips: its data.
        model: takes the weights.
        bank: takes the memories.
        warn: is told of checkpoints that are damaged and passed over.

    Raises:
        ConfigError: the run began with other settings or data.
        CheckpointError: no checkpoint is whole.
    """
    found: list[_Restored] = []

    def attempt(name: str, record: CheckpointRecord) -> None:
        stream = _check_same_run(root.url_of(name), record, config, clips)
        restore_model(root, name, record, model)
        trainer = restore_trainer_state(root, name, record)
        restore_bank(root, name, bank)
        positives = restore_positives(root, name, bank)
        expected = None if config.agreement is None else config.agreement.num_positives
        if (None if positives is None else positives.shape[1]) != expected:
            raise CheckpointError(
                f"{root.url_of(name)}/{BANK_NAME}: expected {expected} positives of each instance, found "
                f"{None if positives is None else positives.shape[1]}; the file is damaged, use an earlier checkpoint"
            )
        found[:] = [_Restored(stream, trainer, positives)]

    if resume_newest(root, bank.group, attempt, warn) is None:
        return None
    (restored,) = found
    optimizer = make_optimizer(config.optimizer, model.parameters())
    optimizer.load_state_dict(restored.trainer["optimizer"])
    criterion = make_criterion(config, bank, restored.positives)
    criterion.load_state_dict(restored.trainer["criterion"])
    _restore_random_state(restored.trainer["random"], bank.group)
    return TrainState(model, optimizer, criterion, restored.stream.epoch, restored.stream.step)


def _check_same_run(url: str, record: CheckpointRecord, config: TrainConfig, clips: TrainingData) -> StreamState:
    if record.stream is None or record.config is None:
        raise ConfigError(f"{url}: is no checkpoint of a run that could go on; start a new run with --start-from {url}")
    changed = changed_settings(record.config, config.model_dump(mode="json"))
    if changed:
        raise ConfigError(
            f"{url}: {'; '.join(changed)}: cannot change in a run that is resumed, so that it equals an undisturbed "
            "one; give the settings it began with, or another --output"
        )
    stream = StreamState.from_dict(record.stream)
    try:
        stream.check(clips.fingerprint, config.seed)
    except CheckpointError as error:
        raise ConfigError(f"{url}: {error}") from error
    return stream


def _random_state() -> dict[str, Tensor]:
    """This rank's generators. Nothing in a run draws from them; a network or loss of the user's own may."""
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def _restore_random_state(of_ranks: list[dict[str, Tensor]], group: RankGroup) -> None:
    if len(of_ranks) != group.size:
        return
    state = of_ranks[group.rank]
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
