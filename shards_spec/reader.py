"""Reading samples: one by index, or a shard's samples in order."""

import io
import os
import tokenize
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from avid_pipeline.shards_spec.errors import SampleError, ShardError
from avid_pipeline.shards_spec.manifest import Manifest, ShardInfo, read_manifest
from avid_pipeline.shards_spec.sample import (
    RECORD_MEMBER,
    SPECTROGRAM_MEMBER,
    VIDEO_MEMBER,
    Sample,
    parse_record,
)
from avid_pipeline.shards_spec.shard_file import ShardIndex, load_index
from avid_pipeline.shards_spec.spectrogram import NUM_FREQUENCIES, FloatArray, decode_spectrogram
from avid_pipeline.shards_spec.storage import Storage, open_storage

_CACHED_INDICES = 64


class ShardReader:
    """Reads the samples of a data set below a root.

    Every member is checked against the checksum in the shard's index.

    Args:
        storage: the root.
        manifest: its manifest; read from the root when not given.

    Raises:
        StorageError: the root cannot be read.
        ManifestError: its manifest is missing or invalid.
    """

    def __init__(self, storage: Storage, manifest: Manifest | None = None) -> None:
        self.storage = storage
        self.manifest = manifest or read_manifest(storage)
        self._index = lru_cache(maxsize=_CACHED_INDICES)(lambda name: load_index(storage, name))

    def __len__(self) -> int:
        return self.manifest.num_samples

    def index_of(self, shard: ShardInfo) -> ShardIndex:
        """The tar index of a shard; the last 64 are kept in memory.

        Raises:
            ShardError: it is damaged, or its number of samples is not the manifest's.
        """
        index = self._index(shard.index_name)
        if len(index) != shard.samples:
            raise ShardError(
                f"{self.storage.url_of(shard.index_name)}: expected {shard.samples} samples as in the manifest, "
                f"found {len(index)}; copy or build the shard again"
            )
        return index

    def read(self, index: int) -> Sample:
        """The sample with an instance index, in one ranged read.

        Raises:
            ManifestError: no such index.
            ShardError: the sample's bytes are damaged.
        """
        shard, place = self.manifest.locate(index)
        tar_index = self.index_of(shard)
        data = self.storage.read_range(shard.name, *tar_index.span(place))
        return self._assemble(shard, tar_index, place, data)

    def read_shard(self, shard: ShardInfo, places: Iterable[int] | None = None) -> Iterator[Sample]:
        """The samples of a shard in the order of ``places`` (all, in order, by default).

        Ascending places are one sequential pass over the file.

        Raises:
            ShardError: the shard is truncated or a sample's bytes are damaged.
        """
        tar_index = self.index_of(shard)
        with self.storage.open(shard.name) as file:
            for place in range(shard.samples) if places is None else places:
                start, length = tar_index.span(place)
                file.seek(start)
                data = bytes(file.read(length))
                if len(data) != length:
                    raise ShardError(
                        f"{self.storage.url_of(shard.name)}: ends at byte {start + len(data)} inside "
                        f"{tar_index.keys[place]}; the shard is truncated: copy or build it again"
                    )
                yield self._assemble(shard, tar_index, place, data)

    def _assemble(self, shard: ShardInfo, tar_index: ShardIndex, place: int, data: bytes) -> Sample:
        where = self.storage.url_of(shard.name)
        members = tar_index.split(place, data, where)
        if RECORD_MEMBER not in members:
            raise ShardError(f"{where}: {tar_index.keys[place]}: has no {RECORD_MEMBER} member")
        record = parse_record(members[RECORD_MEMBER], f"{where}: {tar_index.keys[place]}")
        return Sample(record, members.get(VIDEO_MEMBER), members.get(SPECTROGRAM_MEMBER))


def open_dataset(root: str | os.PathLike[str], options: Mapping[str, str] | None = None) -> ShardReader:
    """Open a data set by its root URL.

    Raises:
        StorageError: the root cannot be read.
        ManifestError: its manifest is missing or invalid.
    """
    return ShardReader(open_storage(root, options=options))


def stored_spectrogram(data: bytes, where: str) -> npt.NDArray[np.generic]:
    """The array inside ``KEY.spectrogram.npy``: uint8 codes or float16, [frames, 257].

    Raises:
        SampleError: it is no such array.
    """
    try:
        codes = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, OSError, EOFError, SyntaxError, tokenize.TokenError) as error:
        raise SampleError(f"{where}: spectrogram is no .npy array: {error}") from error
    if codes.ndim != 2 or codes.shape[1] != NUM_FREQUENCIES or codes.dtype not in (np.uint8, np.float16):
        raise SampleError(
            f"{where}: spectrogram: expected uint8 or float16 [frames, {NUM_FREQUENCIES}], "
            f"found {codes.dtype} {list(codes.shape)}"
        )
    return np.asarray(codes)


def read_spectrogram(data: bytes, where: str) -> FloatArray:
    """``KEY.spectrogram.npy`` as float32 dB [frames, 257].

    Raises:
        SampleError: it is no stored spectrogram.
    """
    return decode_spectrogram(stored_spectrogram(data, where))
