"""How the memories of a run lie: cosines within and between modalities, and what they cost AVID+CMA's loss.

python benchmarks/memory_geometry.py demo/avid demo/cma
"""

import argparse

import torch

from avid_pipeline.shards_spec.storage import open_storage
from avid_pipeline.train.bank_snapshot import snapshot_shape
from avid_pipeline.train.checkpoint import (
    BANK_NAME,
    latest_checkpoint,
    read_record,
    restore_bank,
    restore_trainer_state,
)
from avid_pipeline.train.memory_bank import MemoryBank

TEMPERATURE, WITHIN_NEGATIVES = 0.07, 64


def main() -> None:
    """Print a table for every run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="Run folders; the newest checkpoint of each.")
    for run in parser.parse_args().runs:
        root = open_storage(run)
        name = latest_checkpoint(root)
        assert name is not None, f"{run}: has no checkpoint"
        bank = MemoryBank(*snapshot_shape(root, f"{name}/{BANK_NAME}"))
        restore_bank(root, name, bank)
        partition = restore_trainer_state(root, name, read_record(root, name))["criterion"]["partition_function"]
        video, audio = bank.full()
        others = ~torch.eye(len(video), dtype=torch.bool)
        print(f"{run}: partition function {partition:.2f}")
        for pair, cosines in (("video-video", video @ video.T), ("audio-audio", audio @ audio.T),
                              ("video-audio", video @ audio.T)):  # fmt: skip
            off, scores = cosines[others], torch.exp(cosines[others] / TEMPERATURE)
            cost = (WITHIN_NEGATIVES * torch.log1p(scores / (WITHIN_NEGATIVES * partition))).mean()
            print(
                f"  {pair}: mean cosine of two instances {off.mean():.2f} ± {off.std():.2f}, of an instance with "
                f"itself {cosines.diag().mean():.2f}; {WITHIN_NEGATIVES} negatives add {cost:.1f} to a clip's loss"
            )


if __name__ == "__main__":
    main()
