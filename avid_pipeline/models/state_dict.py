"""From the tensors of a checkpoint to the model they belong to."""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from avid_pipeline.errors import CheckpointError
from avid_pipeline.models.av_model import AVModel
from avid_pipeline.models.video import BLOCKS_PER_STAGE

_SHOWN = 3


def without_wrapper(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drop the ``module.`` that :class:`torch.nn.parallel.DistributedDataParallel` puts before names."""
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def model_from_state(state: Mapping[str, Tensor], source: str) -> AVModel:
    """Build the model that a state dict describes, with its weights, on the CPU.

    Depth and projection sizes are read from the tensors' names and shapes; torch's global generator does not
    move. Weights are converted to float32.

    Args:
        state: Names as in :meth:`AVModel.state_dict`, without ``module.``.
        source: Where the tensors came from, for messages.

    Raises:
        CheckpointError: Tensors are missing, unknown or of another shape.
    """
    depth = _infer_depth(state, source)
    projection = _infer_projection(state, source)
    # On "meta" no weight is drawn, only to be overwritten.
    with torch.device("meta"):
        model = AVModel(depth, projection)
    _check_tensors(state, model.state_dict(), source)
    model.to_empty(device="cpu")
    model.load_state_dict(dict(state))
    return model


def _infer_depth(state: Mapping[str, Tensor], source: str) -> int:
    stages: dict[str, set[int]] = {f"conv{stage}x": set() for stage in (2, 3, 4, 5)}
    for name in state:
        if found := re.match(r"video_model\.(conv[2-5]x)\.(\d+)\.", name):
            stages[found[1]].add(int(found[2]))
    blocks = tuple(len(indices) for indices in stages.values())
    for depth, expected in BLOCKS_PER_STAGE.items():
        if blocks == expected:
            return depth
    if not any(blocks):
        raise CheckpointError(
            f"{source}: no tensor of an AVModel inside (none begins with video_model.conv2x); "
            f"found {_listed(sorted(state))}; give a checkpoint of this project or a published AVID-CMA one"
        )
    known = ", ".join(f"{counts} is depth {depth}" for depth, counts in BLOCKS_PER_STAGE.items())
    raise CheckpointError(
        f"{source}: {blocks} residual blocks in video_model.conv2x to conv5x fit no known depth: {known}; "
        "the file is incomplete or of another network"
    )


def _infer_projection(state: Mapping[str, Tensor], source: str) -> tuple[int, ...]:
    sizes: dict[int, int] = {}
    for name, tensor in state.items():
        if found := re.fullmatch(r"video_proj\.projection\.(\d+)\.weight", name):
            if tensor.ndim != 2 or 0 in tensor.shape:
                raise CheckpointError(
                    f"{source}: {name} has shape {list(tensor.shape)}, expected [outputs, inputs]; "
                    "the file is damaged or of another network"
                )
            sizes[int(found[1])] = tensor.shape[0]
    if not sizes:
        raise CheckpointError(
            f"{source}: no video_proj.projection.*.weight inside; expected the whole AVModel with its "
            "projection heads, not the video network alone"
        )
    return tuple(sizes[index] for index in sorted(sizes))


def _check_tensors(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str) -> None:
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    misshapen = [
        f"{name} {list(state[name].shape)} instead of {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    problems = [
        f"{len(names)} {kind}: {_listed(names)}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
        if names
    ]
    if problems:
        raise CheckpointError(
            f"{source}: its tensors are not those of an AVModel; {'; '.join(problems)}. The file is incomplete "
            "or of another network: copy it again, or give a checkpoint of this project or a published one"
        )


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN]) or "nothing"
    return shown + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
