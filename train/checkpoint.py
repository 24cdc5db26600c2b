"""Checkpoints: one folder each, complete only when its ``checkpoint.json`` is there; ``latest`` names the newest.

Files of a checkpoint folder:

- ``model.safetensors``: the model's state dict, with the published names;
- ``trainer.pt``: optimizer and loss state, loadable with ``weights_only``;
- ``memory_bank.zarr``: arrays ``video`` and ``audio`` [N, D], every chunk with its checksum;
- ``checkpoint.json``: configuration, place in the run, versions and checksums; written last.
"""

import hashlib
import io
import json
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
import zarr
from pydantic import ValidationError
from zarr.codecs import Crc32cCodec
from zarr.storage import ObjectStore

from avid_pipeline import __version__
from avid_pipeline.errors import CheckpointError, StorageError
from avid_pipeline.models import AVModel
from avid_pipeline.models.pretrained import LATEST_NAME, WEIGHTS_NAME
from avid_pipeline.shards_spec.manifest import Record, SpectrogramStatistics, describe_validation_error
from avid_pipeline.shards_spec.storage import Storage, open_storage
from avid_pipeline.streams.state import StreamState
from avid_pipeline.train.config import TrainConfig
from avid_pipeline.train.memory_bank import MODALITIES, MemoryBank

RECORD_NAME = "checkpoint.json"
TRAINER_NAME = "trainer.pt"
BANK_NAME = "memory_bank.zarr"
FOLDER = "checkpoints"
_ROWS_PER_CHUNK = 65_536


class CheckpointRecord(Record):
    """``checkpoint.json``.

    Attributes:
        format_version: of checkpoint folders, 1.
        stream: where the run stands in its data; see :class:`~avid_pipeline.streams.state.StreamState`.
        config: the run's configuration, as plain data.
        spectrogram_statistics: what sound was normalised with.
        versions: of avid-pipeline and torch.
        sha256: checksums of the other files.
    """

    format_version: Literal[1] = 1
    stream: dict[str, str | int]
    config: dict[str, Any]
    spectrogram_statistics: SpectrogramStatistics
    versions: dict[str, str]
    sha256: dict[str, str]


def save_checkpoint(
    root: Storage,
    *,
    stream: StreamState,
    config: TrainConfig,
    statistics: SpectrogramStatistics,
    model: AVModel,
    trainer_state: dict[str, Any],
    bank: MemoryBank,
) -> str:
    """Write a checkpoint below a run's root and make it the latest.

    Every rank must call this: each writes its own rows of the memory bank, the first rank the rest.

    Returns:
        The checkpoint's name, relative to the root.

    Raises:
        StorageError: the root cannot be written.
    """
    name = f"{FOLDER}/step-{stream.step:08d}"
    group = bank.group
    if group.rank == 0:
        root.delete(f"{name}/{RECORD_NAME}")
        _bank_arrays(root, name, bank)
    group.barrier()
    for rank in range(group.size):
        # In turn, for two ranks may share a chunk at the border of their rows.
        if rank == group.rank:
            _write_bank(root, name, bank)
        group.barrier()
    if group.rank == 0:
        files = {
            WEIGHTS_NAME: safetensors.torch.save(
                {key: tensor.contiguous().cpu() for key, tensor in model.state_dict().items()}
            ),
            TRAINER_NAME: _torch_bytes(trainer_state),
        }
        for file, data in files.items():
            root.write(f"{name}/{file}", data)
        record = CheckpointRecord(
            stream=stream.to_dict(),
            config=config.model_dump(mode="json"),
            spectrogram_statistics=statistics,
            versions={"avid-pipeline": __version__, "torch": torch.__version__},
            sha256={file: hashlib.sha256(data).hexdigest() for file, data in files.items()},
        )
        root.write(f"{name}/{RECORD_NAME}", (json.dumps(record.model_dump(mode="json"), indent=1) + "\n").encode())
        root.write(LATEST_NAME, f"{name}\n".encode())
    group.barrier()
    return name


def latest_checkpoint(root: Storage) -> str | None:
    """The newest complete checkpoint's name below a run's root; None where there is none."""
    if not root.exists(LATEST_NAME):
        return None
    return root.read(LATEST_NAME).decode().strip()


def has_record(folder: Storage) -> bool:
    """Whether a folder is a checkpoint or run folder of ours."""
    return folder.exists(RECORD_NAME) or latest_checkpoint(folder) is not None


