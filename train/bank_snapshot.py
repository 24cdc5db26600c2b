"""A memory bank in storage: a zarr group that every rank writes its own chunks of, and that loads at any world size.

Its arrays are ``video`` and ``audio``, float32 [N, D], and perhaps ``positives``, int64 [N, k]. A chunk is some whole
rows with their checksum. zarr encodes and decodes chunks in memory; reading and writing them is the storage's work,
which tries again where connections break, and whose errors name the file.
"""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import zarr
from torch import Tensor
from zarr.buffer import cpu
from zarr.codecs import Crc32cCodec
from zarr.storage import MemoryStore

from avid_pipeline.errors import CheckpointError, StorageError
from avid_pipeline.row_ranges import rows_per_chunk
from avid_pipeline.shards_spec.storage import Storage
from avid_pipeline.train.checkpoint_files import write_durably
from avid_pipeline.train.memory_bank import MODALITIES, MemoryBank

__all__ = ["POSITIVES", "BankLayout", "has_positives", "read_rows", "snapshot_shape", "write_bank", "write_rows"]

POSITIVES = "positives"
_METADATA = "zarr.json"
_AT_ONCE = 4
_CHECKSUM_BYTES = 4
_EARLIER = "use an earlier checkpoint"


@dataclass(frozen=True)
class BankLayout:
    """Arrays of a snapshot and how they are cut.

    Attributes:
        num_instances: N.
        dim: D.
        chunk_rows: rows of a chunk.
        num_positives: k; None without positives.
    """

    num_instances: int
    dim: int
    chunk_rows: int
    num_positives: int | None = None

    @classmethod
    def of(cls, bank: MemoryBank, num_positives: int | None) -> "BankLayout":
        """That of a bank: every rank's rows are whole chunks."""
        return cls(bank.num_instances, bank.dim, rows_per_chunk(bank.num_instances, bank.group.size), num_positives)

    def make(self) -> tuple[dict[str, Any], zarr.Group]:
        """An empty snapshot in memory: its files, to which what is written into the group is added, and the group."""
        files: dict[str, Any] = {}
        arrays = [*MODALITIES, *([] if self.num_positives is None else [POSITIVES])]
        group = zarr.create_group(MemoryStore(files), attributes={"arrays": arrays})
        for name in arrays:
            of_bank = name != POSITIVES
            width = self.dim if of_bank else self.num_positives
            assert width is not None
            group.create_array(
                name,
                shape=(self.num_instances, width),
                chunks=(self.chunk_rows, width),
                dtype="float32" if of_bank else "int64",
                # Random vectors do not compress; a checksum and a fill value that no row has tell damage instead.
                compressors=Crc32cCodec(),
                fill_value=float("nan") if of_bank else -1,
                config={"write_empty_chunks": True},
            )
        return files, group

    def write_metadata(self, root: Storage, folder: str) -> None:
        """Write the files that say what the arrays are; one process does.

        Raises:
            StorageError: the root cannot be written.
        """
        for name, data in self.make()[0].items():
            write_durably(root, f"{folder}/{name}", data.to_bytes())


def write_bank(root: Storage, folder: str, bank: MemoryBank, positives: Tensor | None) -> None:
    """Write the chunks of this rank's rows; every rank may do so at once.

    Args:
        root: where to write.
        folder: the snapshot, relative to the root.
        bank: its rows are written as float32 whatever they are stored as.
        positives: of this rank's rows, int64 [len(bank.rows), k]; None for none.

    Raises:
        CheckpointError: the positives are not those of this rank's rows.
        StorageError: the root cannot be written; the message names the chunk.
    """
    layout = BankLayout.of(bank, None if positives is None else positives.shape[1])
    arrays: dict[str, Tensor] = {str(name): rows for name, rows in zip(MODALITIES, bank.local(), strict=True)}
    if positives is not None:
        if len(positives) != len(bank.rows) or positives.dtype != torch.int64:
            raise CheckpointError(
                f"{root.url_of(folder)}/{POSITIVES}: expected int64 positives of this rank's {len(bank.rows)} rows, "
                f"found {positives.dtype} of {len(positives)}"
            )
        arrays[POSITIVES] = positives
    for name, rows in arrays.items():
        write_rows(root, folder, layout, name, bank.rows.start, rows)


def write_rows(root: Storage, folder: str, layout: BankLayout, name: str, first: int, rows: Tensor) -> None:
    """Write rows of an array.

    Args:
        root: where to write.
        folder: the snapshot, relative to the root.
        layout: of the snapshot.
        name: of the array.
        first: where the rows begin: at the border of a chunk. They end at one too, or at the array's end.
        rows: [R, D].

    Raises:
        StorageError: the root cannot be written; the message names the chunk.
    """
    height = layout.chunk_rows
    assert first % height == 0 or not len(rows)

    def write(start: int) -> None:
        files, group = layout.make()
        array = _array(group, name)
        block = (
            rows[start : start + height].detach().cpu().numpy() if name == POSITIVES else _as_float(rows, start, height)
        )
        array[first + start : first + start + len(block)] = block
        chunk = f"{name}/{array.metadata.encode_chunk_key(((first + start) // height, 0))}"
        write_durably(root, f"{folder}/{chunk}", files[chunk].to_bytes())

    _several(write, range(0, len(rows), height))


