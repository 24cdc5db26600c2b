"""Real processes as the ranks of a group: runs a worker script in each, and gives what the first one saved."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch


def run_ranks(worker: Path, world_size: int, folder: Path, *arguments: str) -> dict[str, Any]:
    """Run ``worker RANK WORLD_SIZE MEETING_FILE RESULT_FILE [ARGUMENTS]`` once for every rank; all must succeed.

    Args:
        worker: the script; its rank 0 saves the results with ``torch.save``.
        world_size: number of processes.
        folder: for the two files.
        arguments: further ones, the same for all.
    """
    files = [str(folder / "meeting"), str(folder / "results.pt"), *arguments]
    processes = [
        subprocess.Popen(
            [sys.executable, str(worker), str(rank), str(world_size), *files],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        outputs = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
    results: dict[str, Any] = torch.load(folder / "results.pt", weights_only=True)
    return results
