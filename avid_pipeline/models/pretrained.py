"""Loading models: ours, and the published AVID-CMA checkpoints."""

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from avid_pipeline.errors import CheckpointError, StorageError
from avid_pipeline.models.av_model import AVModel
from avid_pipeline.models.state_dict import model_from_state, without_wrapper
from avid_pipeline.models.torch_file import read_torch_dict
from avid_pipeline.shards_spec.storage import is_remote, open_storage

WEIGHTS_NAME = "model.safetensors"
"""The file of a checkpoint folder that holds the model's weights."""

LATEST_NAME = "latest"
"""The text file of a run folder that names its newest checkpoint folder, relative to the run folder."""

_FILE_SUFFIXES = (".safetensors", ".pth", ".pt", ".tar", ".ckpt", ".bin")


@dataclass(frozen=True)
class PublishedCheckpoint:
    """What a published AVID-CMA checkpoint holds, on the CPU and in float32.

    Attributes:
        model: State dict of :class:`AVModel`, names without ``module.``.
        video_memory: Memory of the video embeddings [N, D].
        audio_memory: Memory of the audio embeddings [N, D].
        partition_function: Z of the noise-contrastive loss.
        epoch: Number of the epoch as the file gives it.
    """

    model: dict[str, Tensor]
    video_memory: Tensor
    audio_memory: Tensor
    partition_function: float
    epoch: int


def load_pretrained(
    path_or_url: str | os.PathLike[str],
    map_location: str | torch.device = "cpu",
    *,
    options: Mapping[str, str] | None = None,
) -> AVModel:
    """Load a model with its weights, in evaluation mode.

    Nothing in the file is executed (``weights_only``). Depth and projection sizes are those of the file.

    Args:
        path_or_url: On disk or at a URL: a published AVID-CMA checkpoint (``.pth.tar``), a
            ``model.safetensors``, a checkpoint folder that holds one, or a run folder, whose file ``latest``
            names the newest checkpoint folder. At a URL, a name that does not end like a file
            (``.safetensors``, ``.pth``, ``.pt``, ``.tar``, ``.ckpt``, ``.bin``) is taken for a folder.
        map_location: Device of the model, whatever device it was saved from.
        options: Of the object store, as :func:`~avid_pipeline.shards_spec.storage.open_storage` takes them.

    Raises:
        CheckpointError: There is no such checkpoint, it cannot be read, or its tensors are not those of an
            :class:`AVModel`.
    """
    folder, name = find_weights(os.fspath(path_or_url), options)
    source = f"{folder}/{name}"
    if name.endswith(".safetensors"):
        state = _read_safetensors(folder, name, options)
    else:
        state = _model_entry(_read_torch_file(folder, name, options), source)
    model = model_from_state(without_wrapper(state), source)
    return model.to(map_location).eval()


def import_published(
    path_or_url: str | os.PathLike[str], *, options: Mapping[str, str] | None = None, copy: bool = True
) -> PublishedCheckpoint:
    """Read the model, memories and partition function of a published AVID-CMA checkpoint.

    Args:
        path_or_url: The ``torch.save``d file, on disk or at a URL.
        options: Of the object store, as :func:`~avid_pipeline.shards_spec.storage.open_storage` takes them.
        copy: Copy the tensors. Without, those of a file on disk may be mapped: only what is used is read, but the
            file must not change meanwhile.

    Raises:
        CheckpointError: There is no such file, it cannot be read without executing it, or an entry is missing
            or of another kind.
    """
    folder, name = find_weights(os.fspath(path_or_url), options)
    source = f"{folder}/{name}"
    if name.endswith(".safetensors"):
        raise CheckpointError(
            f"{source}: this is a checkpoint of this project, and import_published reads only the published "
            "AVID-CMA ones (.pth.tar); use load_pretrained for the model"
        )
    content = _read_torch_file(folder, name, options)
    criterion = _entry(content, "train_criterion", source)
    if not isinstance(criterion, Mapping):
        raise CheckpointError(f"{source}: `train_criterion` is a {type(criterion).__name__}, expected a dict")
    video_memory = _memory(criterion, "nce_average.view1_mem", source, copy)
    audio_memory = _memory(criterion, "nce_average.view2_mem", source, copy)
    if video_memory.shape != audio_memory.shape:
        raise CheckpointError(
            f"{source}: the video memory has shape {list(video_memory.shape)} and the audio memory "
            f"{list(audio_memory.shape)}; expected the same, one row per training instance"
        )
    partition_function = _number(criterion, "criterion.avg_exp_score", source)
    if partition_function <= 0:
        raise CheckpointError(
            f"{source}: `criterion.avg_exp_score` is {partition_function}, expected a positive number; "
            "the file was saved before the first training step, use load_pretrained for its model alone"
        )
    model = without_wrapper(_model_entry(content, source))
    return PublishedCheckpoint(
        model={key: tensor.clone() for key, tensor in model.items()} if copy else model,
        video_memory=video_memory,
        audio_memory=audio_memory,
        partition_function=partition_function,
        epoch=int(_number(content, "epoch", source)),
    )


