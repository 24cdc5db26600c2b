"""How a run begins: from nothing, from another run's checkpoint, or from a published one."""

from collections.abc import Callable, Mapping

import numpy as np
from torch import Tensor

from avid_pipeline.errors import ConfigError
from avid_pipeline.models import AVModel
from avid_pipeline.optimisation import make_optimizer
from avid_pipeline.shards_spec.manifest import SpectrogramStatistics
from avid_pipeline.train.agreement import find_positives
from avid_pipeline.train.config import TrainConfig
from avid_pipeline.train.data import TrainingData
from avid_pipeline.train.initial_memory import fill_memory
from avid_pipeline.train.memory_bank import MemoryBank
from avid_pipeline.train.starting_point import StartingPoint, open_starting_point
from avid_pipeline.train.state import TrainState, make_criterion

__all__ = ["begin_state", "search_positives"]


def begin_state(
    config: TrainConfig,
    clips: TrainingData,
    model: AVModel,
    bank: MemoryBank,
    say: Callable[[str], object],
    warn: Callable[[str], object],
    *,
    from_scratch: bool = False,
    options: Mapping[str, str] | None = None,
) -> TrainState:
    """The state of a run before its first step.

    Args:
        config: the run.
        clips: its data.
        model: with the initial weights of the run's seed.
        bank: with random rows.
        say: is told what the run starts with.
        warn: is told what may be wrong with it.
        from_scratch: AVID+CMA may start without a checkpoint.
        options: of the object store that holds the checkpoint to start from.

    Raises:
        ConfigError: AVID+CMA has nothing to start from, or the checkpoint is of other data.
        CheckpointError: the checkpoint is damaged or of another model.
    """
    if config.agreement is not None and config.start_from is None and not from_scratch:
        raise ConfigError(
            "agreement: AVID+CMA takes the instances that agree in a trained memory bank for positives (paper, section "
            "4); without one they would be random. Give an AVID checkpoint with --start-from, or --from-scratch if "
            "you mean it"
        )
    partition_function = None
    if config.start_from is not None:
        start = open_starting_point(config.start_from, options)
        partition_function = _take_up(start, config, clips, model, bank, warn)
        say(f"starting from {start.source}")
        del start  # a published file holds the memories of all ranks
    if _memory_init(config) == "forward":
        say(f"one pass over {clips.num_instances:,} instances for the first memories")
        fill_memory(model, bank, clips, config, lambda failure: warn(failure.reason))
    positives = search_positives(config, bank, say)
    state = TrainState(
        model, make_optimizer(config.optimizer, model.parameters()), make_criterion(config, bank, positives)
    )
    state.criterion.partition_function = partition_function
    return state


def search_positives(config: TrainConfig, bank: MemoryBank, say: Callable[[str], object]) -> Tensor | None:
    """AVID+CMA's positives of this rank's rows, from the memories as they are: int64 [rows, k]; None for AVID."""
    settings = config.agreement
    if settings is None:
        return None
    say(f"searching {settings.num_positives} positives of {bank.num_instances:,} instances by {settings.kind}")
    video, audio = bank.local()
    return find_positives(video, audio, settings.num_positives, settings.kind, sharded=True)


def _take_up(
    start: StartingPoint,
    config: TrainConfig,
    clips: TrainingData,
    model: AVModel,
    bank: MemoryBank,
    warn: Callable[[str], object],
) -> float | None:
    """Load what the run takes from a checkpoint; its partition function, if the memories are taken too."""
    _check_instances(start, config, clips, warn)
    if start.statistics is not None and not _alike(start.statistics, clips.statistics):
        apart = np.abs(np.subtract(start.statistics.mean, clips.statistics.mean)).max()
        warn(
            f"{start.source}: was trained on sound normalised with other statistics than these data have (means up to "
            f"{apart:.1f} dB apart); the run goes on with those of the data"
        )
    start.load_model(model)
    if _memory_init(config) != "checkpoint":
        return None
    start.load_bank(bank)
    return start.partition_function


def _alike(ours: SpectrogramStatistics, theirs: SpectrogramStatistics) -> bool:
    """Whether sound looks much the same normalised with either."""
    return np.allclose(ours.mean, theirs.mean, atol=1.0) and np.allclose(ours.std, theirs.std, rtol=0.1)


def _memory_init(config: TrainConfig) -> str:
    return config.memory.init or ("random" if config.start_from is None else "checkpoint")


def _check_instances(
    start: StartingPoint, config: TrainConfig, clips: TrainingData, warn: Callable[[str], object]
) -> None:
    """Whether rows of the checkpoint's memory bank belong to the instances of these data."""
    if _memory_init(config) != "checkpoint":
        return
    if start.fingerprint is None:
        warn(
            f"{start.source} does not say which instance each row of its memory bank belongs to: they are "
            "taken in the order of these data. Where that is not its authors' order, use --set memory.init=forward"
        )
    elif (start.fingerprint, start.subset) != (clips.fingerprint, config.data.subset):
        raise ConfigError(
            f"{start.source}: its memory bank is of other data (manifest {start.fingerprint}, subset {start.subset}) "
            f"than these ({clips.fingerprint}, subset {config.data.subset}), so its rows belong to other instances; "
            "give the data it was trained on, or --set memory.init=forward to fill the bank anew"
        )
