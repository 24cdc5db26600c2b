"""The training loop, readable from top to bottom."""

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from avid_pipeline.clips.failures import Failure
from avid_pipeline.collectives import RankGroup
from avid_pipeline.errors import ConfigError, StorageError
from avid_pipeline.models.batch_norm import averaged_batch_norm
from avid_pipeline.optimisation import learning_rate
from avid_pipeline.shards_spec.storage import Storage, open_storage
from avid_pipeline.streams.state import StreamState
from avid_pipeline.train.beginning import begin_state, search_positives
from avid_pipeline.train.checkpoint import latest_checkpoint
from avid_pipeline.train.class_purity import LabelTable
from avid_pipeline.train.config import TrainConfig
from avid_pipeline.train.data import TrainingData
from avid_pipeline.train.loss_curve import draw_loss_curve
from avid_pipeline.train.losses import AVIDCMALoss
from avid_pipeline.train.meter import Meter
from avid_pipeline.train.negatives import draw_negatives
from avid_pipeline.train.retrieval_hook import RetrievalHook
from avid_pipeline.train.run_log import RunLog, log_folder
from avid_pipeline.train.saving import resume_state, save_state
from avid_pipeline.train.state import TrainState, choose_device, distribute, divide_batch, make_bank, make_model
from avid_pipeline.train.step import train_step
from avid_pipeline.train.stop_signal import StopSignal

__all__ = ["train"]


@dataclass(frozen=True)
class Run:
    """The parts of a run that its functions share.

    Attributes:
        config: its settings.
        clips: its data.
        root: where its checkpoints go.
        device: of the networks.
        log: of the first rank.
        stop: tells of a SIGTERM.
        state: what is trained; the only part that changes.
        network: the model as this process group trains it.
        steps_per_epoch: global batches of an epoch.
        labels: classes of the instances, where AVID+CMA is trained on data that have classes.
        retrieval: the evaluation on held-out data, if there is one.
    """

    config: TrainConfig
    clips: TrainingData
    root: Storage
    device: torch.device
    log: RunLog
    stop: StopSignal
    state: TrainState
    network: nn.Module
    steps_per_epoch: int
    labels: LabelTable | None
    retrieval: RetrievalHook | None

    @property
    def group(self) -> RankGroup:
        """The ranks that train together."""
        return self.state.criterion.bank.group

    def warn(self, failure: Failure) -> None:
        """Say that a sample cannot be decoded."""
        self.log.warn(failure.reason)


def train(
    config: TrainConfig,
    data: str,
    output: str,
    *,
    resume: bool = False,
    from_scratch: bool = False,
    options: Mapping[str, str] | None = None,
) -> TrainState:
    """Train AVID or AVID+CMA; in every process of a process group where there is one.

    Args:
        config: the run.
        data: root URL of the training data.
        output: root of the run: a folder, or a URL of an object store.
        resume: go on from the newest checkpoint in ``output`` that is whole, or start where there is none.
        from_scratch: let AVID+CMA start without an AVID checkpoint.
        options: of the object store that the data, the run or the checkpoint to start from are in.

    Returns:
        The final state, or that at a SIGTERM, which is ``stopped``.

    Raises:
        ConfigError: the configuration does not fit the data, the machine or a run that is there.
        CheckpointError: no checkpoint to resume from is whole, or the one to start from is damaged.
        AvidPipelineError: the data cannot be read.
    """
    group = RankGroup()
    clips = TrainingData(config, data, options)
    root = open_storage(output, create=True, options=options)
    if not resume and latest_checkpoint(root) is not None:
        raise ConfigError(f"{output}: holds a run already; give --resume to go on with it, or another folder")
    first_epoch = clips.plan(0)
    first_epoch.check_world_size(group.size)
    device = choose_device(config)
    retrieval = None
    if config.evaluation is not None:
        retrieval = RetrievalHook(config, clips.statistics, options)
    folder = log_folder(root)
    copy_to = root if root.local_root is None else None
    with RunLog(folder, group.rank > 0, copy_to) as log, StopSignal(group) as stop:
        model, bank = make_model(config, device), make_bank(config, clips.num_instances, device)
        divide_batch(model, config, group)
        state = resume_state(root, config, clips, model, bank, log.warn) if resume else None
        if state is None:
            state = begin_state(
                config, clips, model, bank, log.say, log.warn, from_scratch=from_scratch, options=options
            )
        network = distribute(model, config, device)
        classes = clips.manifest.classes
        labels = LabelTable(bank.rows, len(classes), group) if config.agreement is not None and classes else None
        steps = first_epoch.num_batches
        run = Run(config, clips, root, device, log, stop, state, network, steps, labels, retrieval)
        log.begin(steps * config.epochs, state.step)
        log.say(_summary(run))
        if state.step == 0 and (config.agreement is not None or config.memory.init == "forward"):
            # Hours of preparation, where the data are large.
            state.stopped = stop.on_any_rank()
            _save(run)
        while state.epoch < config.epochs and not state.stopped:
            _train_epoch(run)
        if group.rank == 0:
            draw_loss_curve(folder)
        log.publish()
    return state


