"""Files of ``torch.save``, read without running anything that they hold."""

import io
import pickle
import re
import struct
import zipfile
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch

from avid_pipeline.errors import CheckpointError

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


def read_torch_dict(source: str, data: bytes | None) -> dict[str, Any]:
    """Read a ``torch.save``d dict, with all tensors on the CPU; on disk, tensors are mapped, not read.

    Args:
        source: The file's path, or its address where ``data`` are given.
        data: Its content, for a file that is not on disk.

    Raises:
        CheckpointError: It cannot be read without executing it, or holds something else.
    """
    try:
        mapped = data is None and zipfile.is_zipfile(source)  # files from before PyTorch 1.6 cannot be mapped
        with _numpy_scalars_allowed():
            file = source if data is None else io.BytesIO(data)
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
