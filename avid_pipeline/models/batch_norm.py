"""Batch normalisation over groups of clips whose size does not depend on the number of ranks.

Batch normalisation makes the clips of a group depend on each other, so a run gives the same losses on another number
of ranks only if the same clips are normalised together there: :func:`group_batch_norms` sees to that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules._functions import SyncBatchNorm as TorchNormaliseTogether
from torch.nn.modules.batchnorm import _BatchNorm

from avid_pipeline.collectives import RankGroup
from avid_pipeline.errors import ConfigError
from avid_pipeline.models.synchronised_norm import group_statistics, normalise_together

__all__ = ["averaged_batch_norm", "averaged_statistics", "group_batch_norms"]

_Model = TypeVar("_Model", bound=nn.Module)


def group_batch_norms(
    model: _Model, clips_per_group: int | None, clips_per_rank: int, process_group: dist.ProcessGroup | None = None
) -> _Model:
    """Lets every batch norm of a model normalise groups of so many clips while training; in place.

    Clips are grouped in the order of ranks and, on a rank, of the batch: several whole groups on a rank, or one group
    over neighbouring ranks, which then exchange its statistics in forward and backward through a process group of
    their own. Where a group is what a rank has, torch's batch norm is left as it is. Running statistics follow the
    mean over the rank's groups, so ranks with other groups have others: see :func:`averaged_statistics`. They must
    stay so under ``DistributedDataParallel(..., broadcast_buffers=False)``. Parameters, buffers, the state dict and
    evaluation mode do not change. It can be called again, to group otherwise.

    Args:
        model: the model, not yet wrapped; every rank calls this with the same values.
        clips_per_group: clips that are normalised together; None for those of a forward pass on all ranks.
        clips_per_rank: clips of a forward pass on this rank, the same on all.
        process_group: the ranks that train; None for the default group, if one is up. For fewer ranks than there
            are, these must have made the same number of process groups before, which torch names the new one by.

    Returns:
        The model.

    Raises:
        ConfigError: groups of this size cannot be made, or the ranks were given different values.
    """
    ranks = RankGroup(process_group)
    ranks.require_equal({"clips in a forward pass": clips_per_rank, "model.batch_norm_clips": clips_per_group})
    total = clips_per_rank * ranks.size
    grouped = total if clips_per_group is None else clips_per_group
    possible = _possible_groups(clips_per_rank, ranks.size)
    if grouped not in possible:
        raise ConfigError(
            f"model.batch_norm_clips: groups of {grouped} clips cannot be made of {total} (the batch size, divided by "
            f"the parts of gradient accumulation), which are {clips_per_rank} on each of {ranks.size} rank(s): a "
            "group is part of one rank's clips, or all clips of neighbouring ranks; choose one of "
            f"{', '.join(map(str, possible))}, or another data.batch_size or number of ranks"
        )
    grouping = None
    if grouped > clips_per_rank:
        neighbours = _neighbours(ranks.rank, grouped // clips_per_rank, process_group)
        grouping = _Grouping(clips_per_rank, 1, neighbours)
    elif grouped < clips_per_rank:
        grouping = _Grouping(clips_per_rank, clips_per_rank // grouped, None)
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            _regroup(module, name, grouping)
    return model


def averaged_statistics(model: nn.Module, group: RankGroup) -> dict[str, Tensor]:
    """The state dict with the mean over ranks of all running means and variances: what a checkpoint should hold.

    As running statistics are linear in those of the steps, these are the ones of a single process with all groups.
    All ranks call this and get the same; the model is left as it is.

    Args:
        model: the model, the same on all ranks but for running statistics.
        group: the ranks that train.

    Returns:
        Name -> tensor. All but the averaged ones are the model's own tensors, not copies.
    """
    state: dict[str, Tensor] = dict(model.state_dict())
    state.update(_average(_running_statistics(model), group))
    return state


@contextlib.contextmanager
def averaged_batch_norm(model: nn.Module, group: RankGroup) -> Iterator[None]:
    """Gives the model the statistics of :func:`averaged_statistics` for the time of an evaluation.

    All ranks enter it. Behind it every rank has its own again, also after an error; so what the model learns of
    statistics inside, in training mode, is lost.
    """
    running = _running_statistics(model)
    own = {name: buffer.clone() for name, buffer in running.items()}
    averaged = _average(running, group)
    try:
        _copy(averaged, running)
        yield
    finally:
        _copy(own, running)


@dataclass(frozen=True, eq=False)
class _Grouping:
    """How this rank's clips are grouped: in ``groups`` parts, or one with all ranks of ``process_group``."""

    clips_per_rank: int
    groups: int
    process_group: dist.ProcessGroup | None

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # Copies of a model talk through the same process group, which cannot be copied.
        return self


