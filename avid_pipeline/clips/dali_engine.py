"""Clips through DALI: the reference on the CPU, and all of the work on a GPU."""

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import av
import numpy as np
import torch
from nvidia.dali.plugin.pytorch import feed_ndarray

from avid_pipeline.clips.augmentation import FloatArray
from avid_pipeline.clips.batch import ClipBatch, Recipe, describe
from avid_pipeline.clips.colour_space import BT601, OTHER_WEIGHTS, yuv_to_rgb
from avid_pipeline.clips.dali_graph import (
    GraphSettings,
    Inputs,
    IntArray,
    build_graph,
    choose_decoder,
    frame_numbers,
    pack,
)
from avid_pipeline.clips.engines import Work
from avid_pipeline.clips.failures import FailurePolicy
from avid_pipeline.clips.reading import HostClip, check_size
from avid_pipeline.clips.settings import ClipSettings
from avid_pipeline.errors import ConfigError, DecodeError
from avid_pipeline.shards_spec.manifest import Manifest
from avid_pipeline.shards_spec.reader import ShardReader
from avid_pipeline.shards_spec.video import open_video

# Of crops that are no whole pixels, in pixels.


@dataclass(frozen=True)
class _Prepared:
    """A clip, and the numbers of its stored frames where it is decoded later."""

    clip: HostClip
    frames: IntArray | None = None


@dataclass(frozen=True)
class _Started:
    clips: list[Future[_Prepared]]
    visits: torch.Tensor


class DaliEngine:
    """Augments with DALI; decodes with PyAV before it, or with NVDEC inside of it.

    Args:
        recipe: what clips are made of.
        manifest: of the data set.
        batch_size: the largest batch.
        threads: DALI's own CPU threads; with NVDEC, as many videos are decoded at a time.
        device_id: the GPU, or None for the CPU.
        prefetch: batches that are under way in DALI.

    Raises:
        ConfigError: the graph decodes, and the clip's frame rate is not one that the stored one is a multiple of.
    """

    def __init__(
        self,
        recipe: Recipe,
        manifest: Manifest,
        batch_size: int,
        threads: int,
        device_id: int | None,
        *,
        prefetch: int = 2,
    ) -> None:
        self._recipe = recipe
        self._graph = GraphSettings(
            clip=recipe.clip.model_copy(update={"modalities": recipe.modalities or None}),
            mean=recipe.mean,
            std=recipe.std,
            batch_size=batch_size,
            threads=threads,
            device_id=device_id,
            decoder=choose_decoder(device_id),
            prefetch=prefetch,
        )
        decodes = self._graph.decoder is not None and self._graph.video
        self._stride = frame_stride(manifest, recipe.clip) if decodes else 1

    def start(self, work: Work, pool: ThreadPoolExecutor, reader: ShardReader, failures: FailurePolicy) -> _Started:
        """Have the threads begin with a batch."""

        def make(place: int) -> _Prepared:
            instance, visit = int(work.batch.instances[place]), int(work.batch.visits[place])

            def read(chosen: int) -> _Prepared:
                sample = work.sample(place, chosen, reader)
                where = sample.record.key
                if self._graph.decoder is not None:
                    clip = self._recipe.read(sample, chosen, visit, "later")
                    return prepare_encoded(clip, self._recipe.clip.num_frames, self._stride, where)
                clip = self._recipe.read(sample, chosen, visit, "rgb")
                if clip.picture is not None:
                    check_size(clip, clip.picture.shape[1], clip.picture.shape[2], where)
                return _Prepared(clip)

            return failures.make(work.number, instance, visit, read)

        clips = [pool.submit(make, place) for place in range(len(work.batch))]
        return _Started(clips, torch.from_numpy(np.array(work.batch.visits, dtype=np.int64)))

    def finish(self, started: Iterator[_Started], count: int) -> Generator[ClipBatch, None, None]:
        """The batches that were started, in order; DALI works on the next ones meanwhile.

        Raises:
            DecodeError: DALI cannot make a batch.
        """
        feed = _Feed(started, self._graph)
        pipeline = build_graph(feed.take, self._graph)
        names = [name for name, wanted in (("video", self._graph.video), ("audio", self._graph.audio)) if wanted]
        for number in range(count):
            if not feed.under_way:
                # Fills DALI's queue the first time.
                pipeline.schedule_run()
            # A batch that is not read yet must not hold up one that is made.
            while len(feed.under_way) < self._graph.prefetch and feed.is_ready():
                pipeline.schedule_run()
            stream = _current_stream(self._graph.device_id)
            try:
                outputs = pipeline.share_outputs(stream)
            except RuntimeError as error:
                raise _dali_error(error, number, feed.under_way[0]) from error
            batch = feed.under_way.popleft()
            for name, output in zip(names, outputs, strict=True):
                batch[name] = _to_torch(output, stream, self._graph.device_id)  # type: ignore[literal-required]
            del outputs
            pipeline.release_outputs()
            yield batch


