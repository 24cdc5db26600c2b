"""Reading samples: one by index, or a shard's samples in order."""

import io
import os
import tokenize
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from avid_pipeline.shards_spec.errors import SampleError, ShardError
from avid_pipeline.shards_spec.manifest import Manifest, ShardInfo, read_manifest
from avid_pipeline.shards_spec.parallel import in_threads
from avid_pipeline.shards_spec.sample import (
    MEMBERS,
    RECORD_MEMBER,
    SPECTROGRAM_MEMBER,
    VIDEO_MEMBER,
    Sample,
    SampleRecord,
    parse_record,
)
from avid_pipeline.shards_spec.shard_file import ShardIndex, load_index
from avid_pipeline.shards_spec.spectrogram import NUM_FREQUENCIES, FloatArray, decode_spectrogram
from avid_pipeline.shards_spec.storage import Storage, open_storage

_CACHED_INDICES = 64
_FINDING_THREADS = 16


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

    def read_members(self, shard: ShardInfo, place: int) -> dict[str, bytes]:
        """The members of a sample as they are in the shard, by name, in one ranged read.

        Raises:
            ShardError: the sample's bytes are damaged, or it has no record.
        """
        tar_index = self.index_of(shard)
        data = self.storage.read_range(shard.name, *tar_index.span(place))
        return self._split(shard, tar_index, place, data)

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

    def read_records(self, shard: ShardInfo, places: Sequence[int] | None = None) -> list[SampleRecord]:
        """The records of samples of a shard (all by default), without their videos and spectrograms.

        Raises:
            ShardError: a record's bytes are damaged, or a sample has none.
            SampleError: a record is not valid.
        """
        tar_index = self.index_of(shard)
        where, column = self.storage.url_of(shard.name), MEMBERS.index(RECORD_MEMBER)
        chosen = list(range(shard.samples) if places is None else places)
        for place in chosen:
            if tar_index.sizes[place, column] < 0:
                raise ShardError(f"{where}: {tar_index.keys[place]}: has no {RECORD_MEMBER} member")
        starts = [int(tar_index.offsets[place, column]) for place in chosen]
        lengths = [int(tar_index.sizes[place, column]) for place in chosen]
        records = []
        for place, start, data in zip(
            chosen, starts, self.storage.read_ranges(shard.name, starts, lengths), strict=True
        ):
            key = tar_index.keys[place]
            if zlib.crc32(data) != tar_index.crc32[place, column]:
                raise ShardError(
                    f"{where}: {key}.{RECORD_MEMBER}: bytes {start} to {start + len(data)} do not have the checksum "
                    "of the index; the shard is damaged: copy or build it again"
                )
            records.append(parse_record(data, f"{where}: {key}"))
        return records

    def find(self, key: str) -> int:
        """The instance index of the sample with a key.

        The manifest does not list keys: the shards' indices are read in order, many at once, until one has it.

        Raises:
            SampleError: no sample has this key.
            ShardError: an index is damaged.
        """

        def look(shard: ShardInfo) -> int | None:
            keys = load_index(self.storage, shard.index_name).keys
            return shard.first_index + keys.index(key) if key in keys else None

        with closing(in_threads(look, self.manifest.shards, _FINDING_THREADS)) as found:
            for index in found:
                if index is not None:
                    return index
        raise SampleError(
            f"{self.storage.url}: no sample has the key {key!r} ({len(self)} samples in {len(self.manifest.shards)} "
            "shards were looked through); a key is the name before a member's first dot, as `tar t` lists it"
        )

    def _split(self, shard: ShardInfo, tar_index: ShardIndex, place: int, data: bytes) -> dict[str, bytes]:
        where = self.storage.url_of(shard.name)
        members = tar_index.split(place, data, where)
        if RECORD_MEMBER not in members:
            raise ShardError(f"{where}: {tar_index.keys[place]}: has no {RECORD_MEMBER} member")
        return members

    def _assemble(self, shard: ShardInfo, tar_index: ShardIndex, place: int, data: bytes) -> Sample:
        members = self._split(shard, tar_index, place, data)
        record = parse_record(members[RECORD_MEMBER], f"{self.storage.url_of(shard.name)}: {tar_index.keys[place]}")
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
