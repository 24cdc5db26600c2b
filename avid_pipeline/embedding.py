"""Embedding a data set: one video and one audio vector per instance."""

import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 (the name everyone knows)
from torch import Tensor
from tqdm import tqdm

from avid_pipeline.clips.loader import ClipLoader, evaluation_batches
from avid_pipeline.clips.reading import EvaluationChoice
from avid_pipeline.clips.settings import ClipSettings
from avid_pipeline.models import AVModel
from avid_pipeline.shards_spec.manifest import SpectrogramStatistics
from avid_pipeline.shards_spec.reader import ShardReader


@dataclass(frozen=True)
class Embeddings:
    """Vectors of all instances of a data set, row ``i`` for instance ``i``.

    Attributes:
        video: float32 unit vectors [N, D].
        audio: float32 unit vectors [N, D].
        labels: int64 [N], first label of each instance, -1 without one.
    """

    video: Tensor
    audio: Tensor
    labels: Tensor


@torch.inference_mode()
def embed_dataset(
    model: AVModel,
    reader: ShardReader,
    clip: ClipSettings,
    *,
    clips_per_instance: int = 10,
    batch_size: int = 32,
    statistics: SpectrogramStatistics | None = None,
    workers: int | None = None,
) -> Embeddings:
    """Embed evaluation clips spread evenly over every instance; an instance's vector is their mean direction.

    Args:
        model: in evaluation mode.
        reader: the data set.
        clip: length and size of clips.
        clips_per_instance: how many clips of each instance.
        batch_size: clips in a forward pass.
        statistics: what the model was trained to see sound normalised with; by default the data set's own.
        workers: threads that read and decode.

    Raises:
        ShardError: a shard is damaged.
        SampleError: a sample cannot be decoded.
    """
    device = next(model.parameters()).device
    batches = evaluation_batches(len(reader), clips_per_instance, batch_size)
    loader = ClipLoader(
        reader, batches, clip, EvaluationChoice(clips_per_instance), statistics=statistics, workers=workers
    )
    dim = model.projection[-1]
    video, audio = torch.zeros(len(reader), dim), torch.zeros(len(reader), dim)
    labels = torch.full((len(reader),), -1, dtype=torch.int64)
    for batch in tqdm(loader, unit="batch", disable=not sys.stderr.isatty(), desc="embed"):
        video_emb, audio_emb = model(batch["video"].to(device), batch["audio"].to(device))
        video.index_add_(0, batch["index"], F.normalize(video_emb.float(), dim=1).cpu())
        audio.index_add_(0, batch["index"], F.normalize(audio_emb.float(), dim=1).cpu())
        labels[batch["index"]] = batch["label"]
    return Embeddings(F.normalize(video, dim=1), F.normalize(audio, dim=1), labels)