class _GroupedBatchNorm(_BatchNorm):
    """A batch norm that knows its groups; ``grouping`` is set when a batch norm becomes one."""

    grouping: _Grouping

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        if len(input) != self.grouping.clips_per_rank:
            raise ValueError(
                f"batch norm: expected {self.grouping.clips_per_rank} clips on a rank in training mode, got "
                f"{len(input)}; call group_batch_norms with this number on all ranks, or use evaluation mode"
            )
        factor = self._count_forward()
        if self.grouping.process_group is None:
            return self._normalise_parts(input, factor)
        output: Tensor = self._normalise_with_neighbours(input, self.grouping.process_group, factor)
        return output

    def _count_forward(self) -> float:
        if self.num_batches_tracked is None:
            return 0.0
        self.num_batches_tracked.add_(1)
        return 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum

    def _normalise_parts(self, input: Tensor, factor: float) -> Tensor:
        buffers = input if self.running_mean is None else self.running_mean
        means, variances = buffers.new_zeros(2, self.grouping.groups, self.num_features)
        # With a momentum of 1 torch leaves the part's own mean and unbiased variance.
        outputs = [
            nn.functional.batch_norm(part, mean, variance, self.weight, self.bias, True, 1.0, self.eps)
            for part, mean, variance in zip(input.chunk(self.grouping.groups), means, variances, strict=True)
        ]
        self._update(means.mean(0), variances.mean(0), factor)
        return torch.cat(outputs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _normalise_with_neighbours(self, input: Tensor, process_group: dist.ProcessGroup, factor: float) -> Tensor:
        ranks = dist.get_world_size(process_group)
        if input.is_cuda:
            output: Tensor = TorchNormaliseTogether.apply(  # type: ignore[no-untyped-call]
                input,
                self.weight,
                self.bias,
                self.running_mean,
                self.running_var,
                self.eps,
                factor,
                process_group,
                ranks,
            )
            return output
        count = ranks * input.numel() // input.shape[1]
        mean, variance = group_statistics(input, process_group)
        self._update(mean, variance * (count / (count - 1)), factor)
        return normalise_together(input, self.weight, self.bias, mean, variance, self.eps, process_group)

    def _update(self, mean: Tensor, unbiased_variance: Tensor, factor: float) -> None:
        if self.running_mean is not None and self.running_var is not None:
            self.running_mean.mul_(1 - factor).add_(mean, alpha=factor)
            self.running_var.mul_(1 - factor).add_(unbiased_variance, alpha=factor)


class _GroupedBatchNorm2d(_GroupedBatchNorm, nn.BatchNorm2d):
    pass


class _GroupedBatchNorm3d(_GroupedBatchNorm, nn.BatchNorm3d):
    pass


_GROUPED: dict[type[nn.Module], type[_GroupedBatchNorm]] = {
    nn.BatchNorm2d: _GroupedBatchNorm2d,
    nn.BatchNorm3d: _GroupedBatchNorm3d,
}
_NATIVE = {grouped: native for native, grouped in _GROUPED.items()}


def _regroup(module: _BatchNorm, name: str, grouping: _Grouping | None) -> None:
    native = _NATIVE.get(type(module), type(module))  # type: ignore[arg-type]
    if native not in _GROUPED:
        raise TypeError(f"{name}: expected BatchNorm2d or BatchNorm3d, got {native.__name__}, which cannot be grouped")
    # The class alone changes, so that every reference to the module, its parameters and its hooks stay valid.
    if grouping is None:
        module.__class__ = native  # type: ignore[assignment]
    else:
        module.__class__ = _GROUPED[native]
        module.grouping = grouping  # type: ignore[assignment]


def _possible_groups(clips_per_rank: int, ranks: int) -> list[int]:
    on_a_rank = [clips for clips in range(1, clips_per_rank) if clips_per_rank % clips == 0]
    return on_a_rank + [clips_per_rank * span for span in range(1, ranks + 1) if ranks % span == 0]


def _neighbours(rank: int, span: int, process_group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """A new process group of the ranks that share this rank's group of clips.

    It is not the one of gradients: those are reduced while backward goes on, and the order of collectives in one
    process group must be the same on all ranks.
    """
    ranks = dist.get_process_group_ranks(process_group)
    own: Any = None
    if len(ranks) == dist.get_world_size():
        for first in range(0, len(ranks), span):  # Every rank must take part in making every group.
            made = dist.new_group(ranks[first : first + span])
            own = made if first <= rank < first + span else own
    else:
        first = rank // span * span
        own = dist.new_group(ranks[first : first + span], use_local_synchronization=True)
    assert isinstance(own, dist.ProcessGroup)
    return own


def _running_statistics(model: nn.Module) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None:
            prefix = f"{name}." if name else ""
            found[f"{prefix}running_mean"] = module.running_mean
            found[f"{prefix}running_var"] = module.running_var
    return found


def _average(buffers: dict[str, Tensor], group: RankGroup) -> dict[str, Tensor]:
    if group.size == 1 or not buffers:
        return {name: buffer.clone() for name, buffer in buffers.items()}
    total = group.all_reduce_sum(torch.cat([buffer.double() for buffer in buffers.values()]))
    parts = torch.split(total / group.size, [buffer.numel() for buffer in buffers.values()])
    return {name: part.to(buffer.dtype) for (name, buffer), part in zip(buffers.items(), parts, strict=True)}


def _copy(values: dict[str, Tensor], buffers: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, buffer in buffers.items():
            buffer.copy_(values[name])
