"""Saves checkpoints without pause in a process that is killed, again and again; see test_resume_newest.py.

Arguments: folder of the run, seed of the moments of killing. Prints one line of JSON. A process is forked for every
life of the run, so that a life begins at once.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from checkpoint_worker import resume, save  # beside this script

from avid_pipeline.shards_spec.storage import open_storage
from avid_pipeline.train.checkpoint_record import list_folders

KEEP = 2


def live(folder: Path, saved: int) -> None:
    """Go on from the newest checkpoint, then save one after the other, naming each once it is saved."""
    root = open_storage(folder, create=True)
    name, warnings = resume(root)
    step = 0 if name is None else int(name[-8:])
    incomplete = sum(not complete for complete in list_folders(root).values())
    report = json.dumps({"resumed": step, "warnings": warnings, "incomplete": incomplete})
    os.write(saved, f"{report}\n".encode())
    while True:
        step += 1
        save(root, step, keep=KEEP)
        os.write(saved, f"{step}\n".encode())


def main() -> None:
    folder, chance = Path(sys.argv[1]), random.Random(int(sys.argv[2]))
    torch.set_num_threads(1)
    lives: list[dict[str, object]] = []
    while len(lives) < 12 or (sum(bool(each["incomplete"]) for each in lives) < 3 and len(lives) < 60):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            live(folder, writing)
        os.close(writing)
        with os.fdopen(reading) as reports:
            first = reports.readline()
            if not first:
                raise SystemExit(f"life {len(lives)} could not go on")
            reports.readline()
            time.sleep(chance.uniform(0, 0.3))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            rest = reports.read().splitlines()
        lives.append(json.loads(first) | {"saved": max((int(line) for line in rest), default=0)})
    print(json.dumps(lives))


if __name__ == "__main__":
    main()
