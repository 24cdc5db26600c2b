"""What an engine is: it turns requested samples into batches of tensors."""

from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from avid_pipeline.clips.batch import ClipBatch
from avid_pipeline.clips.failures import FailurePolicy
from avid_pipeline.shards_spec.reader import ShardReader
from avid_pipeline.shards_spec.sample import Sample
from avid_pipeline.streams.batches import Batch


class RequestedSample(Protocol):
    """A sample that is being read."""

    def result(self) -> Sample:
        """Wait for it; errors of reading are raised here."""


@dataclass(frozen=True)
class Work:
    """A batch whose samples were requested.

    Attributes:
        number: of the batch, from 0.
        batch: its visits.
        samples: the requested samples, one for each visit, until they are taken.
    """

    number: int
    batch: Batch
    samples: list[Any]

    def sample(self, place: int, instance: int, reader: ShardReader) -> Sample:
        """The sample of an instance at a place: the requested one, or another that takes its place.

        Another one is read at once: a request would wait behind those of batches that wait for this one.
        """
        requested: RequestedSample | None = self.samples[place]
        if requested is None or instance != int(self.batch.instances[place]):
            return reader.read(instance)
        self.samples[place] = None  # its memory is free when the clip is made, not when the batch is
        return requested.result()


class Engine(Protocol):
    """Makes batches, in two steps so that many are under way."""

    def start(self, work: Work, pool: ThreadPoolExecutor, reader: ShardReader, failures: FailurePolicy) -> Any:
        """Have the threads begin with a batch."""

    def finish(self, started: Iterator[Any], count: int) -> Generator[ClipBatch, None, None]:
        """The batches that were started, in order."""
