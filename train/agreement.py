"""Agreement search: for every instance, the other instances that its video and its sound both, or each, find alike."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from avid_pipeline.collectives import RankGroup
from avid_pipeline.errors import ConfigError
from avid_pipeline.row_ranges import owned_rows
from avid_pipeline.train.nearest_rows import AgreementKind, NearestRows, Rows, choose_tile

__all__ = ["AgreementKind", "find_positives"]

# Upper bound for temporary tensors, unless told: on a CPU, an ordinary tile then stays in the processor's cache.
_BLOCK_BYTES = {"cpu": 1 << 27, "cuda": 1 << 30}
# Rows that are checked at once.
_CHECKED_ROWS = 1 << 14
# Squared length beyond which float32 products could overflow.
_LARGEST_SQUARE = 1e18


@torch.no_grad()
def find_positives(
    video_memory: Tensor,
    audio_memory: Tensor,
    k: int,
    kind: AgreementKind = "consensus",
    *,
    process_group: dist.ProcessGroup | None = None,
    sharded: bool | None = None,
    block_bytes: int | None = None,
) -> Tensor:
    """Finds the k instances that agree best with each instance (section 4 of Morgado et al., CVPR 2021).

    Instances are ranked by the minimum of video and audio similarity (``consensus``), their maximum (``union``), or
    one of them (``video``, ``audio``). Similarity is the inner product of rows as they are given, unit vectors.

    In a process group either each rank gives its own rows, which are numbered in rank order, and shards of rows
    travel around a ring while the ranks compute; or all ranks give the whole memory, and the work is divided.

    What is guaranteed: the result is the exact one for similarities computed in float64 in a fixed order of
    summation, and of equal ones the smaller number wins. It does not depend on ``block_bytes``, the number of ranks or
    threads, or the device. Float32 matrix products (TF32 and autocast are off) only choose what is compared in
    float64, under the usual bound for the rounding error of an inner product, which a matrix library keeps if it
    multiplies and adds in float32. Where very many rows are alike to within that bound, as in a collapsed network, all
    their pairs are compared in float64, which takes long.

    Memory of a rank: its own shard, two travelling shards, 17 bytes per positive, and ``block_bytes``.

    Args:
        video_memory: Video rows, float32, bfloat16 or float16 ``[N, D]``, or this rank's share of them.
        audio_memory: Audio rows, alike.
        k: Positives per instance, from 1 to N - 1.
        kind: What ranks the instances.
        process_group: The ranks; None for the default group, if one is up, else this process alone.
        sharded: Whether each rank gives its own rows. None finds out: the memories count as whole if they have the
            same length and the same checksum on all ranks. Shards that hold the same numbers need True.
        block_bytes: Upper bound for the temporary tensors of a block; None for 128 MiB on a CPU, 1 GiB on a GPU.

    Returns:
        Numbers of each row's positives, ascending, without the instance itself: int64 ``[N, k]``, on the memories'
        device. If sharded, those of this rank's rows: ``[len(rows), k]``.

    Raises:
        ConfigError: On every rank alike: the kind is unknown, k out of range, the shapes differ or are not
            ``[N, D]``, a row is not finite, or ranks disagree.
    """
    ranks = RankGroup(process_group)
    own = (video_memory.detach(), audio_memory.detach())
    with_checksum = sharded is None and ranks.size > 1
    offers = _exchange(_describe(own, k, kind, sharded, with_checksum), ranks, process_group)
    _check_offers(offers)
    if sharded is None:
        sharded = any((offer.shapes, offer.checksum) != (offers[0].shapes, offers[0].checksum) for offer in offers)
    lengths = [offer.shapes[0][0] for offer in offers]
    starts = [0, *accumulate(lengths)] if sharded else [0] * ranks.size
    num_instances = sum(lengths) if sharded else lengths[0]
    _check_content(offers, starts, num_instances)

    rows: Rows = {"video": own[:1], "audio": own[1:]}.get(kind, own)
    rows = tuple(memory.contiguous() for memory in rows)
    tile = choose_tile(block_bytes or _BLOCK_BYTES.get(rows[0].device.type, _BLOCK_BYTES["cpu"]), num_instances, k)
    margin = _rounding_margin(rows[0].shape[1], max(offer.largest_square for offer in offers))
    show = ranks.rank == 0 and sys.stderr.isatty()
    with _full_precision(rows[0].device), tqdm(unit="row", disable=not show, desc="agreement") as bar:
        if sharded:
            search = NearestRows(rows, starts[ranks.rank], k, kind, margin, tile)
            bar.total = lengths[ranks.rank] * ranks.size
            _search_ring(search, rows, lengths, starts, ranks, process_group, bar)
            return search.matches()
        shares = [owned_rows(num_instances, ranks.size, rank) for rank in range(ranks.size)]
        mine = shares[ranks.rank]
        search = NearestRows(
            tuple(memory[mine.start : mine.stop] for memory in rows), mine.start, k, kind, margin, tile
        )
        bar.total = len(mine)
        for block in search.blocks():
            search.add(block, rows, 0)
            bar.update(len(block))
        return ranks.all_gather_ranges(search.matches(), [len(share) for share in shares])


def _search_ring(
    search: NearestRows,
    own: Rows,
    lengths: list[int],
    starts: list[int],
    ranks: RankGroup,
    process_group: dist.ProcessGroup | None,
    bar: tqdm[Any],
) -> None:
    """Compares this rank's queries with every rank's rows, which come by one shard after the other."""
    shard = own
    for step in range(ranks.size):
        source = (ranks.rank - step) % ranks.size
        is_last = step == ranks.size - 1
        incoming = tuple(rows.new_empty(0, rows.shape[1]) for rows in own)
        transfers: list[dist.Work] = []
        if not is_last:
            incoming = tuple(rows.new_empty(lengths[source - 1], rows.shape[1]) for rows in own)
            transfers = _pass_on(shard, incoming, ranks, process_group)
        for block in search.blocks():
            search.add(block, shard, starts[source])
            if not is_last:
                search.settle(block, shard, starts[source])
            bar.update(len(block))
        for transfer in transfers:
            transfer.wait()
        shard = incoming


def _pass_on(shard: Rows, incoming: Rows, ranks: RankGroup, process_group: dist.ProcessGroup | None) -> list[dist.Work]:
    """Starts to send a shard to the next rank and to receive the previous rank's. Empty ones are not sent."""
    following, previous = (ranks.rank + 1) % ranks.size, (ranks.rank - 1) % ranks.size
    operations = []
    for tag, (leaving, arriving) in enumerate(zip(shard, incoming, strict=True)):
        if len(leaving):
            operations.append(dist.P2POp(dist.isend, leaving, group=process_group, tag=tag, group_peer=following))
        if len(arriving):
            operations.append(dist.P2POp(dist.irecv, arriving, group=process_group, tag=tag, group_peer=previous))
    return dist.batch_isend_irecv(operations) if operations else []


