"""One of four processes of test_sharded.py: trains on 1 to 4 of them and records what must be equal.

Arguments: rank, number of processes, file to meet at, file for rank 0's results.
"""

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from test_contrast import LargestTensor  # beside this script
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from avid_pipeline.errors import ConfigError
from avid_pipeline.train.losses import AVIDCMALoss, AVIDLoss
from avid_pipeline.train.memory_bank import MemoryBank

DIM = 16
BATCH = 12
STEPS = 20
PARTS = {1: 2, 2: 3, 3: 2, 4: 3}  # Of every rank's share of a batch, by the number of ranks.
COEFFICIENTS = (1.0, 0.5, 0.25, 1.0)
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


def make_positives(num_instances: int, k: int, seed: int = 0) -> Tensor:
    """Distinct other instances, [N, k]."""
    keys = torch.rand(num_instances, num_instances, generator=torch.Generator().manual_seed(seed))
    return keys.fill_diagonal_(2).argsort(dim=1)[:, :k]


def make_criterion(bank: MemoryBank, *, within: float, positives: int) -> AVIDLoss | AVIDCMALoss:
    """AVID without positives, else AVID+CMA with all its terms; odd ranks are given their own rows only."""
    if positives == 0:
        return AVIDLoss(bank, num_negatives=24, cross=1.0, within=within)
    given = make_positives(bank.num_instances, positives)
    if bank.group.rank % 2 == 1:
        given = given[bank.rows.start : bank.rows.stop]
    return AVIDCMALoss(bank, given, 24, 8, *COEFFICIENTS)


