"""What a run trains, and how it is made and distributed."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from avid_pipeline.collectives import RankGroup
from avid_pipeline.errors import ConfigError
from avid_pipeline.models import AVModel
from avid_pipeline.models.batch_norm import group_batch_norms
from avid_pipeline.optimisation import make_optimizer
from avid_pipeline.train.config import TrainConfig
from avid_pipeline.train.losses import AVIDCMALoss, AVIDLoss
from avid_pipeline.train.memory_bank import MemoryBank

__all__ = ["TrainState", "choose_device", "distribute", "divide_batch", "make_bank", "make_criterion", "make_model"]


@dataclass
class TrainState:
    """Everything that a checkpoint holds.

    Attributes:
        model: the networks, not wrapped.
        optimizer: over their parameters.
        criterion: the loss; it holds the memory bank, and for AVID+CMA the positives.
        epoch: the next epoch to train, from 0.
        step: steps trained so far, over all epochs.
        stopped: whether the run ended early because a SIGTERM asked for it.
    """

    model: AVModel
    optimizer: torch.optim.Optimizer
    criterion: AVIDLoss | AVIDCMALoss
    epoch: int = 0
    step: int = 0
    stopped: bool = False

    @property
    def positives(self) -> Tensor | None:
        """This rank's rows of AVID+CMA's positives, int64 [rows, k]; None for AVID."""
        return self.criterion.positives if isinstance(self.criterion, AVIDCMALoss) else None


def choose_device(config: TrainConfig) -> torch.device:
    """The GPU of this process, or the CPU where there is none.

    Raises:
        ConfigError: the configuration asks for a GPU that is not there.
    """
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if config.data.device == "gpu":
        raise ConfigError("data.device: gpu, but torch finds no CUDA device; use --set data.device=cpu")
    return torch.device("cpu")


def make_model(config: TrainConfig, device: torch.device) -> AVModel:
    """The networks with the initial weights of the run's seed."""
    generator = torch.Generator().manual_seed(config.seed)
    dtype = torch.float64 if config.compute.precision == "float64" else torch.float32
    model = AVModel(config.model.video_depth, config.model.projection, generator).to(device, dtype)
    return model.to(memory_format=torch.channels_last_3d) if config.compute.channels_last else model


def make_bank(config: TrainConfig, num_instances: int, device: torch.device) -> MemoryBank:
    """The memory bank, with random rows."""
    memory = config.memory
    dtype = getattr(torch, memory.dtype)
    dim = config.model.projection[-1]
    return MemoryBank(num_instances, dim, memory.momentum, config.seed, dtype=dtype, device=device)


def make_criterion(config: TrainConfig, bank: MemoryBank, positives: Tensor | None) -> AVIDLoss | AVIDCMALoss:
    """The loss of the run; ``positives`` are those of AVID+CMA."""
    loss, agreement = config.loss, config.agreement
    if agreement is None:
        return AVIDLoss(bank, loss.num_negatives, loss.temperature, loss.cross, loss.within)
    assert positives is not None
    return AVIDCMALoss(
        bank,
        positives,
        loss.num_negatives,
        agreement.num_within_negatives,
        instance_cross=loss.cross,
        instance_within=loss.within,
        positive_cross=agreement.cross,
        positive_within=agreement.within,
        temperature=loss.temperature,
    )


def make_state(config: TrainConfig, model: AVModel, bank: MemoryBank, positives: Tensor | None) -> TrainState:
    """The state of a run that has not trained yet."""
    optimizer = make_optimizer(config.optimizer, model.parameters())
    return TrainState(model, optimizer, make_criterion(config, bank, positives))


def divide_batch(model: AVModel, config: TrainConfig, group: RankGroup) -> None:
    """Let the model's batch norm take the clips together that the configuration says, however many ranks there are.

    Raises:
        ConfigError: the batch cannot be divided over ranks, parts or batch norm groups.
    """
    parts = group.size * config.compute.accumulate
    if config.data.batch_size % parts:
        raise ConfigError(
            f"data.batch_size: {config.data.batch_size} clips cannot be divided over {group.size} rank(s) with "
            f"compute.accumulate {config.compute.accumulate}; choose a multiple of {parts}"
        )
    clips, most = config.model.batch_norm_clips, config.data.batch_size // config.compute.accumulate
    group_batch_norms(model, clips if clips is not None and clips < most else None, config.data.batch_size // parts)


def distribute(model: AVModel, config: TrainConfig, device: torch.device) -> nn.Module:
    """Make a model ready for training in this process group; to be called when its weights are in place."""
    if config.compute.compile:
        model.compile()
    if not (dist.is_available() and dist.is_initialized()):
        return model
    devices = None if device.type == "cpu" else [device.index]
    # Batch norm's statistics are averaged over ranks where they are used, not sent around at every step. Looking for
    # unused parameters, of which there are none, keeps DDP from rearranging its buckets after the first step: a resumed
    # run would do that anew, and its sums would round differently.
    warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified")
    return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False, find_unused_parameters=True)
