"""The first memories of a run as one pass of the network over its data (``memory.init: forward``)."""

from collections.abc import Callable

import torch

from avid_pipeline.clips.failures import Failure
from avid_pipeline.embedding import embed_dataset
from avid_pipeline.errors import ConfigError
from avid_pipeline.models import AVModel
from avid_pipeline.train.config import TrainConfig
from avid_pipeline.train.data import TrainingData
from avid_pipeline.train.memory_bank import MemoryBank

__all__ = ["fill_memory"]


def fill_memory(
    model: AVModel,
    bank: MemoryBank,
    data: TrainingData,
    config: TrainConfig,
    on_failure: Callable[[Failure], object] | None = None,
) -> None:
    """Fill the bank with the embeddings of one centred clip of every instance; all ranks of its group call this.

    Every rank embeds the instances whose rows it owns, in evaluation mode, and nothing but its rows. They depend on the
    number of ranks only in the last digits (see :func:`~avid_pipeline.embedding.embed_dataset`).

    Args:
        model: the same on all ranks.
        bank: row ``r`` belongs to ``data.instances[r]``.
        data: of the run.
        config: of the run; a pass has as many clips as a forward pass of training.
        on_failure: called for every instance that cannot be decoded, whose row stays as it is: its random vector;
            ``data.max_failure_rate`` of them may fail. None makes it an error.

    Raises:
        ConfigError: the bank is not of these data, or an embedding is not finite, on all ranks alike.
        ShardError: a shard is damaged; this and what follows on the rank that reads it.
        SampleError: a sample cannot be decoded, or too many cannot.
    """
    group = bank.group
    if bank.num_instances != data.num_instances:
        raise ConfigError(
            f"memory bank: expected one row for each of the {data.num_instances:,} instances trained on, found "
            f"{bank.num_instances:,}; make the bank for these data"
        )
    embeddings = embed_dataset(
        model,
        data.reader,
        config.clip,
        clips_per_instance=1,
        batch_size=max(1, config.data.batch_size // (group.size * config.compute.accumulate)),
        statistics=data.statistics,
        workers=config.data.workers,
        device=config.data.device,
        instances=data.instances,
        group=group,
        gather=False,
        precision=torch.bfloat16 if config.compute.precision == "bfloat16" else None,
        max_failure_rate=config.data.max_failure_rate,
        on_failure=on_failure,
    )
    video, audio = embeddings.video, embeddings.audio
    if group.any(not bool(video.isfinite().all() and audio.isfinite().all())):
        raise ConfigError(
            "memory.init: forward: the network's embeddings hold NaN or infinite numbers; start from another "
            "checkpoint, or take --set memory.init=random"
        )
    missing = ~embeddings.found
    for memory, before in zip((video, audio), bank.local(), strict=True):
        memory[missing] = before[missing.to(before.device)].to("cpu", torch.float32)
    bank.load_local(video, audio)
