"""Real processes as the ranks of a group: runs a worker script in each, and gives what the first one saved.

Run as a module it is the ranks' parent: it imports the worker, and PyTorch, once, and forks.
"""

import importlib
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

from tests.processes import run

REPOSITORY = Path(__file__).resolve().parents[1]


def run_ranks(
    worker: Path, world_size: int, folder: Path, *arguments: str, weights_only: bool = True
) -> dict[str, Any]:
    """Run ``worker RANK WORLD_SIZE MEETING_FILE RESULT_FILE [ARGUMENTS]`` once for every rank; all must succeed.

    Args:
        worker: the script, with a function ``main``; its rank 0 saves the results with ``torch.save``.
        world_size: number of processes.
        folder: for the two files.
        arguments: further ones, the same for all.
        weights_only: whether the results are tensors and plain Python only.
    """
    import torch

    launch_ranks(worker, world_size, folder / "meeting", folder / "results.pt", *arguments)
    results: dict[str, Any] = torch.load(folder / "results.pt", weights_only=weights_only)
    return results


def launch_ranks(
    worker: Path, world_size: int, *arguments: object, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run ``worker RANK WORLD_SIZE ARGUMENTS`` once for every rank; with ``check``, all must succeed."""
    return run(sys.executable, "-m", "tests.ranks", worker, world_size, *arguments, cwd=REPOSITORY, check=check)


def main() -> int:
    worker, world_size, *arguments = sys.argv[1:]
    sys.path.insert(0, str(Path(worker).parent))
    work = importlib.import_module(Path(worker).stem).main
    ranks = set()
    for rank in range(int(world_size)):
        pid = os.fork()
        if pid == 0:
            sys.argv = [worker, str(rank), world_size, *arguments]
            os._exit(_code_of(work))
        ranks.add(pid)
    # The others wait for one that has failed: whoever started this one ends them.
    while ranks:
        pid, status = os.wait()
        ranks.remove(pid)
        if status:
            print(f"a rank ended with {os.waitstatus_to_exitcode(status)}", file=sys.stderr)
            return 1
    return 0


def _code_of(work: Any) -> int:
    try:
        work()
    except BaseException:  # noqa: BLE001 - nobody is there to raise it to
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
