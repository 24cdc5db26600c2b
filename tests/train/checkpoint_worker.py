"""One of four processes of test_bank_snapshot.py: saves and loads checkpoints on 1 to 4 of them.

Arguments: rank, number of processes, file to meet at, file for rank 0's results, folder of the runs.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from avid_pipeline.collectives import RankGroup
from avid_pipeline.errors import AvidPipelineError, ConfigError, StorageError
from avid_pipeline.row_ranges import owned_rows
from avid_pipeline.shards_spec.manifest import SpectrogramStatistics
from avid_pipeline.shards_spec.storage import Storage, open_storage
from avid_pipeline.streams.state import StreamState
from avid_pipeline.train.checkpoint import (
    BANK_NAME,
    CheckpointRecord,
    read_record,
    restore_bank,
    restore_model,
    restore_positives,
    restore_trainer_state,
    resume_newest,
    save_checkpoint,
)
from avid_pipeline.train.config import TrainConfig
from avid_pipeline.train.memory_bank import MemoryBank

NUM_INSTANCES, DIM, NUM_POSITIVES = 61, 4, 3
CONFIG = TrainConfig.model_validate({"epochs": 2, "data": {"batch_size": 2}, "optimizer": {"learning_rate": 1e-3}})
STATISTICS = SpectrogramStatistics(mean=(0.0,) * 257, std=(1.0,) * 257, frames=3)


def memories(step: int, num_instances: int = NUM_INSTANCES) -> tuple[Tensor, Tensor, Tensor]:
    """Video and audio rows and positives of all instances, different at every step; exact in bfloat16."""
    generator = torch.Generator().manual_seed(step)
    video, audio = torch.randn(2, num_instances, DIM, generator=generator).bfloat16().float()
    return video, audio, torch.randint(0, num_instances, (num_instances, NUM_POSITIVES), generator=generator)


def save(
    root: Storage,
    step: int,
    group: dist.ProcessGroup | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    num_instances: int = NUM_INSTANCES,
    positives: bool = True,
    keep: int | None = None,
    seed: int = 0,
) -> str:
    video, audio, of_all = memories(step, num_instances)
    bank = MemoryBank(num_instances, DIM, dtype=dtype, process_group=group)
    bank.load(video, audio)
    return save_checkpoint(
        root,
        stream=StreamState("sha256:of the data", seed=seed, epoch=0, step=step),
        config=CONFIG,
        statistics=STATISTICS,
        model=nn.Identity(),  # type: ignore[arg-type]
        model_state={"weight": torch.full((3,), float(step))},
        trainer_state={"step": step},
        bank=bank,
        positives=of_all[bank.rows.start : bank.rows.stop] if positives else None,
        keep=keep,
    )


def restore(root: Storage, name: str, record: CheckpointRecord, bank: MemoryBank) -> None:
    """Restore everything, and see whether all of it is of the step that the record names."""
    assert record.stream is not None
    step = int(record.stream["step"])
    model = nn.Linear(1, 3, bias=False)
    model.weight = nn.Parameter(torch.zeros(3))
    restore_model(root, name, record, model)  # type: ignore[arg-type]
    trainer = restore_trainer_state(root, name, record)
    restore_bank(root, name, bank)
    positives = restore_positives(root, name, bank)
    rows = slice(bank.rows.start, bank.rows.stop)
    expected = [tensor[rows] for tensor in memories(step, bank.num_instances)]
    assert torch.equal(model.weight.detach(), torch.full((3,), float(step)))
    assert trainer == {"step": step}
    assert positives is not None
    for tensor, found in zip(expected, (*bank.local(), positives), strict=True):
        assert torch.equal(tensor, found.to(tensor.dtype)), (name, bank.rows)


def resume(root: Storage, group: dist.ProcessGroup | None = None) -> tuple[str | None, list[str]]:
    """The name that this rank took up, and what it was warned of."""
    bank, warnings = MemoryBank(NUM_INSTANCES, DIM, seed=9, process_group=group), list[str]()

    def attempt(name: str, record: CheckpointRecord) -> None:
        restore(root, name, record, bank)

    return resume_newest(root, bank.group, attempt, warnings.append), warnings


def gather(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def error_of(action: Callable[[], object]) -> tuple[str, str]:
    try:
        action()
    except (AvidPipelineError, ZeroDivisionError) as error:
        return type(error).__name__, str(error)
    return "none", ""


def round_trips(folder: Path, rank: int, groups: dict[int, Any]) -> int:
    """Every world size loads what every world size saved, of each dtype and of fewer rows than ranks."""
    loaded = 0
    for num_instances in (NUM_INSTANCES, 3):
        root = open_storage(folder / f"round trips {num_instances}", create=True)
        for saving in groups:
            dtype = (torch.float32, torch.bfloat16)[saving % 2]
            name = f"checkpoints/step-{saving:08d}"
            if rank < saving:
                assert save(root, saving, groups[saving], dtype=dtype, num_instances=num_instances) == name
            dist.barrier()
            for loading in groups:
                if rank < loading:
                    bank = MemoryBank(num_instances, DIM, seed=9, process_group=groups[loading])
                    record = read_record(root, name)
                    restore(root, name, record, bank)
                    loaded += 1
            dist.barrier()
    return loaded


def failing_save(folder: Path, rank: int) -> list[Any]:
    """A disk that is full for the third rank: what every rank is told, and what a run goes on with."""
    root = open_storage(folder / "failing", create=True)
    save(root, 1)
    original = Storage.write_pieces

    def write_pieces(self: Storage, name: str, pieces: Any, size: int) -> None:
        if rank == 2 and "/audio/c/" in name:
            raise StorageError(f"{self.url_of(name)}: cannot write: No space left on device")
        original(self, name, pieces, size)

    Storage.write_pieces = write_pieces  # type: ignore[method-assign]
    error = error_of(lambda: save(root, 2))
    Storage.write_pieces = original  # type: ignore[method-assign]
    return gather((error, resume(root)))


def damaged_on_one_rank(folder: Path, rank: int) -> list[Any]:
    """A flipped bit in the last rank's rows of the newest checkpoint."""
    root = open_storage(folder / "damaged", create=True)
    for step in (1, 2):
        save(root, step)
    chunk = folder / "damaged" / "checkpoints" / "step-00000002" / BANK_NAME / "video" / "c" / "3" / "0"
    if rank == 0:
        data = bytearray(chunk.read_bytes())
        data[7] ^= 16
        chunk.write_bytes(data)
    dist.barrier()
    first = resume(root)
    return gather((first, resume(root)))


