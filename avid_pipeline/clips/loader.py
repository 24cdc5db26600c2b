"""Batches of clips: threads read and decode ahead, DALI augments, torch tensors come out."""

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal, TypedDict

import numpy as np
import numpy.typing as npt
import torch
from nvidia.dali.plugin.pytorch import feed_ndarray

from avid_pipeline.clips.dali_graph import GraphSettings, build_graph, pack
from avid_pipeline.clips.reading import ClipChoice, HostClip, read_clip
from avid_pipeline.clips.settings import ClipSettings
from avid_pipeline.errors import ConfigError, ManifestError
from avid_pipeline.shards_spec.manifest import SpectrogramStatistics
from avid_pipeline.shards_spec.reader import ShardReader
from avid_pipeline.streams.batches import Batch

_BATCHES_AHEAD = 3


class ClipBatch(TypedDict):
    """A batch of clips.

    ``video`` float32 [B, 3, T, H, W], ``audio`` float32 [B, 1, frames, 257], ``index`` int64 [B] (instance
    indices), ``visit`` int64 [B], ``label`` int64 [B] (first label, -1 without one).
    """

    video: torch.Tensor
    audio: torch.Tensor
    index: torch.Tensor
    visit: torch.Tensor
    label: torch.Tensor


class ClipLoader:
    """Loads the clips of a list of batches, in order.

    Args:
        reader: the data set.
        batches: which visits each batch holds, for example ``plan(…).rank_batches(…)``; none is larger than the first.
        clip: length and size of clips.
        choice: how clips are chosen and augmented.
        statistics: of spectrograms, for normalisation; those of the data set's own manifest by default. Give the
            training set's when evaluating on another split.
        device: ``cpu`` decodes with PyAV and augments with DALI on the CPU; ``gpu`` decodes and augments with DALI
            on the current CUDA device.
        workers: threads that read and decode; by default one for each core this process may use.

    Raises:
        ConfigError: ``gpu`` without a CUDA device, or clip frame rates that the stored one is no multiple of.
        ManifestError: there are no spectrogram statistics.
    """

    def __init__(
        self,
        reader: ShardReader,
        batches: Sequence[Batch],
        clip: ClipSettings,
        choice: ClipChoice,
        *,
        statistics: SpectrogramStatistics | None = None,
        device: Literal["cpu", "gpu"] = "cpu",
        workers: int | None = None,
    ) -> None:
        statistics = statistics or reader.manifest.spectrogram_statistics
        if statistics is None:
            raise ManifestError(f"{reader.storage.url}: the manifest has no spectrogram_statistics (no sound)")
        self._reader = reader
        self._batches = batches
        self._clip = clip
        self._choice = choice
        self._decode: Literal["here", "later"] = "later" if device == "gpu" else "here"
        self._workers = workers or len(os.sched_getaffinity(0))
        mean, std = statistics.arrays()
        self._graph = GraphSettings(
            clip=clip,
            mean=mean,
            std=std,
            batch_size=len(batches[0]) if batches else 1,
            threads=self._workers,
            device_id=_cuda_device() if device == "gpu" else None,
            frame_stride=_frame_stride(reader, clip) if device == "gpu" else 1,
        )

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[ClipBatch]:
        """Yield the batches.

        Raises:
            ShardError: a shard is damaged.
            SampleError: a sample cannot be decoded.
        """
        delivered: deque[tuple[Batch, list[HostClip]]] = deque()
        with ThreadPoolExecutor(self._workers, thread_name_prefix="clip-loader") as pool:
            waiting: deque[tuple[Batch, list[Future[HostClip]]]] = deque()
            upcoming = iter(self._batches)

            def source() -> tuple[list[npt.NDArray[Any]], ...]:
                while len(waiting) <= _BATCHES_AHEAD and (batch := next(upcoming, None)) is not None:
                    waiting.append((batch, self._submit(pool, batch)))
                if not waiting:
                    raise StopIteration
                batch, futures = waiting.popleft()
                clips = [future.result() for future in futures]
                delivered.append((batch, clips))
                return pack(clips, self._graph)

            pipeline = build_graph(source, self._graph)
            try:
                for _ in range(len(self._batches)):
                    video, audio = pipeline.run()
                    yield self._collate(video, audio, *delivered.popleft())
            finally:
                for _, futures in waiting:
                    for future in futures:
                        future.cancel()

    def _submit(self, pool: ThreadPoolExecutor, batch: Batch) -> list[Future[HostClip]]:
        return [
            pool.submit(self._read, int(instance), int(visit))
            for instance, visit in zip(batch.instances, batch.visits, strict=True)
        ]

    def _read(self, instance: int, visit: int) -> HostClip:
        sample = self._reader.read(instance)
        return read_clip(sample, instance, visit, self._clip, self._choice, self._decode)

    def _collate(self, video: Any, audio: Any, batch: Batch, clips: list[HostClip]) -> ClipBatch:
        return ClipBatch(
            video=_to_torch(video, self._graph.device_id),
            audio=_to_torch(audio, self._graph.device_id),
            index=torch.from_numpy(np.asarray(batch.instances, dtype=np.int64)),
            visit=torch.from_numpy(np.asarray(batch.visits, dtype=np.int64)),
            label=torch.tensor([clip.label for clip in clips], dtype=torch.int64),
        )


def evaluation_batches(
    count: int, clips_per_instance: int, batch_size: int, rank: int = 0, world_size: int = 1
) -> list[Batch]:
    """Every clip of every instance once, in order; the last batch may be smaller.

    Ranks get neighbouring runs of instances whose lengths differ by at most one, so that nothing is seen twice.
    """
    first, stop = rank * count // world_size, (rank + 1) * count // world_size
    instances = np.repeat(np.arange(first, stop, dtype=np.int64), clips_per_instance)
    visits = np.tile(np.arange(clips_per_instance, dtype=np.int64), stop - first)
    return [
        Batch(instances[start : start + batch_size], visits[start : start + batch_size])
        for start in range(0, len(instances), batch_size)
    ]


def _to_torch(tensors: Any, device_id: int | None) -> torch.Tensor:
    """Copy a DALI batch, whose memory DALI uses again, to a float32 tensor."""
    dense = tensors.as_tensor()
    device = torch.device("cpu") if device_id is None else torch.device("cuda", device_id)
    copy = torch.empty(dense.shape(), dtype=torch.float32, device=device)
    stream = None if device_id is None else torch.cuda.current_stream(device)
    feed_ndarray(dense, copy, cuda_stream=stream)
    return copy


def _cuda_device() -> int:
    if not torch.cuda.is_available():
        raise ConfigError("device: gpu: torch finds no CUDA device; use device cpu")
    return torch.cuda.current_device()


def _frame_stride(reader: ShardReader, clip: ClipSettings) -> int:
    """Stored frames from one clip frame to the next; GPU decoding selects frames by number."""
    video = reader.manifest.parameters.video
    stride = video.fps / clip.fps
    if video.codec == "copy" or stride != int(stride):
        raise ConfigError(
            f"clip.fps: GPU decoding takes every n-th stored frame, but {video.fps} stored frames a second "
            f"(codec {video.codec}) are no multiple of {clip.fps}; convert the data set at that rate or use device cpu"
        )
    return int(stride)
