"""Features of a data set in zarr: written chunk by chunk by any number of ranks, and gone on with where it stopped.

Arrays of the group, for C clips of each of N instances:

- ``features/<name>``, float32 or float16 [C, N, F];
- ``label``, int64 [C, N], the first label, -1 without one; ``labels``, uint8 [C, N, ceil(classes / 8)], a bit for each;
- ``found``, bool [C, N], false for a clip that could not be decoded, whose features are zeros;
- ``index``, int64 [N], the instances.

A chunk is one clip of some neighbouring instances, with a checksum. It is complete when its ``found`` is there, which
is written last. The group's attributes say what the features are of.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import Crc32cCodec
from zarr.errors import BaseZarrError
from zarr.storage import ObjectStore

from avid_pipeline.errors import ConfigError, StorageError
from avid_pipeline.shards_spec.storage import Storage
from avid_pipeline.streams.batches import IntArray

__all__ = ["Block", "FeatureStore", "create_store", "open_store", "remove_store"]

ROWS_PER_CHUNK = 256
_FOUND, _LABEL, _LABELS, _INDEX, _FEATURES = "found", "label", "labels", "index", "features"
_METADATA = "zarr.json"
_DESCRIPTION = "description"

_ARRAYS = (_FOUND, _LABEL, _LABELS, _INDEX, _FEATURES)
# The instances are written when everything else of an empty store is there.
_BEGUN = f"{_INDEX}/c/0"
# What obstore, zarr and its codecs raise for what is missing, cut or damaged.
_READ_ERRORS = (OSError, ValueError, KeyError, TypeError, RuntimeError, BaseZarrError)


@dataclass(frozen=True, order=True)
class Block:
    """One chunk: clip number ``clip`` of instances ``start`` to ``stop``, which are places in the store's ``index``."""

    clip: int
    start: int
    stop: int


