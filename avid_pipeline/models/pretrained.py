"""Loading models: ours, and the published AVID-CMA checkpoints."""

import io
import math
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from avid_pipeline.errors import CheckpointError, StorageError
from avid_pipeline.models.av_model import AVModel
from avid_pipeline.models.state_dict import model_from_state, without_wrapper
from avid_pipeline.shards_spec.storage import open_storage

WEIGHTS_NAME = "model.safetensors"
"""The file of a checkpoint folder that holds the model's weights."""

LATEST_NAME = "latest"
"""The text file of a run folder that names its newest checkpoint folder, relative to the run folder."""

_FILE_SUFFIXES = (".safetensors", ".pth", ".pt", ".tar", ".ckpt", ".bin")

# What reading a damaged or foreign file has been seen to raise: torch checks its archives, not its pickles.
_UNREADABLE = (
    pickle.UnpicklingError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    OverflowError,
    RuntimeError,
    SystemError,  # numpy, for a damaged dtype
    TypeError,
    ValueError,
    struct.error,
    zipfile.BadZipFile,
)


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


def load_pretrained(path_or_url: str | os.PathLike[str], map_location: str | torch.device = "cpu") -> AVModel:
    """Load a model with its weights, in evaluation mode.

    Nothing in the file is executed (``weights_only``). Depth and projection sizes are those of the file.

    Args:
        path_or_url: On disk or at a URL: a published AVID-CMA checkpoint (``.pth.tar``), a
            ``model.safetensors``, a checkpoint folder that holds one, or a run folder, whose file ``latest``
            names the newest checkpoint folder. At a URL, a name that does not end like a file
            (``.safetensors``, ``.pth``, ``.pt``, ``.tar``, ``.ckpt``, ``.bin``) is taken for a folder.
        map_location: Device of the model, whatever device it was saved from.

    Raises:
        CheckpointError: There is no such checkpoint, it cannot be read, or its tensors are not those of an
            :class:`AVModel`.
    """
    folder, name = _find_weights(os.fspath(path_or_url))
    source = f"{folder}/{name}"
    if name.endswith(".safetensors"):
        state = _read_safetensors(folder, name)
    else:
        state = _model_entry(_read_torch_file(folder, name), source)
    model = model_from_state(without_wrapper(state), source)
    return model.to(map_location).eval()


def import_published(path_or_url: str | os.PathLike[str]) -> PublishedCheckpoint:
    """Read the model, memories and partition function of a published AVID-CMA checkpoint.

    Args:
        path_or_url: The ``torch.save``d file, on disk or at a URL.

    Raises:
        CheckpointError: There is no such file, it cannot be read without executing it, or an entry is missing
            or of another kind.
    """
    folder, name = _find_weights(os.fspath(path_or_url))
    source = f"{folder}/{name}"
    if name.endswith(".safetensors"):
        raise CheckpointError(
            f"{source}: this is a checkpoint of this project, and import_published reads only the published "
            "AVID-CMA ones (.pth.tar); use load_pretrained for the model"
        )
    content = _read_torch_file(folder, name)
    criterion = _entry(content, "train_criterion", source)
    if not isinstance(criterion, Mapping):
        raise CheckpointError(f"{source}: `train_criterion` is a {type(criterion).__name__}, expected a dict")
    video_memory = _memory(criterion, "nce_average.view1_mem", source)
    audio_memory = _memory(criterion, "nce_average.view2_mem", source)
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
    return PublishedCheckpoint(
        model={key: tensor.clone() for key, tensor in without_wrapper(_model_entry(content, source)).items()},
        video_memory=video_memory,
        audio_memory=audio_memory,
        partition_function=partition_function,
        epoch=int(_number(content, "epoch", source)),
    )


def read_checkpoint_bytes(path_or_url: str, name: str) -> bytes:
    """Read a file below a folder on disk or a URL; credentials come from the environment.

    Args:
        path_or_url: The folder.
        name: Name of the file, relative to the folder.

    Raises:
        CheckpointError: The file does not exist or cannot be read.
    """
    with _as_checkpoint_error():
        return open_storage(path_or_url).read(name)


def _find_weights(path_or_url: str) -> tuple[str, str]:
    """Find the file that holds the weights: its folder and its name."""
    if "://" in path_or_url and not path_or_url.startswith("file://"):
        parent, _, name = path_or_url.rstrip("/").rpartition("/")
        return (parent, name) if name.endswith(_FILE_SUFFIXES) else _find_in_folder(path_or_url.rstrip("/"))
    path = Path(path_or_url.removeprefix("file://")).expanduser()
    if path.is_dir():
        return _find_in_folder(str(path))
    if not path.exists():
        raise CheckpointError(f"{path}: no such checkpoint; give a checkpoint file, its folder or a run folder")
    return str(path.parent), path.name


