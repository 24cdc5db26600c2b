"""A rank of a training run that writes down what each of its steps saw.

Arguments: rank, number of ranks, file to meet at, data root, run folder, record folder, loader threads, and the step
before which to be killed (0: never).
"""

import hashlib
import json
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from avid_pipeline.clips.loader import ClipLoader
from avid_pipeline.train import data as training_data
from avid_pipeline.train.config import TrainConfig
from avid_pipeline.train.trainer import train

CONFIG = {
    "epochs": 1,
    "model": {"video_depth": 10, "projection": (16, 8)},
    "clip": {"crop_size": 16, "video_seconds": 0.25, "audio_seconds": 0.3},
    "data": {"batch_size": 4, "clips_per_instance": 5},
    "loss": {"num_negatives": 8},
    "optimizer": {"learning_rate": 1e-3},
    "log_every": 1,
    "checkpoint": {"every_steps": 5},
}


def main() -> None:
    rank, size = int(sys.argv[1]), int(sys.argv[2])
    meeting_file, root, output, records, workers, killed_before = sys.argv[3:]
    torch.set_num_threads(1)
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting_file}", rank=rank, world_size=size)

    class RecordingLoader(ClipLoader):
        def __iter__(self):
            # The trainer gives the batches from the step that it goes on at.
            first = 12 - len(self)
            for step, batch in enumerate(super().__iter__(), first + 1):
                if step == int(killed_before):
                    os.kill(os.getpid(), signal.SIGKILL)
                with Path(records, f"rank-{rank}.jsonl").open("a") as file:
                    for place in range(len(batch["index"])):
                        pixels = hashlib.sha256(batch["video"][place].numpy().tobytes())
                        pixels.update(batch["audio"][place].numpy().tobytes())
                        clip = [int(batch["index"][place]), int(batch["visit"][place]), pixels.hexdigest()]
                        file.write(json.dumps([step, clip]) + "\n")
                yield batch

    training_data.ClipLoader = RecordingLoader
    config = TrainConfig.model_validate({**CONFIG, "data": {**CONFIG["data"], "workers": int(workers)}})
    train(config, root, output, resume=True)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
