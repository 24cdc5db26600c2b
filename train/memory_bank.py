"""The memory bank: one video and one audio vector per training instance, its rows divided over ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812 (the name everyone knows)
from numpy.typing import NDArray
from torch import Tensor

from avid_pipeline.collectives import RankGroup
from avid_pipeline.errors import ConfigError
from avid_pipeline.row_ranges import owned_rows
from avid_pipeline.train.keys import derive_key

__all__ = ["MODALITIES", "MemoryBank", "Modality", "OwnedCandidates"]

Modality = Literal["video", "audio"]
MODALITIES: tuple[Modality, Modality] = ("video", "audio")

# Initial rows are drawn in blocks of this many, each from its own generator, so that any rank can draw any rows.
_INITIAL_BLOCK_ROWS = 4096
# Bytes of memory rows in flight at once: few enough for a CPU's cache, enough to fill a GPU.
_BLOCK_BYTES = {"cpu": 1 << 22, "cuda": 1 << 26}


@dataclass(frozen=True)
class OwnedCandidates:
    """Those candidates (positives and negatives) of a global batch that one rank owns.

    Attributes:
        rows: Local row numbers, int64 ``[Q, C]``; where a query has fewer than C, the rest is row 0.
        columns: Column of the candidate table that each came from, int64 ``[Q, C]``, or the number of its
            columns where there is none. None if this rank owns every candidate, so that ``rows`` is the table.
        num_columns: R, columns of the candidate table.
    """

    rows: Tensor
    columns: Tensor | None
    num_columns: int


class MemoryBank:
    """Video and audio vectors of all instances; each rank holds one contiguous range of rows.

    Section 3 of Morgado et al., CVPR 2021: a row is the exponential moving average of its instance's
    normalised embeddings. Queries travel between ranks, rows never do: nothing here but :meth:`full` makes a
    tensor of N rows.

    Rows start as random unit vectors, which depend on the seed but not on the number of ranks.

    Args:
        num_instances: N, rows in total over all ranks, at least 2.
        dim: D, length of a vector.
        momentum: Weight of the old row in an update, in [0, 1].
        seed: Seed of the initial rows and of the negatives drawn for this bank, not negative.
        dtype: How rows are stored: float32, bfloat16 or float16. Arithmetic is float32 whatever is stored.
        device: Where rows are stored.
        process_group: Ranks to divide rows over; None for the default group, if one is up, else this process.

    Attributes:
        rows: Instances whose rows this rank owns.
        group: The ranks that share the bank.

    Raises:
        ConfigError: If an argument is out of range.
    """

    def __init__(
        self,
        num_instances: int,
        dim: int,
        momentum: float = 0.5,
        seed: int = 0,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if num_instances < 2 or dim < 1:
            raise ConfigError(f"a memory bank needs num_instances >= 2 and dim >= 1, not {num_instances}, {dim}")
        if not 0 <= momentum <= 1:
            raise ConfigError(f"memory bank: momentum must lie in [0, 1], not {momentum}")
        if seed < 0:
            raise ConfigError(f"memory bank: seed must not be negative, but is {seed}")
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ConfigError(f"memory bank: dtype must be float32, bfloat16 or float16, not {dtype}")
        self.num_instances = num_instances
        self.dim = dim
        self.momentum = momentum
        self.seed = seed
        self.group = RankGroup(process_group)
        self.rows = owned_rows(num_instances, self.group.size, self.group.rank)
        self._shards = {
            modality: _initial_rows(self.rows, dim, seed, modality, dtype).to(device) for modality in MODALITIES
        }
        # Video's and audio's sum of 1 - cosine(old row, new row), over so many updated rows.
        self._drift = torch.zeros(len(MODALITIES), dtype=torch.float64, device=device)
        self._num_updated = 0

    @property
    def device(self) -> torch.device:
        """Where rows are stored."""
        return self._shards["video"].device

    @property
    def dtype(self) -> torch.dtype:
        """How rows are stored."""
        return self._shards["video"].dtype

    def to(self, device: torch.device | str) -> Self:
        """Moves this rank's rows to a device; returns the bank."""
        self._shards = {modality: shard.to(device) for modality, shard in self._shards.items()}
        self._drift = self._drift.to(device)
        return self

    def local(self) -> tuple[Tensor, Tensor]:
        """This rank's rows as stored, without a copy: video and audio, each ``[len(rows), D]``."""
        return self._shards["video"], self._shards["audio"]

    def full(self) -> tuple[Tensor, Tensor]:
        """Gathers all rows on every rank as float32: video and audio, each ``[N, D]``. Not for use while training."""
        lengths = [len(owned_rows(self.num_instances, self.group.size, rank)) for rank in range(self.group.size)]
        video, audio = (self.group.all_gather_ranges(shard, lengths) for shard in self.local())
        return video.to(torch.float32, copy=True), audio.to(torch.float32, copy=True)

    def load(self, video: Tensor | NDArray[np.floating], audio: Tensor | NDArray[np.floating]) -> None:
        """Replaces all rows, each rank taking its own, without normalising them.

        Args:
            video: All video rows, ``[N, D]``.
            audio: All audio rows, ``[N, D]``.

        Raises:
            ConfigError: If a shape is not ``[N, D]``.
        """
        self._load(video, audio, range(self.num_instances), "the bank")

    def load_local(self, video: Tensor | NDArray[np.floating], audio: Tensor | NDArray[np.floating]) -> None:
        """Replaces this rank's rows; the inverse of :meth:`local`.

        Args:
            video: Video rows, ``[len(rows), D]``.
            audio: Audio rows, ``[len(rows), D]``.

        Raises:
            ConfigError: If a shape is not ``[len(rows), D]``.
        """
        self._load(video, audio, self.rows, f"rank {self.group.rank}")

    @torch.no_grad()
    def _load(
        self,
        video: Tensor | NDArray[np.floating],
        audio: Tensor | NDArray[np.floating],
        given: range,
        owner: str,
    ) -> None:
        first = self.rows.start - given.start
        loaded = {"video": torch.as_tensor(video), "audio": torch.as_tensor(audio)}
        for modality, memory in loaded.items():
            if memory.shape != (len(given), self.dim):
                raise ConfigError(
                    f"{modality} memory to load has shape {list(memory.shape)}, but {owner} holds "
                    f"{[len(given), self.dim]}; load a memory of the same dataset and embedding size"
                )
        for modality in MODALITIES:
            self._shards[modality].copy_(loaded[modality][first : first + len(self.rows)])

    def check_instances(self, name: str, instances: Tensor, shape: list[int]) -> None:
        """Refuses anything but row numbers, int64 of the given shape, at least one.

        Raises:
            ConfigError: Naming them by ``name``.
        """
        if instances.dtype != torch.int64 or list(instances.shape) != shape or instances.numel() == 0:
            raise ConfigError(
                f"{name} must be int64 of shape {shape}, but is {instances.dtype} of shape {list(instances.shape)}"
            )
        smallest, largest = (int(bound) for bound in instances.aminmax())
        if smallest < 0 or largest >= self.num_instances:
            found = smallest if smallest < 0 else largest
            raise ConfigError(
                f"{name} holds instance {found}, but the memory bank has rows 0 to {self.num_instances - 1} "
                f"(num_instances={self.num_instances}); make the bank for the dataset that is read"
            )

    def find_owned(self, candidates: Tensor) -> OwnedCandidates:
        """Picks from every query's candidates those whose rows this rank owns.

        Args:
            candidates: Instances to score against each of the global batch's queries, int64 ``[Q, R]``, the same
                on all ranks.

        Returns:
            They, packed to the left; ``C`` is the most that any query has here.
        """
        if self.group.size == 1:
            return OwnedCandidates(candidates, None, candidates.shape[1])
        owned = (candidates >= self.rows.start) & (candidates < self.rows.stop)
        queries, columns = owned.nonzero(as_tuple=True)
        counts = owned.sum(dim=1)
        # Candidates come in query order: a candidate's place is its distance from its query's first.
        places = torch.arange(len(queries), device=candidates.device) - (counts.cumsum(0) - counts)[queries]
        shape = (len(candidates), int(counts.max()))
        packed_rows = candidates.new_zeros(shape)
        packed_columns = candidates.new_full(shape, candidates.shape[1])
        packed_rows[queries, places] = candidates[queries, columns] - self.rows.start
        packed_columns[queries, places] = columns
        return OwnedCandidates(packed_rows, packed_columns, candidates.shape[1])

    def blocks(self, modality: Modality, owned: OwnedCandidates) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """Reads owned candidates' vectors a few queries at a time, so that a block is still in cache when used.

        Args:
            modality: Which memory to read.
            owned: The candidates.

        Yields:
            The queries of the block as a slice of length q, their candidates' vectors as float32 ``[q, C, D]``,
            and these candidates' ``columns`` ``[q, C]`` or None.
        """
        shard = self._shards[modality]
        num_queries, width = owned.rows.shape
        if width == 0:
            return
        block_bytes = _BLOCK_BYTES.get(shard.device.type, _BLOCK_BYTES["cpu"])
        height = max(1, block_bytes // (width * self.dim * 4))
        for first in range(0, num_queries, height):
            queries = slice(first, min(first + height, num_queries))
            block = _read_rows(shard, owned.rows[queries].reshape(-1)).view(-1, width, self.dim)
            yield queries, block, None if owned.columns is None else owned.columns[queries]

    @torch.no_grad()
    def update(self, index: Tensor, embeddings: Tensor) -> None:
        """Moves the rows of a global batch towards its embeddings; each rank updates those it owns.

        ``row <- normalise(momentum * row + (1 - momentum) * embedding)``. If an instance occurs more than once
        in the batch, its last occurrence in global batch order counts and the others are ignored.

        Args:
            index: Instances of the global batch, int64 ``[Q]``, the same on all ranks.
            embeddings: Their unit vectors, float32 ``[Q, 2, D]``, video then audio.
        """
        by_instance, order = index.sort(stable=True)
        is_last = by_instance.diff(append=by_instance.new_full((1,), -1)) != 0
        is_owned = (by_instance >= self.rows.start) & (by_instance < self.rows.stop)
        kept = order[is_last & is_owned]
        local = index[kept] - self.rows.start
        self._num_updated += len(kept)
        for place, modality in enumerate(MODALITIES):
            shard = self._shards[modality]
            old = shard[local].to(torch.float32)
            new = F.normalize(torch.lerp(embeddings[kept, place], old, self.momentum), dim=1)
            shard[local] = new.to(shard.dtype)
            self._drift[place] += (1 - F.cosine_similarity(old, new, dim=1)).sum()

    def take_drift(self) -> dict[Modality, float]:
        """How far updates moved rows since the last call: the mean of 1 - cosine(old row, new row). All ranks call.

        An instance that was updated n times counts n times.

        Returns:
            For each modality the mean over the updated rows of all ranks, 0 to 2; NaN if no row was updated.
        """
        counted = torch.cat([self._drift, self._drift.new_tensor([self._num_updated])])
        *sums, count = self.group.all_reduce_sum(counted).tolist()
        self._drift, self._num_updated = torch.zeros_like(self._drift), 0
        means = [total / count if count else math.nan for total in sums]
        return dict(zip(MODALITIES, means, strict=True))


def _read_rows(shard: Tensor, rows: Tensor) -> Tensor:
    """Copies rows ``[R, D]`` out of a memory, as float32."""
    if shard.dtype == torch.float32 and shard.device.type == "cpu":
        # A bag of one row is that row. This kernel fetches rows ahead, which index_select does not: rows lie far
        # apart in a memory of gigabytes, and waiting for them is most of the loss's time.
        return F.embedding_bag(rows, shard, torch.arange(len(rows)), mode="sum")
    return shard.index_select(0, rows).to(torch.float32)


def _initial_rows(rows: range, dim: int, seed: int, modality: Modality, dtype: torch.dtype) -> Tensor:
    """Random unit vectors ``[len(rows), dim]``, drawn on the CPU: the same for any division and device."""
    initial = torch.empty(len(rows), dim, dtype=dtype)
    first_block = rows.start // _INITIAL_BLOCK_ROWS
    for block in range(first_block, -(-rows.stop // _INITIAL_BLOCK_ROWS) if rows else first_block):
        generator = torch.Generator().manual_seed(derive_key(seed, f"{modality} memory", block))
        drawn = F.normalize(torch.randn(_INITIAL_BLOCK_ROWS, dim, generator=generator), dim=1)
        start = block * _INITIAL_BLOCK_ROWS
        first, stop = max(rows.start, start), min(rows.stop, start + _INITIAL_BLOCK_ROWS)
        initial[first - rows.start : stop - rows.start] = drawn[first - start : stop - start]
    return initial