@dataclass(frozen=True)
class _Offer:
    """What one rank was given, as all ranks get to know it.

    Attributes:
        request: Name and value of what must be the same everywhere.
        shapes: Of both memories.
        problem: What is wrong with the memories' shapes or types, if anything.
        bad_row: First row that is not finite: the memory's name and the row's place, if any.
        largest_square: Of the lengths of rows.
        checksum: Of both memories' bits, if asked for.
    """

    request: dict[str, object]
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    problem: str | None
    bad_row: tuple[str, int] | None = None
    largest_square: float = 0.0
    checksum: int | None = None


def _describe(memories: Rows, k: int, kind: str, sharded: bool | None, with_checksum: bool) -> _Offer:
    video, audio = memories
    request: dict[str, object] = {"k": k, "kind": kind, "sharded": sharded}
    shapes = (tuple(video.shape), tuple(audio.shape))
    problem = None
    if shapes[0] != shapes[1] or video.ndim != 2 or video.shape[1] == 0:
        problem = (
            f"video and audio memories must have one shape [N, D], not {list(shapes[0])} and {list(shapes[1])}; "
            "give both of the same memory bank"
        )
    elif video.dtype != audio.dtype or video.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        problem = f"memories must both be float32, bfloat16 or float16, not {video.dtype} and {audio.dtype}"
    elif video.device != audio.device:
        problem = f"memories must be on one device, not on {video.device} and {audio.device}"
    if problem:
        return _Offer(request, shapes, problem)
    request |= {"D": video.shape[1], "dtype": str(video.dtype)}
    bad_row, largest_square, checksum = None, 0.0, 0
    for name, memory in (("video", video), ("audio", audio)):
        for start in range(0, len(memory), _CHECKED_ROWS):
            part = memory[start : start + _CHECKED_ROWS]
            squares = part.double().square().sum(dim=1)
            largest_square = max(largest_square, float(squares.max()))
            bad = (~(squares <= _LARGEST_SQUARE)).nonzero()
            if len(bad) and (bad_row is None or start + int(bad[0]) < bad_row[1]):
                bad_row = name, start + int(bad[0])
            if with_checksum:
                checksum = (checksum * 31 + _checksum(part)) % (1 << 64)
    return _Offer(request, shapes, None, bad_row, largest_square, checksum)