def refused_on_one_rank(folder: Path, rank: int, error: Exception) -> list[Any]:
    """Whatever is no damage ends the attempt on every rank."""
    root = open_storage(folder / "refused", create=True)
    save(root, 1)

    def attempt(name: str, record: CheckpointRecord) -> None:
        if rank == 1:
            raise error

    return gather(error_of(lambda: resume_newest(root, RankGroup(), attempt, print)))


def main() -> None:
    rank, size, meeting_file, result_file, folder = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting_file}", rank=rank, world_size=size)
    groups = {world_size: dist.new_group(list(range(world_size))) for world_size in range(1, size + 1)}
    results: dict[str, Any] = {
        "loaded": gather(round_trips(Path(folder), rank, groups)),
        "failing": failing_save(Path(folder), rank),
        "damaged": damaged_on_one_rank(Path(folder), rank),
        "refused": refused_on_one_rank(Path(folder), rank, ConfigError("epochs was 1 and is now 2")),
        "bug": refused_on_one_rank(Path(folder), rank, ZeroDivisionError("division by zero")),
        "unequal": gather(error_of(lambda: save(open_storage(folder), 5 + rank // 3))),
        "other run": gather(error_of(lambda: save(open_storage(Path(folder) / "refused"), 1, seed=4))),
        "owned": [len(owned_rows(NUM_INSTANCES, size, each)) for each in range(size)],
        "empty": gather(resume(open_storage(folder))),
    }
    if rank == 0:
        torch.save(results, result_file)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