@dataclass(frozen=True)
class FeatureStore:
    """Features below a root; make it with :func:`create_store` or :func:`open_store`.

    Attributes:
        storage: the root.
        group: the zarr group.
        index: instances, int64 [N].
        clips: C.
        names: of the features.
        description: what they are of.
    """

    storage: Storage
    group: zarr.Group
    index: IntArray
    clips: int
    names: tuple[str, ...]
    description: dict[str, Any]

    def blocks(self) -> list[Block]:
        """All chunks, the first clip of all instances first."""
        count = len(self.index)
        return [
            Block(clip, start, min(start + ROWS_PER_CHUNK, count))
            for clip in range(self.clips)
            for start in range(0, count, ROWS_PER_CHUNK)
        ]

    def missing(self) -> list[Block]:
        """The chunks that are not complete.

        Raises:
            StorageError: the root cannot be listed.
        """
        there = set(self.storage.names(_FOUND))
        return [b for b in self.blocks() if f"{_FOUND}/c/{b.clip}/{b.start // ROWS_PER_CHUNK}" not in there]

    def write(
        self,
        block: Block,
        features: Mapping[str, npt.NDArray[Any]],
        labels: Sequence[tuple[int, ...]],
        found: npt.NDArray[np.bool_],
    ) -> None:
        """Write a chunk; when this returns, it is complete.

        Args:
            block: which.
            features: name to [rows, F].
            labels: all labels of each row.
            found: bool [rows].

        Raises:
            StorageError: the root cannot be written.
        """
        rows = slice(block.start, block.stop)
        first = np.array([row[0] if row else -1 for row in labels], dtype=np.int64)
        packed = pack_labels(labels, self._array(_LABELS).shape[2])
        parts = {f"{_FEATURES}/{name}": features[name] for name in self.names}
        for name, values in (parts | {_LABEL: first, _LABELS: packed, _FOUND: found}).items():
            try:
                self._array(name)[block.clip, rows] = values
            except _READ_ERRORS as error:
                raise StorageError(f"{self.storage.url_of(name)}: cannot write {block}: {_brief(error)}") from error

    def features(self, name: str, clip: int, rows: slice = slice(None)) -> npt.NDArray[Any]:
        """Features of a clip of all instances, or some: [rows, F].

        Raises:
            ConfigError: the store has no features of this name.
            StorageError: they are missing or damaged.
        """
        if name not in self.names:
            raise ConfigError(f"{self.storage.url}: has no features {name}; it has {', '.join(self.names)}")
        values = self._read(f"{_FEATURES}/{name}", clip, rows)
        if not np.isfinite(values).all():
            raise StorageError(
                f"{self.storage.url_of(f'{_FEATURES}/{name}')}: a part of clip {clip} is missing; remove the folder "
                "and compute the features again"
            )
        return values

    def found(self) -> npt.NDArray[np.bool_]:
        """Bool [C, N].

        Raises:
            StorageError: it is missing or damaged.
        """
        return np.stack([self._read(_FOUND, clip) for clip in range(self.clips)])

    def labels(self) -> IntArray:
        """First labels, int64 [N], -1 without one and for what could not be decoded.

        Raises:
            StorageError: they are missing or damaged.
        """
        # Another clip of an instance may have been decoded where one was not.
        result: IntArray = np.stack([self._read(_LABEL, clip) for clip in range(self.clips)]).max(axis=0)
        return result

    def label_sets(self) -> npt.NDArray[np.uint8]:
        """All labels as bits, uint8 [N, ceil(classes / 8)], as :func:`numpy.packbits` packs them.

        Raises:
            StorageError: they are missing or damaged.
        """
        total = self._read(_LABELS, 0)
        for clip in range(1, self.clips):
            total = total | self._read(_LABELS, clip)
        return total

    def _read(self, name: str, clip: int, rows: slice = slice(None)) -> npt.NDArray[Any]:
        try:
            return np.asarray(self._array(name)[clip, rows])
        except _READ_ERRORS as error:
            raise StorageError(
                f"{self.storage.url_of(name)}: clip {clip} is missing or damaged: {_brief(error)}; remove the folder "
                "and compute the features again"
            ) from error

    def _array(self, name: str) -> zarr.Array[Any]:
        array = self.group[name]
        assert isinstance(array, zarr.Array)
        return array


def pack_labels(labels: Sequence[tuple[int, ...]], width: int) -> npt.NDArray[np.uint8]:
    """Sets of labels as bits, uint8 [rows, width]."""
    bits = np.zeros((len(labels), 8 * width), dtype=np.bool_)
    for row, of_row in enumerate(labels):
        bits[row, list(of_row)] = True
    return np.packbits(bits, axis=1)