def read_rows(
    root: Storage, folder: str, name: str, rows: range, num_instances: int, width: int | None = None
) -> npt.NDArray[Any]:
    """Read rows of an array.

    Args:
        root: where the snapshot is.
        folder: the snapshot, relative to the root.
        name: of the array.
        rows: which.
        num_instances: N that the array must have.
        width: columns that it must have; None for any number.

    Returns:
        float32 or int64 [len(rows), columns].

    Raises:
        CheckpointError: the array or a chunk is missing or damaged (the message names it), or of another shape.
    """
    files, array = _open(root, folder, name)
    where = f"{root.url_of(folder)}/{name}"
    expected = [num_instances, array.shape[1] if width is None else width]
    if list(array.shape) != expected:
        raise CheckpointError(f"{where}: expected shape {expected}, found {list(array.shape)}")
    height = array.chunks[0]
    found = np.empty((len(rows), array.shape[1]), dtype=np.int64 if name == POSITIVES else np.float32)

    def read(number: int) -> None:
        first, stop = max(rows.start, number * height), min(rows.stop, (number + 1) * height)
        block = _read_chunk(root, folder, files, array, number, slice(first, stop))
        usable = ((block >= 0) & (block < num_instances)) if name == POSITIVES else np.isfinite(block)
        if not usable.all():
            raise CheckpointError(f"{where}/{_key(array, number)}: some of its rows are missing, {_EARLIER}")
        found[first - rows.start : stop - rows.start] = block

    _several(read, range(rows.start // height, -(-rows.stop // height)) if rows else range(0))
    return found


def snapshot_shape(root: Storage, folder: str) -> tuple[int, int]:
    """N and D of a snapshot.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    shapes = [_open(root, folder, name)[1].shape for name in MODALITIES]
    if shapes[0] != shapes[1]:
        raise CheckpointError(
            f"{root.url_of(folder)}: video is {list(shapes[0])} and audio {list(shapes[1])}, {_EARLIER}"
        )
    return int(shapes[0][0]), int(shapes[0][1])


def has_positives(root: Storage, folder: str) -> bool:
    """Whether positives were written with a snapshot.

    Raises:
        CheckpointError: there is no snapshot, or it is damaged.
    """
    return POSITIVES in _group_attributes(root, folder).get("arrays", [])


def _read_chunk(
    root: Storage, folder: str, files: dict[str, Any], array: zarr.Array[Any], number: int, rows: slice
) -> npt.NDArray[Any]:
    key = _key(array, number)
    name = f"{folder}/{array.path}/{key}"
    data = _read(root, name)
    files[f"{array.path}/{key}"] = cpu.Buffer.from_bytes(data)
    try:
        return np.asarray(array[rows])
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        full = array.chunks[0] * array.chunks[1] * array.dtype.itemsize + _CHECKSUM_BYTES
        reason = (
            f"holds {len(data):,} bytes instead of {full:,}, for it was cut"
            if len(data) < full
            else f"is damaged ({' '.join(str(error).split())})"
        )
        raise CheckpointError(f"{root.url_of(name)}: {reason}; {_EARLIER}") from error
    finally:
        del files[f"{array.path}/{key}"]


def _open(root: Storage, folder: str, name: str) -> tuple[dict[str, Any], zarr.Array[Any]]:
    """An array without chunks, in memory, and the files that it looks for them in."""
    _group_attributes(root, folder)
    metadata = f"{folder}/{name}/{_METADATA}"
    files: dict[str, Any] = {f"{name}/{_METADATA}": cpu.Buffer.from_bytes(_read(root, metadata))}
    try:
        array = zarr.open_array(MemoryStore(files), path=name, mode="r")
        usable = array.ndim == 2 and array.chunks[0] > 0 and array.chunks[1] == array.shape[1]
        expected = np.dtype(np.int64 if name == POSITIVES else np.float32)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{root.url_of(metadata)}: is damaged, {_EARLIER}: {reason}") from error
    if not usable or array.dtype != expected:
        raise CheckpointError(
            f"{root.url_of(metadata)}: expected a table of {expected} in chunks of whole rows, found {array.dtype} "
            f"{list(array.shape)} in chunks of {list(array.chunks)}; {_EARLIER}"
        )
    return files, array


def _group_attributes(root: Storage, folder: str) -> dict[str, Any]:
    name = f"{folder}/{_METADATA}"
    try:
        content = json.loads(_read(root, name))
        attributes = dict(content["attributes"])
    except (ValueError, LookupError, TypeError) as error:
        raise CheckpointError(f"{root.url_of(name)}: is damaged, {_EARLIER}: {error}") from error
    return attributes


def _read(root: Storage, name: str) -> bytes:
    try:
        return root.read(name)
    except StorageError as error:
        if root.exists(name):
            raise
        raise CheckpointError(f"{root.url_of(name)}: is missing, {_EARLIER}") from error


def _array(group: zarr.Group, name: str) -> zarr.Array[Any]:
    array = group[name]
    assert isinstance(array, zarr.Array)
    return array


def _key(array: zarr.Array[Any], number: int) -> str:
    return str(array.metadata.encode_chunk_key((number, 0)))


def _as_float(rows: Tensor, start: int, height: int) -> npt.NDArray[np.float32]:
    block: npt.NDArray[np.float32] = rows[start : start + height].detach().to("cpu", torch.float32).numpy()
    return block


def _several(action: Callable[[int], None], numbers: range) -> None:
    """Do something for every number, a few at a time."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for _ in pool.map(action, numbers):
            pass
