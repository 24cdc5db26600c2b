"""Reading samples: one by index, or a shard's samples in order."""

import io
import os
import threading
import tokenize
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from avid_pipeline.shards_spec.errors import DecodeError, ManifestError, SampleError, ShardError
from avid_pipeline.shards_spec.load_once import LoadOnce
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

# Four shards for each of 64 streams.
# Some 40 kB each; every stream of a rank has a few shards open.
_CACHED_INDICES = 2048
_FINDING_THREADS = 16
# How often damaged bytes are fetched again from a store, for networks damage bytes too.
_READS_AGAIN = 3

Result = TypeVar("Result")


class ShardReader:
    """Reads the samples of a data set below a root.

    Every member is checked against the checksum in the shard's index; what comes damaged from a remote store is
    fetched again a few times. Threads may share a reader.

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
        self._index = LoadOnce(self._load_index, _CACHED_INDICES)
        self._first_indices = [shard.first_index for shard in self.manifest.shards]
        self._samples = self.manifest.num_samples

    def __len__(self) -> int:
        return self._samples

    def locate(self, index: int) -> tuple[ShardInfo, int]:
        """The shard of an instance index, and the sample's place in it.

        Raises:
            ManifestError: no such index.
        """
        if not 0 <= index < self._samples:
            raise ManifestError(f"instance index {index}: expected 0 to {self._samples - 1}")
        shard = self.manifest.shards[bisect_right(self._first_indices, index) - 1]
        return shard, index - shard.first_index

    def index_of(self, shard: ShardInfo) -> ShardIndex:
        """The tar index of a shard; the last 2048 are kept in memory, each loaded once for all threads.

        Raises:
            ShardError: it is damaged, or its number of samples is not the manifest's.
            StorageError: it cannot be read.
        """
        return self._index(shard)

    def loaded_index(self, shard: ShardInfo) -> ShardIndex | None:
        """The tar index of a shard if it is in memory."""
        return self._index.ready(shard)

    def _load_index(self, shard: ShardInfo) -> ShardIndex:
        return self._again_if_damaged(lambda: self._index_once(shard), None)

    def _index_once(self, shard: ShardInfo) -> ShardIndex:
        index = load_index(self.storage, shard.index_name)
        if len(index) != shard.samples:
            raise ShardError(
                f"{self.storage.url_of(shard.index_name)}: expected {shard.samples} samples as in the manifest, "
                f"found {len(index)}; copy or build the shard again"
            )
        present = index.sizes >= 0
        inside = (index.offsets >= 0) & (index.offsets + index.sizes <= shard.bytes)
        if not present.any(axis=1).all() or not inside[present].all():
            raise ShardError(
                f"{self.storage.url_of(shard.index_name)}: expected members within the shard's {shard.bytes} bytes for "
                "every sample, found none or others; copy or build the shard again"
            )
        return index

    def read(self, index: int) -> Sample:
        """The sample with an instance index, in one ranged read.

        Raises:
            ManifestError: no such index.
            ShardError: the sample's bytes are damaged.
            StorageError: they cannot be read.
        """
        return self.read_place(*self.locate(index))

    def read_place(self, shard: ShardInfo, place: int, given_up: threading.Event | None = None) -> Sample:
        """The sample at a place of a shard, in one ranged read; nothing is tried again once ``given_up`` is set.

        Raises:
            ShardError: the sample's bytes are damaged.
            StorageError: they cannot be read.
        """
        tar_index = self.index_of(shard)
        start, length = tar_index.span(place)

        def read() -> Sample:
            data = self.storage.read_range(shard.name, start, length, given_up=given_up)
            return self.assemble(shard, place, data, tar_index)

        return self._again_if_damaged(read, given_up)

    def read_members(self, shard: ShardInfo, place: int) -> dict[str, bytes]:
        """The members of a sample as they are in the shard, by name, in one ranged read.

        Raises:
            ShardError: the sample's bytes are damaged, or it has no record.
        """
        tar_index = self.index_of(shard)

        def read() -> dict[str, bytes]:
            return self._split(shard, tar_index, place, self.storage.read_range(shard.name, *tar_index.span(place)))

        return self._again_if_damaged(read, None)

    def _again_if_damaged(self, read: Callable[[], Result], given_up: threading.Event | None) -> Result:
        local = self.storage.local_root is not None
        for left in reversed(range(1 if local else 1 + _READS_AGAIN)):
            try:
                return read()
            except ShardError as error:
                if local or (given_up is not None and given_up.is_set()):
                    raise
                if not left:
                    raise ShardError(f"{error} (the store was asked {1 + _READS_AGAIN} times)") from error
        raise AssertionError("unreachable")

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
                yield self.assemble(shard, place, data)

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

    def assemble(self, shard: ShardInfo, place: int, data: bytes, tar_index: ShardIndex | None = None) -> Sample:
        """The sample at a place of a shard from the bytes of its span (:meth:`ShardIndex.span`).

        Raises:
            ShardError: the bytes are damaged, or there is no record.
            SampleError: the record is not valid.
        """
        tar_index = tar_index or self.index_of(shard)
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
        DecodeError: it is no such array.
    """
    try:
        codes = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, OSError, EOFError, SyntaxError, tokenize.TokenError) as error:
        raise DecodeError(f"{where}: spectrogram is no .npy array: {error}") from error
    if codes.ndim != 2 or codes.shape[1] != NUM_FREQUENCIES or codes.dtype not in (np.uint8, np.float16):
        raise DecodeError(
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
