"""Clips on the CPU: every thread decodes a clip and writes it into its place in the batch."""

from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from avid_pipeline.clips.augmentation import FloatArray
from avid_pipeline.clips.batch import ClipBatch, Recipe, describe
from avid_pipeline.clips.engines import Work
from avid_pipeline.clips.failures import FailurePolicy
from avid_pipeline.clips.host_augmentation import augment_picture, single_threaded_opencv
from avid_pipeline.clips.reading import HostClip, check_size
from avid_pipeline.clips.sound import augment_sound
from avid_pipeline.shards_spec.reader import ShardReader


@dataclass(frozen=True)
class _Started:
    video: FloatArray | None
    audio: list[FloatArray | None]
    clips: list[Future[HostClip]]
    visits: torch.Tensor


class HostEngine:
    """Decodes with PyAV and augments with OpenCV; see :mod:`avid_pipeline.clips.host_augmentation`."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe

    def start(self, work: Work, pool: ThreadPoolExecutor, reader: ShardReader, failures: FailurePolicy) -> _Started:
        """Have the threads begin with a batch."""
        clip, size = self._recipe.clip, len(work.batch)
        video = None
        if "video" in self._recipe.modalities:
            video = np.empty((size, 3, clip.num_frames, clip.crop_size, clip.crop_size), dtype=np.float32)
        audio: list[FloatArray | None] = [None] * size

        def make(place: int) -> HostClip:
            instance, visit = int(work.batch.instances[place]), int(work.batch.visits[place])

            def read(chosen: int) -> HostClip:
                sample = work.sample(place, chosen, reader)
                found = self._recipe.read(sample, chosen, visit, "frames")
                if found.frames is not None:
                    check_size(found, found.frames[0].height, found.frames[0].width, sample.record.key)
                self._augment(found, None if video is None else video[place], audio, place)
                return found.without_content()

            return failures.make(work.number, instance, visit, read)

        clips = [pool.submit(make, place) for place in range(size)]
        return _Started(video, audio, clips, torch.from_numpy(np.array(work.batch.visits, dtype=np.int64)))

    def _augment(self, clip: HostClip, video: FloatArray | None, audio: list[FloatArray | None], place: int) -> None:
        if video is not None and clip.frames is not None:
            augment_picture(clip.frames, clip.augmentation, video)
        if clip.sound is not None:
            recipe = self._recipe
            audio[place] = augment_sound(clip.sound, clip.augmentation.volume_db, recipe.mean, recipe.std)

    def finish(self, started: Iterator[_Started], count: int) -> Generator[ClipBatch, None, None]:
        """The batches that were started, in order."""
        with single_threaded_opencv():
            for pending in started:
                batch = describe([future.result() for future in pending.clips], pending.visits)
                if pending.video is not None:
                    batch["video"] = torch.from_numpy(pending.video)
                sounds = [sound for sound in pending.audio if sound is not None]
                if sounds:
                    batch["audio"] = torch.from_numpy(np.stack(sounds))
                yield batch
