"""The ranks that share one training step, and the few collectives they need."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from avid_pipeline.errors import ConfigError

__all__ = ["RankGroup"]


class RankGroup:
    """The ranks of a ``torch.distributed`` process group, or this process alone where there is none.

    With one rank every method returns at once, so callers need no case of their own for it.

    Args:
        process_group: The group to use; None for the default group, if one is up.

    Attributes:
        rank: This process's place, from 0.
        size: Number of ranks.
    """

    def __init__(self, process_group: dist.ProcessGroup | None = None) -> None:
        self._process_group = process_group
        self.rank, self.size = 0, 1
        if dist.is_available() and dist.is_initialized():
            self.rank, self.size = dist.get_rank(process_group), dist.get_world_size(process_group)

    def check_current(self) -> None:
        """Refuses a group that was looked up before ``init_process_group``.

        Raises:
            ConfigError: The default process group came up after this object was made.
        """
        if self._process_group is None and RankGroup().size != self.size:
            raise ConfigError(
                f"the memory bank was made for {self.size} rank(s) but the process group now has "
                f"{RankGroup().size}; call torch.distributed.init_process_group before making the bank"
            )

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Concatenates every rank's tensor of one shape ``[B, ...]``, in rank order, to ``[W*B, ...]``."""
        if self.size == 1:
            return tensor
        gathered = tensor.new_empty(self.size * tensor.shape[0], *tensor.shape[1:])
        dist.all_gather_single(gathered, tensor.contiguous(), group=self._process_group)
        return gathered

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Returns the sum over ranks of tensors of one shape."""
        if self.size == 1:
            return tensor
        total = tensor.clone()
        dist.all_reduce(total, group=self._process_group)
        return total

    def reduce_scatter_sum(self, tensor: Tensor) -> Tensor:
        """Sums ``[W*B, ...]`` over ranks and returns this rank's ``[B, ...]`` part of the sum."""
        if self.size == 1:
            return tensor
        part = tensor.new_empty(tensor.shape[0] // self.size, *tensor.shape[1:])
        dist.reduce_scatter_single(part, tensor.contiguous(), group=self._process_group)
        return part

    def barrier(self) -> None:
        """Waits until every rank is here."""
        if self.size > 1:
            dist.barrier(group=self._process_group)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on some rank."""
        if self.size == 1:
            return flag
        # On the CPU, so that a GPU is not waited for; the default group has a backend for both.
        flags = torch.tensor([int(flag)])
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._process_group)
        return bool(flags.item())

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's (picklable) value, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._process_group)
        return values

    def require_equal(self, values: Mapping[str, Any]) -> None:
        """Checks that all ranks were given the same values; unequal ones would hang or corrupt later steps.

        Args:
            values: Name and (picklable) value of what must be the same on every rank.

        Raises:
            ConfigError: On every rank alike, naming the first value that differs and what each rank has.
        """
        if self.size == 1:
            return
        of_ranks = self.gather_objects(dict(values))
        for name in values:
            found = [of_rank[name] for of_rank in of_ranks]
            if any(value != found[0] for value in found):
                raise ConfigError(f"{name} must be the same on all ranks but is {found} (in rank order)")

    def all_gather_ranges(self, rows: Tensor, lengths: list[int]) -> Tensor:
        """Concatenates ranks' tensors ``[lengths[rank], ...]`` of different lengths, in rank order."""
        if self.size == 1:
            return rows
        padded = rows.new_zeros(max(lengths), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = torch.split(self.all_gather(padded), max(lengths))
        return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])