def _checksum(part: Tensor) -> int:
    """Of the bits, by integers alone, so that it is the same everywhere; depends on the order of rows."""
    bits = part.contiguous().view(torch.int32 if part.element_size() == 4 else torch.int16)
    place = torch.arange(1, part.shape[1] + 1, device=part.device)
    by_row = (bits.long() * place).sum(dim=1)
    return int((by_row * torch.arange(1, len(part) + 1, device=part.device)).sum())


def _exchange(offer: _Offer, ranks: RankGroup, process_group: dist.ProcessGroup | None) -> list[_Offer]:
    """Every rank's offer, in rank order."""
    if ranks.size == 1:
        return [offer]
    offers: list[_Offer | None] = [None] * ranks.size
    dist.all_gather_object(offers, offer, group=process_group)
    return [offer for offer in offers if offer is not None]


def _check_offers(offers: list[_Offer]) -> None:
    """Refuses what no rank can work on; all ranks see the same offers, so all raise the same error."""
    for rank, offer in enumerate(offers):
        if offer.problem:
            raise ConfigError(f"agreement search{f', rank {rank}' if len(offers) > 1 else ''}: {offer.problem}")
    for name in offers[0].request:
        found = [offer.request[name] for offer in offers]
        if any(value != found[0] for value in found):
            raise ConfigError(f"agreement search: {name} must be the same on all ranks but is {found} (in rank order)")
    kind, sharded = offers[0].request["kind"], offers[0].request["sharded"]
    if kind not in get_args(AgreementKind):
        raise ConfigError(f"agreement search: kind must be one of {', '.join(get_args(AgreementKind))}, not {kind!r}")
    lengths = [offer.shapes[0][0] for offer in offers]
    if sharded is False and len(set(lengths)) > 1:
        raise ConfigError(
            f"agreement search: all ranks must give the whole memory if sharded=False, but give {lengths} rows (in "
            "rank order); give sharded=True if each gives its own"
        )


def _check_content(offers: list[_Offer], starts: list[int], num_instances: int) -> None:
    k = offers[0].request["k"]
    if not isinstance(k, int) or not 1 <= k <= num_instances - 1:
        raise ConfigError(
            f"agreement search: k must be a whole number from 1 to {num_instances - 1}, less than the {num_instances} "
            f"instances, not {k}"
        )
    for start, offer in zip(starts, offers, strict=False):
        if offer.bad_row:
            raise ConfigError(
                f"agreement search: row {start + offer.bad_row[1]} of the {offer.bad_row[0]} memory holds NaN, "
                "infinity or numbers too large for unit vectors; the training diverged: take an earlier checkpoint"
            )


def _rounding_margin(dim: int, largest_square: float) -> float:
    """Twice the most by which a float32 inner product of two rows can be wrong, in whatever order it is added."""
    unit = 2.0**-24
    error = (dim + 4) * unit / (1 - (dim + 4) * unit) * largest_square
    return 2 * (error + math.ldexp(dim, -120))


@contextlib.contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Float32 products in float32, whatever the process has chosen for its networks."""
    chosen = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(chosen)
