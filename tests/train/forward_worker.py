"""One of several processes of test_initial_memory.py and test_retrieval_hook.py.

Arguments: rank, number of processes, file to meet at, file for rank 0's results, root of the data.
"""

import sys
from typing import Any

import torch
import torch.distributed as dist

from avid_pipeline.collectives import RankGroup
from avid_pipeline.errors import ConfigError
from avid_pipeline.models import AVModel
from avid_pipeline.train.config import TrainConfig
from avid_pipeline.train.data import TrainingData
from avid_pipeline.train.initial_memory import fill_memory
from avid_pipeline.train.memory_bank import MemoryBank
from avid_pipeline.train.retrieval_hook import RetrievalHook


def settings(root: str) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "epochs": 1,
            "model": {"video_depth": 10, "projection": (16, 8)},
            "clip": {"crop_size": 16, "audio_seconds": 0.3},
            "data": {"batch_size": 6, "workers": 1},
            "evaluation": {"data": root, "clips_per_instance": 2, "batch_size": 3},
            "optimizer": {"learning_rate": 1e-3},
        }
    )


def make_model() -> AVModel:
    return AVModel(10, (16, 8), torch.Generator().manual_seed(0))


def main() -> None:
    rank, size, meeting_file, result_file, root = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting_file}", rank=rank, world_size=size)
    config = settings(root)
    data, model = TrainingData(config, root), make_model()
    hook = RetrievalHook(config, data.statistics)
    results: dict[str, Any] = {}
    for world_size in range(1, size + 1):
        process_group = dist.new_group(list(range(world_size)))
        if rank >= world_size:
            continue
        assert isinstance(process_group, dist.ProcessGroup)
        bank = MemoryBank(data.num_instances, 8, process_group=process_group)
        fill_memory(model, bank, data, config)
        metrics: list[Any] = [None] * world_size
        dist.all_gather_object(metrics, hook.run(model, RankGroup(process_group)), group=process_group)
        results[f"{world_size}"] = {"memories": torch.stack(bank.full()), "metrics": metrics}
    # A model that gives no numbers on one rank only.
    if rank == size - 1:
        model.video_proj.projection[-1].bias.data.fill_(torch.nan)
    bank, error = MemoryBank(data.num_instances, 8), "none"
    try:
        fill_memory(model, bank, data, config)
    except ConfigError as caught:
        error = str(caught)
    errors: list[Any] = [None] * size
    dist.all_gather_object(errors, error)
    results["errors"] = errors
    if rank == 0:
        torch.save(results, result_file)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