def _find_in_folder(folder: str) -> tuple[str, str]:
    if _exists(folder, WEIGHTS_NAME):
        return folder, WEIGHTS_NAME
    if not _exists(folder, LATEST_NAME):
        raise CheckpointError(
            f"{folder}: neither {WEIGHTS_NAME} (a checkpoint folder) nor {LATEST_NAME} (a run folder) inside; "
            "give one of these, or a checkpoint file"
        )
    latest = read_checkpoint_bytes(folder, LATEST_NAME).decode("utf-8", errors="replace").strip()
    relative = PurePosixPath(latest)
    if not latest or relative.is_absolute() or ".." in relative.parts or not latest.isprintable():
        raise CheckpointError(
            f"{folder}/{LATEST_NAME}: expected a checkpoint folder relative to the run folder, such as "
            f"checkpoints/step-00000100, found {latest[:100]!r}; give the checkpoint folder itself"
        )
    if not _exists(folder, f"{relative}/{WEIGHTS_NAME}"):
        raise CheckpointError(
            f"{folder}/{LATEST_NAME}: names {latest}, which holds no {WEIGHTS_NAME}; copy that folder too, or "
            "give another checkpoint folder of this run"
        )
    return f"{folder}/{relative}", WEIGHTS_NAME


def _exists(folder: str, name: str) -> bool:
    with _as_checkpoint_error():
        return open_storage(folder).exists(name)


@contextmanager
def _as_checkpoint_error() -> Iterator[None]:
    try:
        yield
    except StorageError as error:
        raise CheckpointError(f"checkpoint {error}") from error


def _read_safetensors(folder: str, name: str) -> dict[str, Tensor]:
    data = read_checkpoint_bytes(folder, name)
    try:
        state: dict[str, Tensor] = safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise CheckpointError(
            f"{folder}/{name}: not a readable safetensors file ({error}); copy it again from its source"
        ) from error
    return state


def _read_torch_file(folder: str, name: str) -> dict[str, Any]:
    """Read a ``torch.save``d dict, with all tensors on the CPU; on disk, tensors are mapped, not read."""
    source = f"{folder}/{name}"
    remote = "://" in folder
    file = io.BytesIO(read_checkpoint_bytes(folder, name)) if remote else source
    try:
        mapped = not remote and zipfile.is_zipfile(source)  # files from before PyTorch 1.6 cannot be mapped
        with _numpy_scalars_allowed():
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except _UNREADABLE as error:
        raise CheckpointError(_why_unreadable(source, error)) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{source}: holds a {type(content).__name__}, expected a dict with the key `model`, as published "
            "AVID-CMA checkpoints have"
        )
    return content


def _numpy_scalars_allowed() -> AbstractContextManager[None]:
    """Let ``weights_only`` pass numpy's plain numbers, which training scripts put into checkpoints."""
    scalar = np.float64(0).__reduce__()[0]
    allowed: list[Any] = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    allowed += [np.dtype, *(type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8"))]
    return torch.serialization.safe_globals(allowed)


def _why_unreadable(source: str, error: Exception) -> str:
    # The error beneath is the unpickler's own; the one above it mostly advises to load without weights_only.
    if isinstance(error.__context__, pickle.UnpicklingError):
        error = error.__context__
    if refused := re.search(r"GLOBAL (\S+) (?:was not|whose module)", str(error)):
        return (
            f"{source}: holds a Python object ({refused[1]}) that could run code when loaded, so it was "
            "refused. If you trust the file, load it once with torch.load(..., weights_only=False), torch.save "
            "a dict with only its tensors and numbers (epoch, model, train_criterion), and give that file"
        )
    reason = (str(error).strip().splitlines() or [""])[0][:200]
    return f"{source}: not a readable PyTorch file ({type(error).__name__}: {reason}); copy it again from its source"


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


def _memory(criterion: Mapping[str, Any], key: str, source: str) -> Tensor:
    memory = _entry(criterion, key, source)
    if not isinstance(memory, Tensor) or memory.ndim != 2:
        found = list(memory.shape) if isinstance(memory, Tensor) else type(memory).__name__
        raise CheckpointError(f"{source}: `{key}` is {found}, expected a tensor [instances, dimensions]")
    return memory.to(torch.float32, copy=True)


def _number(content: Mapping[str, Any], key: str, source: str) -> float:
    value = _entry(content, key, source)
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{source}: `{key}` is {value!r:.100}, expected one number") from error
    if not math.isfinite(number):
        raise CheckpointError(f"{source}: `{key}` is {number}, expected a finite number; the training diverged")
    return number