def read_checkpoint_bytes(path_or_url: str, name: str, options: Mapping[str, str] | None = None) -> bytes:
    """Read a file below a folder on disk or a URL.

    Args:
        path_or_url: The folder.
        name: Name of the file, relative to the folder.
        options: Of the object store; credentials also come from the environment.

    Raises:
        CheckpointError: The file does not exist or cannot be read.
    """
    with _as_checkpoint_error():
        return open_storage(path_or_url, options=options).read(name)


def is_checkpoint_file(path_or_url: str) -> bool:
    """Whether this is a checkpoint in one file, rather than a folder; a URL is told by its ending."""
    if is_remote(path_or_url):
        return path_or_url.rstrip("/").endswith(_FILE_SUFFIXES)
    return Path(path_or_url.removeprefix("file://")).expanduser().is_file()


def find_weights(path_or_url: str, options: Mapping[str, str] | None) -> tuple[str, str]:
    """Find the file that holds the weights: its folder, and its name there.

    Args:
        path_or_url: As :func:`load_pretrained` takes it.
        options: Of the object store.

    Raises:
        CheckpointError: There is no such checkpoint.
    """
    if is_remote(path_or_url):
        parent, _, name = path_or_url.rstrip("/").rpartition("/")
        return (parent, name) if is_checkpoint_file(path_or_url) else _find_in_folder(path_or_url.rstrip("/"), options)
    path = Path(path_or_url.removeprefix("file://")).expanduser()
    if path.is_dir():
        return _find_in_folder(str(path), options)
    if not path.exists():
        raise CheckpointError(f"{path}: no such checkpoint; give a checkpoint file, its folder or a run folder")
    return str(path.parent), path.name


def _find_in_folder(folder: str, options: Mapping[str, str] | None) -> tuple[str, str]:
    if _exists(folder, WEIGHTS_NAME, options):
        return folder, WEIGHTS_NAME
    if not _exists(folder, LATEST_NAME, options):
        raise CheckpointError(
            f"{folder}: neither {WEIGHTS_NAME} (a checkpoint folder) nor {LATEST_NAME} (a run folder) inside; "
            "give one of these, or a checkpoint file"
        )
    latest = read_checkpoint_bytes(folder, LATEST_NAME, options).decode("utf-8", errors="replace").strip()
    relative = PurePosixPath(latest)
    if not latest or relative.is_absolute() or ".." in relative.parts or not latest.isprintable():
        raise CheckpointError(
            f"{folder}/{LATEST_NAME}: expected a checkpoint folder relative to the run folder, such as "
            f"checkpoints/step-00000100, found {latest[:100]!r}; give the checkpoint folder itself"
        )
    if not _exists(folder, f"{relative}/{WEIGHTS_NAME}", options):
        raise CheckpointError(
            f"{folder}/{LATEST_NAME}: names {latest}, which holds no {WEIGHTS_NAME}; copy that folder too, or "
            "give another checkpoint folder of this run"
        )
    return f"{folder}/{relative}", WEIGHTS_NAME


def _exists(folder: str, name: str, options: Mapping[str, str] | None) -> bool:
    with _as_checkpoint_error():
        return open_storage(folder, options=options).exists(name)


@contextmanager
def _as_checkpoint_error() -> Iterator[None]:
    try:
        yield
    except StorageError as error:
        raise CheckpointError(f"checkpoint {error}") from error


def _read_safetensors(folder: str, name: str, options: Mapping[str, str] | None) -> dict[str, Tensor]:
    data = read_checkpoint_bytes(folder, name, options)
    try:
        state: dict[str, Tensor] = safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise CheckpointError(
            f"{folder}/{name}: not a readable safetensors file ({error}); copy it again from its source"
        ) from error
    return state


def _read_torch_file(folder: str, name: str, options: Mapping[str, str] | None) -> dict[str, Any]:
    source = f"{folder}/{name}"
    return read_torch_dict(source, read_checkpoint_bytes(folder, name, options) if is_remote(folder) else None)


def _model_entry(content: Mapping[str, Any], source: str) -> dict[str, Tensor]:
    state = _entry(content, "model", source)
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items()
    ):
        raise CheckpointError(f"{source}: `model` is no dict of names and tensors; the file is of another kind")
    return dict(state)


def _entry(content: Mapping[str, Any], key: str, source: str) -> Any:
    if key not in content:
        found = ", ".join(sorted(map(str, content))[:8]) or "nothing"
        raise CheckpointError(
            f"{source}: the key `{key}` is missing (found {found}); expected a published AVID-CMA checkpoint"
        )
    return content[key]


def _memory(criterion: Mapping[str, Any], key: str, source: str, copy: bool) -> Tensor:
    memory = _entry(criterion, key, source)
    if not isinstance(memory, Tensor) or memory.ndim != 2:
        found = list(memory.shape) if isinstance(memory, Tensor) else type(memory).__name__
        raise CheckpointError(f"{source}: `{key}` is {found}, expected a tensor [instances, dimensions]")
    return memory.to(torch.float32, copy=copy)


def _number(content: Mapping[str, Any], key: str, source: str) -> float:
    value = _entry(content, key, source)
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{source}: `{key}` is {value!r:.100}, expected one number") from error
    if not math.isfinite(number):
        raise CheckpointError(f"{source}: `{key}` is {number}, expected a finite number; the training diverged")
    return number
