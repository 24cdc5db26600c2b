"""One of several ranks that train several runs, one after the other.

Arguments: rank, number of processes, file to meet at, file for rank 0's results, file that lists the runs.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from avid_pipeline.train.config import TrainConfig
from avid_pipeline.train.trainer import train


def main() -> None:
    rank, size, meeting_file, result_file, runs = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting_file}", rank=rank, world_size=size)
    steps = {}
    for run in json.loads(Path(runs).read_text()):
        config = TrainConfig.model_validate_json(run["config"])
        steps[run["output"]] = train(config, run["data"], run["output"], from_scratch=True).step
    if rank == 0:
        torch.save(steps, result_file)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
