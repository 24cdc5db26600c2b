"""One of four processes of test_sharded.py: trains on 1 to 4 of them and records what must be equal.

Arguments: rank, number of processes, file to meet at, file for rank 0's results.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from test_contrast import LargestTensor  # beside this script
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from avid_pipeline.collectives import RankGroup
from avid_pipeline.errors import ConfigError
from avid_pipeline.train.losses import AVIDLoss
from avid_pipeline.train.memory_bank import MemoryBank

DIM = 16
BATCH = 12
STEPS = 20
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class TwoHeads(nn.Module):
    """The smallest model with two modalities."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.video, self.audio = nn.Linear(8, DIM), nn.Linear(8, DIM)

    def forward(self, video: Tensor, audio: Tensor) -> tuple[Tensor, Tensor]:
        return self.video(video), self.audio(audio)


def global_batch(step: int, num_instances: int, *, repeat: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(2, BATCH, 8, generator=generator)
    if repeat:  # instances that occur on several ranks
        index = torch.randint(0, num_instances, (BATCH,), generator=generator)
    else:
        index = torch.randperm(num_instances, generator=generator)[:BATCH]
    negatives = torch.randint(0, num_instances, (BATCH, 24), generator=generator)
    return inputs[0], inputs[1], index, negatives


def train(
    group: dist.ProcessGroup,
    *,
    num_instances: int = 61,
    within: float = 1.0,
    forced: bool = False,
    repeat: bool = False,
    strided: bool = False,
    dtype: torch.dtype = torch.float32,
    start: dict[str, Any] | None = None,
    stop: int = STEPS,
) -> dict[str, Any]:
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    model = DistributedDataParallel(TwoHeads(), process_group=group)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    bank = MemoryBank(num_instances, DIM, seed=7, dtype=dtype, process_group=group)
    criterion = AVIDLoss(bank, num_negatives=24, cross=1.0, within=within)
    if start is not None:
        model.module.load_state_dict(start["model"])
        criterion.load_state_dict(start["criterion"])
        bank.load(*start["memories"])
    mine = slice(rank, None, size) if strided else slice(rank * BATCH // size, (rank + 1) * BATCH // size)
    losses, terms, gradients = [], [], []
    for step in range(criterion.step, stop):
        video, audio, index, negatives = global_batch(step, num_instances, repeat=repeat)
        video_emb, audio_emb = model(video[mine], audio[mine])
        loss, parts = criterion(video_emb, audio_emb, index[mine], negatives=negatives[mine] if forced else None)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
        terms.append(parts)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    results: list[Any] = [None] * size
    dist.all_gather_object(results, (losses, terms, criterion.partition_function), group=group)
    return {
        "losses": losses,
        "terms": terms,
        "partition_function": criterion.partition_function,
        "gradients": torch.stack(gradients),
        "memories": torch.stack(bank.full()),
        "model": model.module.state_dict(),
        "criterion": criterion.state_dict(),
        "same_on_all_ranks": all(result == results[0] for result in results),
        "owned": [len(rows) for rows in gather(list(bank.rows), group)],
    }


def move_rows(group: dist.ProcessGroup, dtype: torch.dtype) -> dict[str, Tensor]:
    """Initial rows, the same given to another bank rank by rank, and then to all ranks at once in reverse order."""
    bank, other = (MemoryBank(61, DIM, seed=seed, dtype=dtype, process_group=group) for seed in (7, 8))
    moved = {"initial": torch.stack(bank.full())}
    other.load_local(*bank.local())
    moved["by rank"] = torch.stack(other.full())
    other.load(*moved["initial"].flip(1))
    moved["reversed"] = torch.stack(other.full())
    return moved


def largest_tensor(num_instances: int, num_negatives: int) -> int:
    """The most elements of any tensor in making a bank and in two steps of training."""
    with LargestTensor() as measured:
        criterion = AVIDLoss(MemoryBank(num_instances, DIM), num_negatives=num_negatives, within=1.0)
        for _ in range(2):
            video, audio, index = random_batch(3)
            criterion(video.requires_grad_(), audio, index)[0].backward()  # type: ignore[no-untyped-call]
    return measured.largest


def gather(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def measure_traffic(num_instances: int, num_negatives: int) -> list[tuple[str, int]]:
    """Every collective of the second step, with its number of elements per rank."""
    criterion = AVIDLoss(MemoryBank(num_instances, DIM), num_negatives=num_negatives, within=1.0)
    sent: list[tuple[str, int]] = []

    def recorded(name: str, collective: Callable[[RankGroup, Tensor], Tensor]) -> Callable[..., Tensor]:
        def call(group: RankGroup, tensor: Tensor) -> Tensor:
            sent.append((name, tensor.numel()))
            return collective(group, tensor)

        return call

    names = ("all_gather", "all_reduce_sum", "reduce_scatter_sum")
    originals = {name: getattr(RankGroup, name) for name in names}
    for step in range(2):
        if step == 1:
            for name, original in originals.items():
                setattr(RankGroup, name, recorded(name, original))
        generator = torch.Generator().manual_seed(dist.get_rank())
        embeddings = torch.randn(2, 3, DIM, generator=generator).requires_grad_()
        index = torch.arange(3) + 3 * dist.get_rank()
        criterion(embeddings[0], embeddings[1], index)[0].backward()  # type: ignore[no-untyped-call]
    for name, original in originals.items():
        setattr(RankGroup, name, original)
    return sent


def error_of(action: Callable[[], object]) -> str:
    try:
        action()
    except ConfigError as error:
        return str(error)
    return "no error"


def random_batch(size: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(size, DIM), torch.randn(size, DIM), torch.arange(size)


def main() -> None:
    rank, size, meeting_file, result_file = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    torch.set_num_threads(1)
    early = AVIDLoss(MemoryBank(20, DIM))
    dist.init_process_group("gloo", init_method=f"file://{meeting_file}", rank=rank, world_size=size)
    results: dict[str, Any] = {}
    groups: dict[int, Any] = {}
    for world_size in range(1, size + 1):
        groups[world_size] = group = dist.new_group(list(range(world_size)))
        if rank < world_size:
            assert isinstance(group, dist.ProcessGroup)
            results[f"drawn {world_size}"] = train(group)
            results[f"forced {world_size}"] = train(group, within=0.0, forced=True, repeat=True)
            results[f"strided {world_size}"] = train(group, strided=True)
            results[f"tiny {world_size}"] = train(group, num_instances=3, repeat=True)
            results[f"half {world_size}"] = train(group, dtype=torch.bfloat16)
            results[f"rows {world_size}"] = {str(dtype): move_rows(group, dtype) for dtype in DTYPES}
    halfway = [train(groups[2], stop=STEPS // 2) if rank < 2 else None]
    dist.broadcast_object_list(halfway)
    for world_size in (1, 3, 4):
        if rank < world_size:
            results[f"resumed {world_size}"] = train(groups[world_size], start=halfway[0])
    results["largest tensors"] = gather(largest_tensor(400_000, 10_000))
    results["traffic"] = {(n, k): measure_traffic(n, k) for n in (61, 997) for k in (8, 200)}
    results["made too early"] = gather(error_of(lambda: early(*random_batch(2))))
    unequal = AVIDLoss(MemoryBank(20, DIM))
    results["unequal batches"] = gather(error_of(lambda: unequal(*random_batch(2 + rank % 2))))
    seeds = AVIDLoss(MemoryBank(20, DIM, seed=rank))
    results["unequal seeds"] = gather(error_of(lambda: seeds(*random_batch(2))))
    changed = AVIDLoss(MemoryBank(20, DIM), num_negatives=4)
    changed(*random_batch(2))
    results["changed batch"] = gather(error_of(lambda: changed(*random_batch(3))))
    if rank == 0:
        torch.save(results, result_file)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