def _train_epoch(run: Run) -> None:
    """The rest of an epoch, its evaluation and its checkpoint."""
    config, state, epoch = run.config, run.state, run.state.epoch
    last = (epoch + 1) * run.steps_per_epoch
    _resample_positives(run)
    stream = StreamState(run.clips.fingerprint, config.seed, epoch, state.step)
    first = stream.step_of_epoch(run.steps_per_epoch)
    loader = run.clips.loader(epoch, first, run.group.rank, run.group.size, run.warn)
    run.network.train()
    meter = Meter(config.data.batch_size)
    with closing(iter(loader)) as batches:
        for batch in batches:
            meter.data_arrived()
            rows = run.clips.rows(batch["index"])
            rate = learning_rate(config.optimizer, state.step, run.steps_per_epoch, config.epochs)
            meter.step_done(train_step(run.network, state, batch, rows, config, run.device, rate))
            run.log.advance()
            if run.labels is not None:
                run.labels.learn(rows, batch["labels"])
            if state.step % config.log_every == 0 or state.step == last:
                values = meter.take() | {"learning_rate": rate, "decode_failures": loader.failures.failures}
                run.log.metrics(state.step, epoch, values | _memory_values(run, rows))
            state.stopped = run.stop.on_any_rank()
            due = config.checkpoint.every_steps and state.step % config.checkpoint.every_steps == 0
            if state.step < last and (due or state.stopped):
                _save(run)
                if state.stopped:
                    return
                meter.pause()
            meter.waiting_begins()
    state.epoch += 1
    _finish_epoch(run)


def _finish_epoch(run: Run) -> None:
    config, state = run.config, run.state
    final = state.epoch == config.epochs
    state.stopped &= not final
    evaluation, steps = config.evaluation, config.checkpoint.every_steps
    evaluated = evaluation is not None and (final or state.epoch % evaluation.every == 0)
    due = state.epoch % config.checkpoint.every_epochs == 0 or (steps is not None and state.step % steps == 0)
    if due or final or evaluated or state.stopped:
        _save(run)
    if evaluated and not state.stopped:
        assert run.retrieval is not None
        with averaged_batch_norm(state.model, run.group):
            run.log.metrics(state.step, state.epoch - 1, run.retrieval.run(state.model, run.group, run.warn))


def _resample_positives(run: Run) -> None:
    """New positives for AVID+CMA at the beginning of every so many epochs; the run itself began with the first."""
    agreement, state = run.config.agreement, run.state
    at_beginning = state.step == state.epoch * run.steps_per_epoch
    if agreement is None or state.step == 0 or not at_beginning or state.epoch % agreement.resample_every:
        return
    assert isinstance(state.criterion, AVIDCMALoss)
    positives = search_positives(run.config, state.criterion.bank, run.log.say)
    assert positives is not None
    state.criterion.positives = positives


def _memory_values(run: Run, rows: Tensor) -> dict[str, float]:
    """How far memories move at an update, and how often AVID+CMA's positives are of the clip's own class.

    Beside the latter stands the same share for instances drawn at random.
    """
    criterion = run.state.criterion
    values = {f"memory/{modality}_drift": drift for modality, drift in criterion.bank.take_drift().items()}
    if run.labels is None or not isinstance(criterion, AVIDCMALoss):
        return values
    index = run.group.all_gather(rows.to(run.device))
    positives = criterion.positives_of(index)
    at_random = draw_negatives(
        index, positives.shape[1], criterion.bank.num_instances, seed=run.config.seed, step=run.state.step
    )
    shares = {"purity": run.labels.purity(index, positives), "purity_at_random": run.labels.purity(index, at_random)}
    return values | {f"positives/class_{name}": share for name, share in shares.items() if share is not None}


def _save(run: Run) -> None:
    name = save_state(run.root, run.state, run.config, run.clips)
    run.log.say(f"checkpoint {run.root.url_of(name)}" + (" (stopped by SIGTERM)" if run.state.stopped else ""))
    try:
        run.log.publish()
    except StorageError as error:
        run.log.warn(f"the logs could not be copied, the checkpoint is there: {error}")


def _summary(run: Run) -> str:
    config, state = run.config, run.state
    method = "AVID" if config.agreement is None else "AVID+CMA"
    begin = f"from step {state.step}" if state.step else "from the start"
    return (
        f"training {method} {begin} to step {run.steps_per_epoch * config.epochs}: {run.clips.num_instances:,} "
        f"instances, batch {config.data.batch_size}, {config.epochs} epochs, R(2+1)D-{config.model.video_depth}, "
        f"{run.group.size} process(es) on {run.device.type}"
    )
