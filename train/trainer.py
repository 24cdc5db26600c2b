"""The training loop, readable from top to bottom."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from avid_pipeline.clips.batch import ClipBatch
from avid_pipeline.collectives import RankGroup
from avid_pipeline.errors import ConfigError
from avid_pipeline.models import AVModel
from avid_pipeline.shards_spec.storage import Storage, open_storage
from avid_pipeline.streams.state import StreamState
from avid_pipeline.train.checkpoint import (
    latest_checkpoint,
    read_record,
    restore_bank,
    restore_model,
    restore_trainer_state,
    save_checkpoint,
)
from avid_pipeline.train.config import TrainConfig, changed_settings
from avid_pipeline.train.data import TrainingData
from avid_pipeline.train.loss_curve import draw_loss_curve
from avid_pipeline.train.losses import AVIDLoss
from avid_pipeline.train.memory_bank import MemoryBank
from avid_pipeline.train.run_log import RunLog


@dataclass
class TrainState:
    """Everything that a checkpoint holds.

    Attributes:
        model: the networks, not wrapped.
        optimizer: Adam over their parameters.
        schedule: the learning rate over epochs.
        criterion: the loss; it holds the memory bank.
        epoch: the next epoch to train, from 0.
        step: steps trained so far, over all epochs.
    """

    model: AVModel
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    criterion: AVIDLoss
    epoch: int = 0
    step: int = 0


def train(
    config: TrainConfig, data: str, output: str, *, resume: bool = False, options: Mapping[str, str] | None = None
) -> TrainState:
    """Train AVID; in every process of a process group where there is one.

    Args:
        config: the run.
        data: root URL of the training data.
        output: the run's folder.
        resume: go on from the newest checkpoint in ``output``, or start where there is none.
        options: of the object store that the data are in.

    Returns:
        The final state.

    Raises:
        ConfigError: the configuration does not fit the data, the machine or a run that is there.
        CheckpointError: the checkpoint to resume from is damaged or of another run.
        AvidPipelineError: the data cannot be read.
    """
    group = RankGroup()
    clips = TrainingData(config, data, options)
    root = open_storage(output, create=True)
    if not resume and latest_checkpoint(root) is not None:
        raise ConfigError(f"{output}: holds a run already; give --resume to go on with it, or another folder")
    device = _device(config)
    state = _new_state(config, clips.num_instances, device)
    if resume:
        _restore(root, state, config, clips)
    network = _wrap(state.model, device)
    first_epoch = clips.plan(0)
    first_epoch.check_world_size(group.size)
    steps_per_epoch = first_epoch.num_batches
    total_steps = steps_per_epoch * config.epochs
    folder = root.local_root or Path(output)
    with RunLog(folder, total_steps, state.step, quiet=group.rank > 0) as log:

        def save() -> None:
            log.say(f"checkpoint {root.url_of(_save(root, state, config, clips))}")

        log.say(_summary(config, clips, device, group, total_steps, state))
        while state.epoch < config.epochs:
            _train_epoch(config, clips, steps_per_epoch, network, state, device, log, save)
            state.schedule.step()
            state.epoch += 1
            steps = config.checkpoint.every_steps
            due = state.epoch % config.checkpoint.every_epochs == 0 or (steps is not None and state.step % steps == 0)
            if due or state.epoch == config.epochs:
                save()
    if group.rank == 0:
        draw_loss_curve(folder)
    return state


def _train_epoch(
    config: TrainConfig,
    clips: TrainingData,
    steps_per_epoch: int,
    network: torch.nn.Module,
    state: TrainState,
    device: torch.device,
    log: RunLog,
    save: Callable[[], None],
) -> None:
    group = state.criterion.bank.group
    last = (state.epoch + 1) * steps_per_epoch
    first = StreamState(clips.fingerprint, config.seed, state.epoch, state.step).step_of_epoch(steps_per_epoch)
    loader = clips.loader(state.epoch, first, group.rank, group.size, lambda failure: log.warn(failure.reason))
    network.train()
    meter = _Meter(config.data.batch_size)
    for batch in loader:
        meter.data_arrived()
        loss, terms = _step(network, state, batch, clips.rows(batch["index"]), device)
        meter.step_done({"total": loss, **terms})
        log.advance()
        if state.step % config.log_every == 0 or state.step == last:
            values = meter.take()
            values["learning_rate"] = state.optimizer.param_groups[0]["lr"]
            values["decode_failures"] = loader.failures.failures
            log.metrics(state.step, state.epoch, values)
        if config.checkpoint.every_steps and state.step % config.checkpoint.every_steps == 0 and state.step < last:
            save()


def _step(
    network: torch.nn.Module, state: TrainState, batch: ClipBatch, rows: torch.Tensor, device: torch.device
) -> tuple[float, dict[str, float]]:
    video_emb, audio_emb = network(batch["video"].to(device), batch["audio"].to(device))
    loss, terms = state.criterion(video_emb, audio_emb, rows.to(device))
    value = float(loss.detach())
    if not math.isfinite(value):
        raise ConfigError(
            f"the loss became {value} at step {state.step + 1}; lower optimizer.learning_rate, or look at the "
            "data with avid-shards validate; the newest checkpoint is from before"
        )
    state.optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    state.optimizer.step()
    state.step += 1
    return value, terms


class _Meter:
    """Means of loss terms, clips a second and the share of time spent waiting for data, since the last line."""

    def __init__(self, clips_per_step: int) -> None:
        self._clips_per_step = clips_per_step
        self._sums: dict[str, float] = {}
        self._steps = 0
        self._waited = 0.0
        self._began = self._last = time.perf_counter()

    def data_arrived(self) -> None:
        self._waited += time.perf_counter() - self._last

    def step_done(self, terms: dict[str, float]) -> None:
        for name, value in terms.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._steps += 1
        self._last = time.perf_counter()

    def take(self) -> dict[str, float]:
        seconds = max(self._last - self._began, 1e-9)
        values = {f"loss/{name}": total / self._steps for name, total in self._sums.items()}
        values["clips_per_second"] = self._steps * self._clips_per_step / seconds
        values["data_wait_share"] = self._waited / seconds
        self._sums, self._steps, self._waited = {}, 0, 0.0
        self._began = self._last
        return values


def _new_state(config: TrainConfig, num_instances: int, device: torch.device) -> TrainState:
    generator = torch.Generator().manual_seed(config.seed)
    model = AVModel(config.model.video_depth, config.model.projection, generator).to(device)
    settings = config.optimizer
    optimizer = torch.optim.Adam(
        model.parameters(), lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay
    )
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, list(settings.milestones), settings.gamma)
    bank = MemoryBank(num_instances, config.model.projection[-1], config.memory.momentum, config.seed, device=device)
    criterion = AVIDLoss(
        bank, config.loss.num_negatives, config.loss.temperature, config.loss.cross, config.loss.within
    )
    return TrainState(model, optimizer, schedule, criterion)


def _save(root: Storage, state: TrainState, config: TrainConfig, clips: TrainingData) -> str:
    trainer_state: dict[str, Any] = {
        "optimizer": state.optimizer.state_dict(),
        "schedule": state.schedule.state_dict(),
        "criterion": state.criterion.state_dict(),
    }
    return save_checkpoint(
        root,
        stream=StreamState(clips.fingerprint, config.seed, state.epoch, state.step),
        config=config,
        statistics=clips.statistics,
        model=state.model,
        trainer_state=trainer_state,
        bank=state.criterion.bank,
    )


def _restore(root: Storage, state: TrainState, config: TrainConfig, clips: TrainingData) -> None:
    name = latest_checkpoint(root)
    if name is None:
        return
    record = read_record(root)
    stream = StreamState.from_dict(record.stream)
    changed = changed_settings(record.config, config.model_dump(mode="json"))
    if changed:
        raise ConfigError(
            f"{root.url_of(name)}: {'; '.join(changed)}: cannot change in a run that is resumed, so that it equals an "
            "undisturbed one; give the settings it began with, or another --output"
        )
    stream.check(clips.fingerprint, config.seed)
    restore_model(root, name, record, state.model)
    saved = restore_trainer_state(root, name, record)
    state.optimizer.load_state_dict(saved["optimizer"])
    state.schedule.load_state_dict(saved["schedule"])
    state.criterion.load_state_dict(saved["criterion"])
    restore_bank(root, name, state.criterion.bank)
    state.epoch, state.step = stream.epoch, stream.step


def _device(config: TrainConfig) -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if config.data.device == "gpu":
        raise ConfigError("data.device: gpu, but torch finds no CUDA device; use --set data.device=cpu")
    return torch.device("cpu")


def _wrap(model: AVModel, device: torch.device) -> torch.nn.Module:
    if not (dist.is_available() and dist.is_initialized()):
        return model
    return DistributedDataParallel(model, device_ids=None if device.type == "cpu" else [device.index])


def _summary(
    config: TrainConfig,
    clips: TrainingData,
    device: torch.device,
    group: RankGroup,
    total_steps: int,
    state: TrainState,
) -> str:
    begin = f"from step {state.step}" if state.step else "from the start"
    return (
        f"training {begin} to step {total_steps}: {clips.num_instances:,} instances, "
        f"batch {config.data.batch_size}, {config.epochs} epochs, R(2+1)D-{config.model.video_depth}, "
        f"{group.size} process(es) on {device.type}"
    )