class _Feed:
    """What goes into DALI's graph, in order.

    Attributes:
        under_way: what describes the batches that DALI has and nobody got.
    """

    def __init__(self, started: Iterator[_Started], graph: GraphSettings) -> None:
        self._started = started
        self._graph = graph
        self._next: _Started | None = None
        self.under_way: deque[ClipBatch] = deque()

    def is_ready(self) -> bool:
        """Whether there is another batch and :meth:`take` would not wait for it."""
        self._next = self._next or next(self._started, None)
        return self._next is not None and all(future.done() for future in self._next.clips)

    def take(self) -> Inputs:
        """The next batch; StopIteration, which ends DALI's epoch, where there is none."""
        pending, self._next = self._next or next(self._started), None
        prepared = [future.result() for future in pending.clips]
        clips = [one.clip for one in prepared]
        self.under_way.append(describe(clips, pending.visits))
        return pack(clips, self._graph, [one.frames for one in prepared if one.frames is not None])


def prepare_encoded(clip: HostClip, num_frames: int, stride: int, where: str) -> _Prepared:
    """What decoding inside of DALI needs to know of a clip whose picture is encoded.

    Opens the file without decoding it, so that one that is no video is found here, by its name, and not in DALI,
    where it would end the whole batch.

    Args:
        clip: as read.
        num_frames: of the clip.
        stride: stored frames from one clip frame to the next.
        where: shard and key, for messages.

    Raises:
        DecodeError: the file is no video, is smaller than its record says, or ends before the clip begins.
    """
    if clip.picture is None:
        return _Prepared(clip)
    try:
        with open_video(clip.picture.tobytes(), where) as (_, stream):
            stored, colourspace = stream.frames, int(stream.codec_context.colorspace)
            height, width = stream.codec_context.height, stream.codec_context.width
    except av.FFmpegError as error:
        raise DecodeError(f"{where}: video cannot be opened: {error}") from error
    check_size(clip, height, width, where)
    if clip.first_frame * stride >= stored:
        raise DecodeError(f"{where}: expected frames from number {clip.first_frame * stride} on, found {stored} frames")
    colour = _for_colourspace(clip.augmentation.colour, colourspace)
    augmentation = replace(clip.augmentation, colour=colour)
    frames = frame_numbers(clip.first_frame, num_frames, stride, stored)
    return _Prepared(replace(clip, augmentation=augmentation), frames)


def _for_colourspace(colour: FloatArray, colourspace: int) -> FloatArray:
    """The colour matrix [3, 4] for RGB that was made from YUV of another colour space as if it were BT.601."""
    weights = OTHER_WEIGHTS.get(colourspace)
    if weights is None:
        return colour
    correction = yuv_to_rgb(*weights) @ np.linalg.inv(yuv_to_rgb(*BT601))
    return np.hstack([colour[:, :3] @ correction, colour[:, 3:]]).astype(np.float32)


def _dali_error(error: RuntimeError, number: int, batch: ClipBatch) -> DecodeError:
    """DALI's error, which ends its pipeline, as ours: it names the batch, for DALI does not name the clip."""
    reason = str(error).partition("encountered:")[2] or str(error)
    first = next((line.strip() for line in reason.splitlines() if line.strip()), "no reason given")
    instances = ", ".join(str(int(index)) for index in batch["index"])
    return DecodeError(
        f"batch {number}: DALI cannot make it: {first}; one of the instances {instances} is damaged or not of a size "
        f"or codec that the device decodes; device cpu names it, and avid-shards validate --deep looks at all"
    )


def _current_stream(device_id: int | None) -> Any:
    return None if device_id is None else torch.cuda.current_stream(device_id)


def _to_torch(tensors: Any, stream: Any, device_id: int | None) -> torch.Tensor:
    """A DALI batch as a tensor of torch's own memory.

    DALI could hand over its memory without a copy, but would take it back when the tensor is deleted, knowing only
    the stream that it was handed over on; torch's allocator knows of ``record_stream``, CUDA graphs and its own
    limits. The copy runs on the trainer's stream, after DALI's work and before the trainer's, and nobody waits.
    """
    dense = tensors.as_tensor()
    device = torch.device("cpu") if device_id is None else torch.device("cuda", device_id)
    copy = torch.empty(dense.shape(), dtype=torch.float32, device=device)
    feed_ndarray(dense, copy, cuda_stream=stream)
    return copy


def frame_stride(manifest: Manifest, clip: ClipSettings) -> int:
    """Stored frames from one clip frame to the next; GPU decoding selects frames by number.

    Raises:
        ConfigError: the stored frame rate is no multiple of the clip's.
    """
    video = manifest.parameters.video
    stride = video.fps / clip.fps
    if video.codec == "copy" or stride != int(stride):
        raise ConfigError(
            f"clip.fps: GPU decoding takes every n-th stored frame, but {video.fps} stored frames a second "
            f"(codec {video.codec}) are no multiple of {clip.fps}; convert the data set at that rate or use device cpu"
        )
    return int(stride)
