"""Settings of how clips are read and decoded, which training and evaluation share."""

from typing import Literal

from pydantic import Field

from avid_pipeline.config import Settings
from avid_pipeline.shards_spec.reader import ShardReader
from avid_pipeline.streams.cache import DiskCache
from avid_pipeline.streams.fetching import SampleFetcher

__all__ = ["LoadingSettings", "open_cache", "sample_fetcher"]


class LoadingSettings(Settings):
    """How clips are read and decoded; none of it changes which clips come, nor in which order.

    Attributes:
        workers: threads of each rank that read and decode; None for one a core.
        device: where clips are decoded and augmented.
        operators: what augments on the CPU; ``dali`` is slower, and the reference.
        max_failure_rate: share of clips that may fail to decode and be replaced by others, or left out of evaluations.
        connections: requests that a rank has under way at once, for data that are not on disk.
        read_ahead_megabytes: what a rank reads ahead, at most.
        cache_folder: local folder that keeps what was read of remote data, shared by the ranks of a node.
        cache_gigabytes: size of the cache, at most.
    """

    workers: int | None = Field(None, ge=1)
    device: Literal["cpu", "gpu"] = "cpu"
    operators: Literal["opencv", "dali"] = "opencv"
    max_failure_rate: float = Field(0.01, ge=0, le=1)
    connections: int = Field(8, ge=1)
    read_ahead_megabytes: int = Field(256, ge=1)
    cache_folder: str | None = None
    cache_gigabytes: int = Field(100, ge=1)


def open_cache(settings: LoadingSettings, reader: ShardReader) -> DiskCache | None:
    """The cache of remote data; what is on disk already needs none."""
    if settings.cache_folder is None or reader.storage.local_root is not None:
        return None
    return DiskCache(settings.cache_folder, settings.cache_gigabytes << 30)


def sample_fetcher(reader: ShardReader, settings: LoadingSettings, cache: DiskCache | None = None) -> SampleFetcher:
    """What reads the samples ahead, as the settings say."""
    read_ahead = settings.read_ahead_megabytes << 20
    return SampleFetcher(reader, connections=settings.connections, read_ahead_bytes=read_ahead, cache=cache)
