"""Small models on disk as users have them: a run folder, weights alone, and a published file."""

from pathlib import Path

import safetensors.torch
import torch

from avid_pipeline.models import AVModel
from avid_pipeline.shards_spec.manifest import SpectrogramStatistics
from avid_pipeline.shards_spec.storage import open_storage
from avid_pipeline.streams.state import StreamState
from avid_pipeline.train.checkpoint import save_checkpoint
from avid_pipeline.train.config import TrainConfig
from avid_pipeline.train.memory_bank import MemoryBank

CLIP = {"crop_size": 16, "video_seconds": 0.25, "audio_seconds": 0.3}


def small_model(dim: int = 8, seed: int = 0) -> AVModel:
    """The smallest model, with weights of its own for each seed, in evaluation mode."""
    return AVModel(10, (16, dim), torch.Generator().manual_seed(seed)).eval()


def save_run(folder: Path, model: AVModel, statistics: SpectrogramStatistics) -> str:
    """A run folder whose only checkpoint holds a model; returns the checkpoint's name."""
    folder.mkdir(parents=True)
    optimizer = {"learning_rate": 1e-3}
    config = TrainConfig.model_validate({"epochs": 1, "clip": CLIP, "data": {"batch_size": 2}, "optimizer": optimizer})
    return save_checkpoint(
        open_storage(folder),
        stream=StreamState("sha256:of the data", seed=0, epoch=1, step=7),
        config=config,
        statistics=statistics,
        model=model,
        trainer_state={},
        bank=MemoryBank(10, model.projection[-1]),
    )


def save_weights(path: Path, model: AVModel) -> Path:
    """Weights alone."""
    safetensors.torch.save_file(model.state_dict(), path)
    return path


def save_published(path: Path, model: AVModel, num_instances: int = 10) -> Path:
    """A file as the authors of AVID-CMA publish them."""
    random = torch.Generator().manual_seed(1)
    memories = [torch.randn(num_instances, model.projection[-1], generator=random) for _ in range(2)]
    content = {
        "epoch": 200,
        "model": {f"module.{name}": tensor for name, tensor in model.state_dict().items()},
        "optimizer": {"state": {}, "param_groups": []},
        "train_criterion": {
            "nce_average.view1_mem": memories[0],
            "nce_average.view2_mem": memories[1],
            "criterion.avg_exp_score": torch.tensor(3.25),
        },
    }
    torch.save(content, path)
    return path
