"""One rank of test_agreement.py: searches for positives in groups of 1 to 4 ranks and records what they found.

Arguments: rank, number of processes, file to meet at, file for rank 0's results.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from test_contrast import LargestTensor  # beside this script
from torch import Tensor

from avid_pipeline.errors import ConfigError
from avid_pipeline.row_ranges import owned_rows
from avid_pipeline.train.agreement import find_positives
from avid_pipeline.train.memory_bank import MemoryBank

KINDS = ("consensus", "union", "video", "audio")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def example_memories(num_instances: int, dim: int = 16, *, repeated: int = 0) -> tuple[Tensor, Tensor]:
    """Random unit rows, of which the last ``repeated`` are copies of others anywhere, in both memories."""
    generator = torch.Generator().manual_seed(num_instances)
    memories = F.normalize(torch.randn(2, num_instances, dim, generator=generator), dim=2)
    if repeated:
        originals = torch.randint(0, 5, (repeated,), generator=generator)
        memories[:, num_instances - repeated :] = memories[:, originals]
        memories = memories[:, torch.randperm(num_instances, generator=generator)]
    return memories[0], memories[1]


def search(group: dist.ProcessGroup, memories: tuple[Tensor, Tensor], k: int, kind: Any, **options: Any) -> Tensor:
    """All positives, put together from the ranks' shares."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    rows = owned_rows(len(memories[0]), size, rank)
    video, audio = (memory[rows.start : rows.stop] for memory in memories)
    found = find_positives(video, audio, k, kind, process_group=group, **options)
    assert found.shape == (len(rows), k)
    shares: list[Any] = [None] * size
    dist.all_gather_object(shares, found, group=group)
    return torch.cat(shares)


def search_all_ways(group: dist.ProcessGroup) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for kind in KINDS:
        found[kind] = search(group, example_memories(203), 7, kind, sharded=True)
        found[f"{kind}, repeated"] = search(group, example_memories(203, repeated=120), 7, kind, block_bytes=1 << 13)
    for dtype in DTYPES:
        video, audio = (memory.to(dtype) for memory in example_memories(90))
        found[str(dtype)] = search(group, (video, audio), 5, "consensus", sharded=True)
    found["tiny"] = search(group, example_memories(3), 2, "consensus", sharded=True)
    whole = find_positives(*example_memories(203, repeated=120), 7, process_group=group)
    explicit = find_positives(*example_memories(203, repeated=120), 7, process_group=group, sharded=False)
    assert torch.equal(whole, explicit)
    found["whole"] = whole
    bank = MemoryBank(61, 16, seed=7, process_group=group)
    share = find_positives(*bank.local(), 4, process_group=group, sharded=True)
    shares: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(shares, share, group=group)
    found["bank"] = torch.cat(shares)
    return found


def error_of(action: Callable[[], object]) -> list[str]:
    """The message on every rank."""
    try:
        action()
        message = "no error"
    except ConfigError as error:
        message = str(error)
    messages: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, message)
    return messages


def errors(rank: int) -> dict[str, list[str]]:
    video, audio = example_memories(20)
    wrong = video.clone()
    wrong[4 if rank == 2 else 0, 3] = torch.nan if rank >= 2 else 0.5
    kind: Any = "unison" if rank == 1 else "union"
    return {
        "k": error_of(lambda: find_positives(video, audio, 3 + rank % 2)),
        "kind": error_of(lambda: find_positives(video, audio, 3, kind)),
        "D": error_of(lambda: find_positives(video[:, : 16 - rank], audio[:, : 16 - rank], 3)),
        "shapes": error_of(lambda: find_positives(video, audio[: 20 - rank // 3], 3)),
        "lengths": error_of(lambda: find_positives(video[rank:], audio[rank:], 3, sharded=False)),
        "row": error_of(lambda: find_positives(wrong, audio, 3, sharded=True)),
        "too many": error_of(lambda: find_positives(video, audio, 80, sharded=True)),
    }


def largest_tensor(rank: int, size: int) -> list[int]:
    """Most elements of any tensor of a search for so many rows that a share is larger than a block."""
    memories = example_memories(8000, 64)
    rows = owned_rows(8000, size, rank)
    video, audio = (memory[rows.start : rows.stop].clone() for memory in memories)
    with LargestTensor() as measured:
        find_positives(video, audio, 4, sharded=True, block_bytes=1 << 20)
    largest: list[Any] = [None] * size
    dist.all_gather_object(largest, measured.largest)
    return largest


def main() -> None:
    rank, size, meeting_file, result_file = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting_file}", rank=rank, world_size=size)
    results: dict[str, Any] = {}
    for world_size in range(1, size + 1):
        group = dist.new_group(list(range(world_size)))
        if rank < world_size:
            assert isinstance(group, dist.ProcessGroup)
            results[str(world_size)] = search_all_ways(group)
    results["errors"] = errors(rank)
    results["largest tensors"] = largest_tensor(rank, size)
    if rank == 0:
        torch.save(results, result_file)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
