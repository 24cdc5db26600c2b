"""Writing, reading and removing files of checkpoint folders."""

import hashlib
import io
import pickle
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from avid_pipeline import __version__
from avid_pipeline.errors import CheckpointError, StorageError
from avid_pipeline.models.pretrained import WEIGHTS_NAME
from avid_pipeline.shards_spec.storage import WRITING_PREFIX, Storage
from avid_pipeline.train.checkpoint_record import (
    BANK_NAME,
    RECORD_NAME,
    TRAINER_NAME,
    CheckpointRecord,
    file_of,
    list_folders,
    record_bytes,
    step_of,
)

DAMAGED_RECORD_NAME = "checkpoint.damaged.json"
_OURS = {RECORD_NAME, DAMAGED_RECORD_NAME, TRAINER_NAME, WEIGHTS_NAME, BANK_NAME}
_DELETED_AT_ONCE = 8


def write_durably(root: Storage, name: str, data: bytes) -> None:
    """Write a name at once, on disk so that it outlives a machine that loses power.

    Raises:
        StorageError: the root cannot be written.
    """
    if root.local_root is None:
        root.write(name, data)
    else:
        root.write_pieces(name, [data], len(data))


def write_files(
    root: Storage, name: str, weights: Mapping[str, Tensor], trainer_state: Mapping[str, Any]
) -> dict[str, str]:
    """Write ``trainer.pt`` and ``model.safetensors`` of a checkpoint; returns their checksums.

    Raises:
        StorageError: the root cannot be written.
    """
    buffer = io.BytesIO()
    torch.save(dict(trainer_state), buffer)
    on_cpu = {key: tensor.detach().contiguous().cpu() for key, tensor in weights.items()}
    files = {TRAINER_NAME: buffer.getvalue(), WEIGHTS_NAME: safetensors.torch.save(on_cpu)}
    for file, data in files.items():
        write_durably(root, file_of(name, file), data)
    return {file: hashlib.sha256(data).hexdigest() for file, data in files.items()}


def write_record(root: Storage, name: str, record: CheckpointRecord) -> None:
    """Write ``checkpoint.json``, which makes a checkpoint complete.

    Raises:
        StorageError: the root cannot be written.
    """
    write_durably(root, file_of(name, RECORD_NAME), record_bytes(record))


def current_versions() -> dict[str, str]:
    """Versions that a record names."""
    return {"avid-pipeline": __version__, "torch": torch.__version__}


def read_checked(root: Storage, name: str, file: str, record: CheckpointRecord) -> bytes:
    """Read a file of a checkpoint and compare it with its checksum.

    Raises:
        CheckpointError: it is missing or damaged.
        StorageError: it is there and cannot be read now.
    """
    try:
        data = root.read(file_of(name, file))
    except StorageError as error:
        if root.exists(file_of(name, file)):
            raise
        raise CheckpointError(str(error)) from error
    if hashlib.sha256(data).hexdigest() != record.sha256.get(file):
        raise CheckpointError(
            f"{root.url_of(file_of(name, file))}: does not have the checksum in {RECORD_NAME}; the file is damaged, "
            "use an earlier checkpoint"
        )
    return data


def read_weights(root: Storage, name: str, record: CheckpointRecord) -> dict[str, Tensor]:
    """Read ``model.safetensors`` of a checkpoint.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    state: dict[str, Tensor] = safetensors.torch.load(read_checked(root, name, WEIGHTS_NAME, record))
    return state


def read_trainer_state(root: Storage, name: str, record: CheckpointRecord) -> dict[str, Any]:
    """Read ``trainer.pt`` of a checkpoint, tensors on the CPU.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    data = read_checked(root, name, TRAINER_NAME, record)
    try:
        state: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{root.url_of(file_of(name, TRAINER_NAME))}: holds objects other than tensors and plain values, which are "
            f"not loaded: {str(error).splitlines()[0]}"
        ) from error
    return state


def clear_folder(root: Storage, name: str) -> None:
    """Remove our files of a checkpoint, its record first, and its folder if nothing else is in it.

    Raises:
        StorageError: something cannot be removed.
    """
    root.delete(file_of(name, RECORD_NAME))
    folder = root.local_path(name)
    if folder is None:
        names = [file_of(name, file) for file in _OURS] + list(root.names(file_of(name, BANK_NAME)))
        with ThreadPoolExecutor(_DELETED_AT_ONCE) as pool:
            list(pool.map(root.delete, names))
        return
    # Not by way of the store, which hides what a killed write leaves.
    try:
        for path in list(folder.iterdir()) if folder.is_dir() else []:
            if _is_ours(path.name):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        if name and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    except OSError as error:
        raise StorageError(f"{error.filename or folder}: cannot remove: {error.strerror}") from error


def remove_old(root: Storage, saved: str, keep: int) -> None:
    """Remove checkpoints before the one just saved, so that ``keep`` stay, and remains of saves that were killed.

    Raises:
        StorageError: something cannot be removed.
    """
    before = {name: complete for name, complete in list_folders(root).items() if step_of(name) < step_of(saved)}
    whole = [name for name, complete in before.items() if complete]
    kept = whole[len(whole) - (keep - 1) :] if keep > 1 else []
    for name in before:
        if name not in kept:
            clear_folder(root, name)


def set_aside(root: Storage, name: str) -> None:
    """Make a damaged checkpoint count as incomplete; all its files stay, its record under another name.

    Raises:
        StorageError: the root cannot be written.
    """
    if root.exists(file_of(name, RECORD_NAME)):
        root.write(file_of(name, DAMAGED_RECORD_NAME), root.read(file_of(name, RECORD_NAME)))
        root.delete(file_of(name, RECORD_NAME))


def _is_ours(file: str) -> bool:
    """Whether a file or folder in a checkpoint folder is one that we write, finished or not."""
    if file.startswith(WRITING_PREFIX):
        return file.endswith(tuple(_OURS))
    return re.sub(r"#\d+$", "", file) in _OURS  # obstore's name for a file that it is writing
