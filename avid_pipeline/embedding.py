"""Embedding a data set: one video and one audio vector per instance."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (the name everyone knows)
from torch import Tensor, nn
from tqdm import tqdm

from avid_pipeline.clips.failures import Failure, FailurePolicy
from avid_pipeline.clips.loader import ClipLoader, evaluation_batches
from avid_pipeline.clips.reading import EvaluationChoice
from avid_pipeline.clips.settings import ClipSettings, resolve_modalities
from avid_pipeline.collectives import RankGroup
from avid_pipeline.errors import ConfigError
from avid_pipeline.models import AVModel
from avid_pipeline.row_ranges import owned_rows
from avid_pipeline.shards_spec.manifest import SpectrogramStatistics
from avid_pipeline.shards_spec.reader import ShardReader
from avid_pipeline.streams.batches import Batch, IntArray

__all__ = ["Embeddings", "MeanDirections", "embed_dataset", "evaluation_mode"]


@dataclass(frozen=True)
class Embeddings:
    """Vectors of instances, row ``i`` for the ``i``-th of them.

    Attributes:
        video: float32 unit vectors [N, D]; zeros for an instance that is not ``found``.
        audio: float32 unit vectors [N, D]; likewise.
        labels: int64 [N], first label of each instance, -1 without one.
        found: bool [N], False for an instance none of whose clips could be decoded.
    """

    video: Tensor
    audio: Tensor
    labels: Tensor
    found: Tensor


def embed_dataset(
    model: AVModel,
    reader: ShardReader,
    clip: ClipSettings,
    *,
    clips_per_instance: int = 10,
    batch_size: int = 32,
    statistics: SpectrogramStatistics | None = None,
    workers: int | None = None,
    device: Literal["cpu", "gpu"] = "cpu",
    instances: Sequence[int] | IntArray | None = None,
    group: RankGroup | None = None,
    gather: bool = True,
    precision: torch.dtype | None = None,
    max_failure_rate: float = 0.01,
    on_failure: Callable[[Failure], object] | None = None,
) -> Embeddings:
    """Embed evaluation clips spread evenly over every instance; an instance's vector is their mean direction.

    The model is in evaluation mode meanwhile, and then in the mode that it was in; no random generator moves. In
    evaluation mode clips do not see each other, so an instance's vector depends neither on the batches that its clips
    are in nor on the number of ranks, but for the last digits: kernels may round differently in batches of other sizes.

    Args:
        model: the same weights and batch norm statistics on all ranks.
        reader: the data set.
        clip: length and size of clips; both modalities are read.
        clips_per_instance: how many clips of each instance.
        batch_size: clips in a forward pass, on each rank.
        statistics: what the model was trained to see sound normalised with; by default the data set's own.
        workers: threads that read and decode.
        device: where clips are decoded.
        instances: indices of those to embed, [N], in the order of the rows that come out; None for all.
        group: ranks that divide the instances; all call this with the same arguments. Each embeds the contiguous range
            ``owned_rows(N, group.size, group.rank)``, which may be empty. None for this process alone.
        gather: all ranks get all rows; otherwise each gets its own range only, and ranks do not talk to each other.
        precision: of convolutions and matrix products (autocast); None for that of the weights.
        max_failure_rate: share of a rank's clips that may fail to decode, where ``on_failure`` is given.
        on_failure: called for every instance that cannot be decoded, which is left out (see ``Embeddings.found``);
            None makes it an error.

    Raises:
        ConfigError: there is nothing to embed, or not every instance has picture and sound.
        ShardError: a shard is damaged; this and what follows on the rank that reads it.
        SampleError: a sample cannot be decoded, or too many cannot.
    """
    both = clip.model_copy(update={"modalities": ("video", "audio")})
    if instances is None:
        both = resolve_modalities(both, reader.manifest)
        instances = np.arange(len(reader), dtype=np.int64)
    indices = np.asarray(instances, dtype=np.int64)
    if len(indices) == 0:
        raise ConfigError(f"{reader.storage.url}: there is no instance to embed")
    rank, world_size = (0, 1) if group is None else (group.rank, group.size)
    own = owned_rows(len(indices), world_size, rank)
    batches = evaluation_batches(indices[own.start : own.stop], clips_per_instance, batch_size)
    sums = _Sums(len(own), clips_per_instance, model.projection[-1])
    if batches:
        loader = ClipLoader(
            reader,
            batches,
            both,
            EvaluationChoice(clips_per_instance),
            statistics=statistics,
            device=device,
            workers=workers,
            failures=None if on_failure is None else _leave_out(indices, max_failure_rate, on_failure),
        )
        _embed(model, loader, batches, sums, precision, show_progress=rank == 0)
    embeddings = sums.embeddings()
    return embeddings if group is None or not gather else _gathered(embeddings, len(indices), group)


class MeanDirections:
    """Mean directions of instances' clips, an instance a row: added up here, whatever the clips' order and batches.

    Args:
        num_rows: N, the number of instances.
        dim: D, the size of embeddings.
    """

    def __init__(self, num_rows: int, dim: int) -> None:
        self._sums = torch.zeros(num_rows, dim)

    def add(self, rows: Tensor, embeddings: Tensor) -> None:
        """Add the directions of clips.

        Args:
            rows: int64 [B], of their instances.
            embeddings: [B, D], of any length, on any device.
        """
        self._sums.index_add_(0, rows, F.normalize(embeddings.float(), dim=1).cpu())

    def vectors(self) -> Tensor:
        """Float32 unit vectors [N, D], on the CPU; zeros for an instance without clips."""
        return F.normalize(self._sums, dim=1)


class _Sums:
    """What is known of the instances, from the clips so far."""

    def __init__(self, num_rows: int, clips_per_instance: int, dim: int) -> None:
        self._clips_per_instance = clips_per_instance
        self._clips_done = 0
        self._video, self._audio = MeanDirections(num_rows, dim), MeanDirections(num_rows, dim)
        self._labels = torch.full((num_rows,), -1, dtype=torch.int64)
        self._found = torch.zeros(num_rows, dtype=torch.bool)

    def add(self, wanted: Batch, index: Tensor, label: Tensor, video_emb: Tensor, audio_emb: Tensor) -> None:
        """The next clips of the order; those of another instance than the wanted one do not count."""
        places = torch.arange(self._clips_done, self._clips_done + len(wanted))
        self._clips_done += len(wanted)
        kept = index == torch.from_numpy(wanted.instances)
        rows = (places // self._clips_per_instance)[kept]
        self._video.add(rows, video_emb[kept])
        self._audio.add(rows, audio_emb[kept])
        self._labels[rows] = label[kept]
        self._found[rows] = True

    def embeddings(self) -> Embeddings:
        return Embeddings(self._video.vectors(), self._audio.vectors(), self._labels, self._found)


def _embed(
    model: AVModel,
    loader: ClipLoader,
    batches: list[Batch],
    sums: _Sums,
    precision: torch.dtype | None,
    *,
    show_progress: bool,
) -> None:
    weight = next(model.parameters())
    device, dtype = weight.device, weight.dtype
    autocast = torch.autocast(device.type, dtype=precision, enabled=precision not in (None, torch.float32))
    hidden = not (show_progress and sys.stderr.isatty())
    with evaluation_mode(model), torch.inference_mode(), autocast:
        for wanted, batch in zip(batches, tqdm(loader, unit="batch", disable=hidden, desc="embed"), strict=True):
            embedded = model(batch["video"].to(device, dtype), batch["audio"].to(device, dtype))
            sums.add(wanted, batch["index"], batch["label"], *embedded)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Puts a model in evaluation mode, and all its parts back in the modes that they were in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _leave_out(indices: IntArray, max_rate: float, on_failure: Callable[[Failure], object]) -> FailurePolicy:
    """Another instance fills the place of one that cannot be decoded; its clip does not count there."""

    def neighbour(number: int, instance: int, visit: int, attempt: int) -> int:
        return int(indices[(instance + 1 + attempt) % len(indices)])

    return FailurePolicy(neighbour, max_rate, on_failure)


def _gathered(own: Embeddings, num_rows: int, group: RankGroup) -> Embeddings:
    lengths = [len(owned_rows(num_rows, group.size, rank)) for rank in range(group.size)]
    return Embeddings(
        video=group.all_gather_ranges(own.video, lengths),
        audio=group.all_gather_ranges(own.audio, lengths),
        labels=group.all_gather_ranges(own.labels, lengths),
        found=group.all_gather_ranges(own.found.to(torch.uint8), lengths).bool(),
    )