def create_store(
    storage: Storage,
    index: IntArray,
    clips: int,
    dims: Mapping[str, int],
    num_classes: int,
    description: Mapping[str, Any],
    dtype: str = "float32",
) -> FeatureStore:
    """Make an empty store, or take up one that was begun with the same description.

    Args:
        storage: the root.
        index: instances, int64 [N].
        clips: C.
        dims: feature name to F.
        num_classes: of the data.
        description: what the features are of, as plain data.
        dtype: of the features.

    Raises:
        ConfigError: there are features of something else; the message says what differs.
        StorageError: the root cannot be read or written.
    """
    described = {**description, "dtype": dtype, "clips": clips, "features": dict(dims), "instances": len(index)}
    if storage.exists(_METADATA) and storage.exists(_BEGUN):
        store = open_store(storage, complete=False)
        differences = [
            f"{key} was {store.description.get(key)!r} and is now {described.get(key)!r}"
            for key in sorted(described.keys() | store.description.keys())
            if store.description.get(key) != described.get(key)
        ]
        if differences:
            raise ConfigError(
                f"{storage.url}: holds features of something else: {'; '.join(differences)}; give another folder, or "
                "--overwrite"
            )
        return store
    try:
        _make_arrays(storage, index, clips, dims, -(-max(1, num_classes) // 8), dtype, described)
    except _READ_ERRORS as error:
        raise StorageError(f"{storage.url}: cannot begin the features: {_brief(error)}") from error
    return open_store(storage, complete=False)


def open_store(storage: Storage, *, complete: bool = True) -> FeatureStore:
    """Open features that are there.

    Args:
        storage: the root.
        complete: refuse features that are not all there.

    Raises:
        StorageError: there are none, they are damaged, or not complete.
    """
    try:
        group = zarr.open_group(ObjectStore(storage.store, read_only=False), mode="r+")
        description: Any = dict(group.attrs)[_DESCRIPTION]
        index = np.asarray(group[_INDEX][:])  # type: ignore[index]
        names = tuple(description["features"])
        clips = int(description["clips"])
    except _READ_ERRORS as error:
        raise StorageError(
            f"{storage.url}: expected features as avid-evaluate features writes them, found none that can be read: "
            f"{_brief(error)}"
        ) from error
    store = FeatureStore(storage, group, index, clips, names, description)
    if complete and (missing := store.missing()):
        raise StorageError(
            f"{storage.url}: {len(missing)} of {len(store.blocks())} parts are not there yet; run avid-evaluate "
            "features again with the same arguments to finish them"
        )
    return store


def remove_store(storage: Storage) -> None:
    """Remove the features below a root, and nothing else.

    Raises:
        ConfigError: what is there are no features of ours.
        StorageError: something cannot be removed.
    """
    if not storage.exists(_METADATA):
        return
    try:
        attributes = json.loads(storage.read(_METADATA)).get("attributes", {})
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"{storage.url_of(_METADATA)}: is no zarr group; remove it by hand ({error})") from error
    if _DESCRIPTION not in attributes:
        raise ConfigError(f"{storage.url}: holds a zarr group that is not ours; give another folder")
    # The instances first: without them, what is left counts as not begun.
    ours = [name for folder in _ARRAYS for name in storage.names(folder) if name.endswith(_METADATA) or "/c/" in name]
    for name in (_BEGUN, *ours, _METADATA):
        storage.delete(name)


def _make_arrays(
    storage: Storage,
    index: IntArray,
    clips: int,
    dims: Mapping[str, int],
    label_bytes: int,
    dtype: str,
    description: Mapping[str, Any],
) -> None:
    count = len(index)
    store = ObjectStore(storage.store, read_only=False)
    try:
        group = zarr.open_group(store, mode="r+")
    except FileNotFoundError:
        group = zarr.create_group(store)
    if group.attrs and _DESCRIPTION not in group.attrs:
        raise ValueError("a zarr group of something else is here already; give another folder")
    group.attrs.put({_DESCRIPTION: dict(description)})
    arrays: dict[str, tuple[tuple[int, ...], tuple[int, ...], str]] = {
        f"{_FEATURES}/{name}": ((clips, count, dim), (1, ROWS_PER_CHUNK, dim), dtype) for name, dim in dims.items()
    }
    arrays[_LABEL] = ((clips, count), (1, ROWS_PER_CHUNK), "int64")
    arrays[_LABELS] = ((clips, count, label_bytes), (1, ROWS_PER_CHUNK, label_bytes), "uint8")
    arrays[_FOUND] = ((clips, count), (1, ROWS_PER_CHUNK), "bool")
    arrays[_INDEX] = ((count,), (count,), "int64")
    for name, (shape, chunks, kind) in arrays.items():
        # Of a creation that was cut short. To let zarr overwrite it would remove all that is in that folder.
        storage.delete(f"{name}/{_METADATA}")
        array = zarr.create_array(
            store,
            name=name,
            shape=shape,
            chunks=chunks,
            dtype=kind,
            compressors=Crc32cCodec(),
            fill_value=float("nan") if name.startswith(_FEATURES) else 0,
            config={"write_empty_chunks": True},
        )
        if name == _INDEX:
            array[:] = index


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