def read_record(folder: Storage) -> CheckpointRecord:
    """Read ``checkpoint.json`` of a checkpoint folder, or of the newest one of a run folder.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    try:
        latest = latest_checkpoint(folder)
        name = f"{latest}/{RECORD_NAME}" if latest else RECORD_NAME
        data = folder.read(name)
    except StorageError as error:
        raise CheckpointError(f"{error} (expected a finished checkpoint or run folder)") from error
    try:
        return CheckpointRecord.model_validate_json(data)
    except ValidationError as error:
        raise CheckpointError(f"{folder.url_of(name)}: {describe_validation_error(error)}") from error


def restore_model(root: Storage, name: str, record: CheckpointRecord, model: AVModel) -> None:
    """Load the model's weights of a checkpoint.

    Raises:
        CheckpointError: the file is damaged or has other tensors.
    """
    data = _read_checked(root, name, WEIGHTS_NAME, record)
    try:
        model.load_state_dict(safetensors.torch.load(data))
    except RuntimeError as error:
        raise CheckpointError(f"{root.url_of(name)}/{WEIGHTS_NAME}: does not fit the model: {error}") from error


def restore_trainer_state(root: Storage, name: str, record: CheckpointRecord) -> dict[str, Any]:
    """Read ``trainer.pt`` of a checkpoint.

    Raises:
        CheckpointError: the file is damaged.
    """
    data = _read_checked(root, name, TRAINER_NAME, record)
    state: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return state


def restore_bank(root: Storage, name: str, bank: MemoryBank) -> None:
    """Load the rows that this rank owns; a checkpoint loads at any world size.

    Raises:
        CheckpointError: the snapshot is missing, damaged, or has another number of instances or dimensions.
    """
    rows = [_read_rows(root, name, modality, bank) for modality in MODALITIES]
    bank.load_local(*(torch.from_numpy(of_modality) for of_modality in rows))


def _read_rows(root: Storage, name: str, modality: str, bank: MemoryBank) -> npt.NDArray[np.float32]:
    """This rank's rows of a modality, float32 [len(bank.rows), D]."""
    where = f"{root.url_of(name)}/{BANK_NAME}/{modality}"
    expected = [bank.num_instances, bank.dim]
    try:
        array = _array(zarr.open_group(_bank_store(root, name, create=False), mode="r"), modality)
        if list(array.shape) != expected:
            raise CheckpointError(f"{where}: expected shape {expected}, found {list(array.shape)}")
        rows = np.asarray(array[bank.rows.start : bank.rows.stop], dtype=np.float32)
    except StorageError as error:
        raise CheckpointError(f"{where}: is no memory bank snapshot: {error}") from error
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{where}: is damaged, use an earlier checkpoint: {reason}") from error
    if not np.isfinite(rows).all():
        raise CheckpointError(f"{where}: some of its rows are missing, use an earlier checkpoint")
    return rows


def _array(group: zarr.Group, modality: str) -> zarr.Array[Any]:
    array = group[modality]
    if not isinstance(array, zarr.Array):
        raise CheckpointError(f"memory bank snapshot: {modality} is a group, expected an array")
    return array


def _bank_store(root: Storage, name: str, *, create: bool) -> ObjectStore[Any]:
    return ObjectStore(open_storage(root.url_of(f"{name}/{BANK_NAME}"), create=create).store)


def _bank_arrays(root: Storage, name: str, bank: MemoryBank) -> None:
    store = _bank_store(root, name, create=True)
    group = zarr.open_group(store, mode="w", attributes={"modalities": list(MODALITIES)})
    for modality in MODALITIES:
        group.create_array(
            modality,
            shape=(bank.num_instances, bank.dim),
            chunks=(min(_ROWS_PER_CHUNK, bank.num_instances), bank.dim),
            dtype="float32",
            # Random vectors do not compress; a checksum and NaN for chunks that are not there tell damage instead.
            compressors=Crc32cCodec(),
            fill_value=float("nan"),
        )


def _write_bank(root: Storage, name: str, bank: MemoryBank) -> None:
    group = zarr.open_group(_bank_store(root, name, create=False), mode="r+")
    for modality, rows in zip(MODALITIES, bank.local(), strict=True):
        _array(group, modality)[bank.rows.start : bank.rows.stop] = rows.float().cpu().numpy()


def _torch_bytes(state: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _read_checked(root: Storage, name: str, file: str, record: CheckpointRecord) -> bytes:
    try:
        data = root.read(f"{name}/{file}")
    except StorageError as error:
        raise CheckpointError(str(error)) from error
    if hashlib.sha256(data).hexdigest() != record.sha256.get(file):
        raise CheckpointError(
            f"{root.url_of(name)}/{file}: does not have the checksum in {RECORD_NAME}; the file is damaged, "
            "use an earlier checkpoint"
        )
    return data
