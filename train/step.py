"""One training step: forward, loss, backward, optimizer."""

import contextlib
import math
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from avid_pipeline.clips.batch import ClipBatch
from avid_pipeline.errors import ConfigError
from avid_pipeline.train.config import TrainConfig
from avid_pipeline.train.state import TrainState

__all__ = ["train_step"]


def train_step(
    network: nn.Module,
    state: TrainState,
    batch: ClipBatch,
    rows: Tensor,
    config: TrainConfig,
    device: torch.device,
    rate: float,
) -> dict[str, float]:
    """Train on one batch, in ``compute.accumulate`` parts whose gradients add up to those of the whole.

    Args:
        network: the model, wrapped for this process group.
        state: of the run; its model, optimizer, loss and step change.
        batch: this rank's clips.
        rows: their rows of the memory bank, int64 [B].
        config: the run.
        device: where the network is.
        rate: learning rate of this step.

    Returns:
        ``loss/total`` and every term of the loss, means over the parts; ``gradient_norm`` where it is limited.

    Raises:
        ConfigError: the loss is not finite; the weights are as they were.
    """
    parts = config.compute.accumulate
    dtype = torch.float64 if config.compute.precision == "float64" else torch.float32
    videos, sounds = (
        clips.to(device, dtype, non_blocking=True).chunk(parts) for clips in (batch["video"], batch["audio"])
    )
    # On the CPU, where the loss checks them without waiting for the GPU.
    indices = rows.chunk(parts)
    values: dict[str, float] = {}
    state.optimizer.zero_grad(set_to_none=True)
    for part in range(parts):
        is_last = part == parts - 1
        with _gradients_exchanged(network, is_last):
            with torch.autocast(device.type, torch.bfloat16, enabled=config.compute.precision == "bfloat16"):
                video_emb, audio_emb = network(videos[part], sounds[part])
            loss, terms = state.criterion(video_emb, audio_emb, indices[part], end_of_step=is_last)
            terms = {"total": _finite(float(loss.detach()), state.step), **terms}
            (loss / parts).backward()  # type: ignore[no-untyped-call]
        for name, value in terms.items():
            values[f"loss/{name}"] = values.get(f"loss/{name}", 0.0) + value / parts
    limit = config.optimizer.clip_gradients
    if limit is not None:
        values["gradient_norm"] = float(nn.utils.clip_grad_norm_(state.model.parameters(), limit))
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    state.optimizer.step()
    state.step += 1
    return values


def _gradients_exchanged(network: nn.Module, is_last: bool) -> AbstractContextManager[None]:
    """Ranks exchange gradients once a step, with its last part."""
    if is_last or not isinstance(network, DistributedDataParallel):
        return contextlib.nullcontext()
    skipped: AbstractContextManager[None] = network.no_sync()
    return skipped


def _finite(loss: float, step: int) -> float:
    if not math.isfinite(loss):
        raise ConfigError(
            f"the loss became {loss} at step {step + 1}; lower optimizer.learning_rate, set optimizer.clip_gradients or"
            " look at the data with avid-shards validate; to go on from an earlier checkpoint, remove those after it"
        )
    return loss
