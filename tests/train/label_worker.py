"""One of four processes of test_class_purity.py: tables of classes on 1 to 4 of them.

Arguments: rank, number of processes, file to meet at, file for rank 0's results.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from avid_pipeline.collectives import RankGroup
from avid_pipeline.errors import ConfigError
from avid_pipeline.row_ranges import owned_rows
from avid_pipeline.train import class_purity
from avid_pipeline.train.class_purity import LabelTable

NUM_ROWS, BATCH, STEPS, POSITIVES = 61, 12, 6, 5
CLASS_COUNTS = (3, 64, 200)


def labels_of(num_classes: int, rows: Tensor) -> list[tuple[int, ...]]:
    """None, one or two classes of each row, among them the first and the last."""
    some = (0, num_classes // 2, num_classes - 1)
    return [
        () if row % 7 == 0 else tuple({some[row % 3], some[row // 3 % 3] if row % 4 == 1 else some[row % 3]})
        for row in rows.tolist()
    ]


def batch_of(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    index = torch.randperm(NUM_ROWS, generator=generator)[:BATCH]
    return index, torch.randint(0, NUM_ROWS, (BATCH, POSITIVES), generator=generator)


def learn_and_ask(group: RankGroup, num_classes: int) -> list[float | None]:
    """Purity after every second step."""
    table = LabelTable(owned_rows(NUM_ROWS, group.size, group.rank), num_classes, group)
    mine = slice(group.rank * BATCH // group.size, (group.rank + 1) * BATCH // group.size)
    found = []
    for step in range(STEPS):
        index, candidates = batch_of(step)
        table.learn(index[mine], labels_of(num_classes, index[mine]))
        if step % 2:
            found.append(table.purity(index, candidates))
    return found


def error_of(action: Callable[[], object]) -> str:
    try:
        action()
    except ConfigError as error:
        return str(error)
    return "no error"


def gather(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def unequal_errors(group: RankGroup) -> dict[str, str]:
    def table() -> LabelTable:
        return LabelTable(owned_rows(NUM_ROWS, group.size, group.rank), 3, group)

    index, candidates = batch_of(0)
    batches, queries, widths = table(), table(), table()
    batches.learn(index[: 2 + group.rank % 2], [(1,)] * (2 + group.rank % 2))
    return {
        "clips": error_of(lambda: batches.purity(index, candidates)),
        "queries": error_of(lambda: queries.purity(index[group.rank :], candidates[group.rank :])),
        "candidates": error_of(lambda: widths.purity(index, candidates[:, group.rank :])),
    }


def count_collectives(group: RankGroup) -> dict[str, list[int]]:
    """Numbers in every collective of one rank: while learning, and when purity is asked for."""
    sent: list[int] = []
    originals = {name: getattr(RankGroup, name) for name in ("all_gather", "all_reduce_sum")}

    def recorded(original: Callable[[RankGroup, Tensor], Tensor]) -> Callable[[RankGroup, Tensor], Tensor]:
        def call(of: RankGroup, tensor: Tensor) -> Tensor:
            sent.append(tensor.numel())
            return original(of, tensor)

        return call

    for name, original in originals.items():
        setattr(RankGroup, name, recorded(original))
    table, (index, candidates) = LabelTable(owned_rows(NUM_ROWS, group.size, group.rank), 65, group), batch_of(0)
    found = {}
    for _ in range(20):
        table.learn(index, [(64,)] * BATCH)
    found["learning"] = list(sent)
    table.purity(index, candidates)
    found["asking"] = sent[len(found["learning"]) :]
    table.purity(index, candidates)
    found["asking again"] = sent[len(found["learning"]) + len(found["asking"]) :]
    for name, original in originals.items():
        setattr(RankGroup, name, original)
    return found


def main() -> None:
    rank, size, meeting_file, result_file = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting_file}", rank=rank, world_size=size)
    results: dict[str, Any] = {}
    for world_size in range(1, size + 1):
        process_group = dist.new_group(list(range(world_size)))
        if rank >= world_size:
            continue
        assert isinstance(process_group, dist.ProcessGroup)
        group = RankGroup(process_group)
        purities = {num_classes: learn_and_ask(group, num_classes) for num_classes in CLASS_COUNTS}
        class_purity._MOST_BUFFERED, most = 2 * BATCH // world_size, class_purity._MOST_BUFFERED
        purities_of_small_buffers = learn_and_ask(group, 200)
        class_purity._MOST_BUFFERED = most
        results[f"{world_size}"] = gather(purities, process_group)
        results[f"small buffers {world_size}"] = gather(purities_of_small_buffers, process_group)
    whole = RankGroup()
    results["unequal"] = gather(unequal_errors(whole))
    results["collectives"] = count_collectives(whole)
    if rank == 0:
        torch.save(results, result_file)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