def train(
    group: dist.ProcessGroup,
    *,
    num_instances: int = 61,
    within: float = 1.0,
    positives: int = 0,
    forced: bool = False,
    repeat: bool = False,
    strided: bool = False,
    parts: int = 1,
    partition_function: float | None = None,
    dtype: torch.dtype = torch.float32,
    start: dict[str, Any] | None = None,
    stop: int = STEPS,
) -> dict[str, Any]:
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    model = DistributedDataParallel(TwoHeads(), process_group=group)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    bank = MemoryBank(num_instances, DIM, seed=7, dtype=dtype, process_group=group)
    criterion = make_criterion(bank, within=within, positives=positives)
    criterion.partition_function = partition_function
    if start is not None:
        model.module.load_state_dict(start["model"])
        criterion.load_state_dict(start["criterion"])
        bank.load(*start["memories"])
    mine = slice(rank, None, size) if strided else slice(rank * BATCH // size, (rank + 1) * BATCH // size)
    losses, terms, gradients = [], [], []
    for step in range(criterion.step, stop):
        if step == STEPS // 2 and isinstance(criterion, AVIDCMALoss) and num_instances > 3:
            criterion.positives = make_positives(num_instances, positives + 1, seed=1)  # Found anew.
        video, audio, index, negatives = (tensor[mine] for tensor in global_batch(step, num_instances, repeat=repeat))
        optimizer.zero_grad()
        found = []
        for part in range(parts):
            is_last, own = part == parts - 1, torch.arange(len(index)).chunk(parts)[part]
            chosen = negatives[own] if forced else None
            video_emb, audio_emb = model(video[own], audio[own])
            loss, named = criterion(video_emb, audio_emb, index[own], negatives=chosen, end_of_step=is_last)
            (loss / parts).backward()
            found.append({"loss": loss.item(), **named})
        optimizer.step()
        means = {name: sum(of_part[name] for of_part in found) / parts for name in found[0]}
        losses.append(means.pop("loss"))
        terms.append(means)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    drift = bank.take_drift()
    results: list[Any] = [None] * size
    dist.all_gather_object(results, (losses, terms, criterion.partition_function, drift), group=group)
    return {
        "losses": losses,
        "terms": terms,
        "partition_function": criterion.partition_function,
        "drift": drift,
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


def largest_tensor(num_instances: int, num_negatives: int, *, positives: int = 0) -> int:
    """The most elements of any tensor in making a bank and in two steps of training, one of them in parts."""
    with LargestTensor() as measured:
        criterion = wide_criterion(num_instances, num_negatives, positives)
        for end_of_step in (True, False, True):
            video, audio, index = random_batch(3)
            video.requires_grad_()
            criterion(video, audio, index, end_of_step=end_of_step)[0].backward()
    return measured.largest


def wide_criterion(num_instances: int, num_negatives: int, positives: int) -> AVIDLoss | AVIDCMALoss:
    """All terms; positives are given by each rank for its own rows."""
    bank = MemoryBank(num_instances, DIM)
    if positives == 0:
        return AVIDLoss(bank, num_negatives, within=1.0)
    rows = torch.arange(bank.rows.start, bank.rows.stop)[:, None]
    given = (rows + torch.arange(1, positives + 1)) % num_instances
    return AVIDCMALoss(bank, given, num_negatives, 4, *COEFFICIENTS)


def look_up_positives(group: dist.ProcessGroup, num_instances: int) -> dict[str, Any]:
    """What every rank finds for some instances, and what it holds itself."""
    bank = MemoryBank(num_instances, DIM, process_group=group)
    criterion = make_criterion(bank, within=0.0, positives=1)
    assert isinstance(criterion, AVIDCMALoss)
    index = torch.tensor([2, 0, 1, 2, num_instances - 1])
    found = gather(criterion.positives_of(index), group)
    held = torch.cat(gather(criterion.positives, group))
    return {"index": index, "found": found, "held": held, "given": make_positives(num_instances, 1)}


def gather(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


class Traffic(TorchDispatchMode):
    """Records every collective with the bytes that a rank puts in, whoever calls it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sent: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            # Gathers and scatters name their output first and then their input; a reduction has one list for both.
            given = args[1] if isinstance(args[0], Tensor) else args[0]
            tensors = [given] if isinstance(given, Tensor) else flatten(given)
            self.sent.append((func.overloadpacket.__name__, sum(tensor.nbytes for tensor in tensors)))
        return func(*args, **(kwargs or {}))


def flatten(tensors: Iterable[Any]) -> list[Tensor]:
    return [one for item in tensors for one in ([item] if isinstance(item, Tensor) else flatten(item))]


def measure_traffic(
    num_instances: int, num_negatives: int, *, positives: int = 0, parts: int = 1
) -> list[tuple[str, int]]:
    """Every collective of the second step, with its bytes per rank."""
    criterion = wide_criterion(num_instances, num_negatives, positives)

    def step(generator: torch.Generator) -> None:
        for part in range(parts):
            embeddings = torch.randn(2, 3, DIM, generator=generator).requires_grad_()
            index = torch.arange(3) + 3 * dist.get_rank()
            criterion(embeddings[0], embeddings[1], index, end_of_step=part == parts - 1)[0].backward()

    generator = torch.Generator().manual_seed(dist.get_rank())
    step(generator)
    with Traffic() as traffic:
        step(generator)
    return traffic.sent


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
            results[f"cma {world_size}"] = train(group, positives=4)
            results[f"cma repeat {world_size}"] = train(group, positives=4, repeat=True, forced=True)
            results[f"cma tiny {world_size}"] = train(group, num_instances=3, positives=1, repeat=True)
            results[f"cma half {world_size}"] = train(group, positives=4, dtype=torch.bfloat16)
            results[f"cma float16 {world_size}"] = train(group, positives=4, dtype=torch.float16)
            results[f"cma fixed {world_size}"] = train(group, positives=4, partition_function=1.5)
            parts = PARTS[world_size]
            results[f"cma parts {world_size}"] = train(group, positives=4, partition_function=1.5, parts=parts)
            results[f"positives {world_size}"] = [look_up_positives(group, n) for n in (3, 61)]
            results[f"rows {world_size}"] = {str(dtype): move_rows(group, dtype) for dtype in DTYPES}
    halfway = [train(groups[2], stop=STEPS // 2) if rank < 2 else None]
    dist.broadcast_object_list(halfway)
    for world_size in (1, 3, 4):
        if rank < world_size:
            results[f"resumed {world_size}"] = train(groups[world_size], start=halfway[0])
    results["largest tensors"] = gather(largest_tensor(400_000, 10_000))
    results["largest tensors of CMA"] = gather(largest_tensor(400_000, 10_000, positives=8))
    sizes = [(n, k) for n in (61, 997) for k in (8, 200)]
    results["traffic"] = {(n, k): measure_traffic(n, k) for n, k in sizes}
    results["traffic of CMA"] = {(n, k): measure_traffic(n, k, positives=5) for n, k in sizes}
    results["traffic of parts"] = {(n, k): measure_traffic(n, k, positives=5, parts=3) for n, k in sizes}
    results["made too early"] = gather(error_of(lambda: early(*random_batch(2))))
    unequal = AVIDLoss(MemoryBank(20, DIM))
    results["unequal batches"] = gather(error_of(lambda: unequal(*random_batch(2 + rank % 2))))
    seeds = AVIDLoss(MemoryBank(20, DIM, seed=rank))
    results["unequal seeds"] = gather(error_of(lambda: seeds(*random_batch(2))))
    changed = AVIDLoss(MemoryBank(20, DIM), num_negatives=4)
    changed(*random_batch(2))
    results["changed batch"] = gather(error_of(lambda: changed(*random_batch(3))))
    widths = AVIDCMALoss(MemoryBank(20, DIM), torch.zeros(5, 1 + rank % 2, dtype=torch.int64), 4, 4)
    results["unequal positives"] = gather(error_of(lambda: widths(*random_batch(2))))
    if rank == 0:
        torch.save(results, result_file)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
