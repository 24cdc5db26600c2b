"""The model that is evaluated, and what it was trained to see."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from avid_pipeline.clips.settings import ClipSettings
from avid_pipeline.config import parse_config
from avid_pipeline.errors import CheckpointError
from avid_pipeline.evaluate.results import CheckpointIdentity
from avid_pipeline.models import AVModel, load_pretrained
from avid_pipeline.models.pretrained import WEIGHTS_NAME, find_weights
from avid_pipeline.models.published_statistics import published_statistics
from avid_pipeline.models.state_dict import model_from_state
from avid_pipeline.shards_spec.manifest import SpectrogramStatistics
from avid_pipeline.shards_spec.storage import open_storage
from avid_pipeline.train.checkpoint import RECORD_NAME, read_record, read_weights

__all__ = ["EvaluatedModel", "open_checkpoint"]


@dataclass(frozen=True)
class EvaluatedModel:
    """A model and how its clips are made.

    Attributes:
        model: on the device that :func:`open_checkpoint` was asked for, in evaluation mode.
        clip: length and size of the clips it was trained on; the paper's where that is not known.
        statistics: what sound is normalised with; None where that is not known, for those of the data.
        identity: what results say of the checkpoint.
    """

    model: AVModel
    clip: ClipSettings
    statistics: SpectrogramStatistics | None
    identity: CheckpointIdentity


def open_checkpoint(
    checkpoint: str,
    options: Mapping[str, str] | None = None,
    *,
    random_weights: int | None = None,
    device: torch.device | None = None,
) -> EvaluatedModel:
    """Load what ``avid-evaluate`` calls a CHECKPOINT.

    Args:
        checkpoint: run folder (its newest checkpoint), checkpoint folder, published ``.pth.tar`` file, or weights
            alone (``.safetensors``); a path or URL.
        options: of the object store.
        random_weights: seed of random weights that take the place of the checkpoint's: the baseline of a network that
            has learned nothing. None for the checkpoint's own.
        device: of the model; the CPU by default.

    Raises:
        CheckpointError: there is no such checkpoint, it is damaged, or of another architecture.
        StorageError: it is there and cannot be read now.
    """
    folder, name = find_weights(checkpoint, options)
    found = _of_ours(folder, options) if name == WEIGHTS_NAME else None
    found = found or _of_a_file(checkpoint, folder, name, options)
    if random_weights is not None:
        generator = torch.Generator().manual_seed(random_weights)
        model = AVModel(found.model.video_depth, found.model.projection, generator).eval()
        identity = CheckpointIdentity(
            path=f"random weights, seed {random_weights}: R(2+1)D-{model.video_depth}, projection "
            + "-".join(map(str, model.projection)),
            sha256=None,
            kind="random",
            step=None,
        )
        found = replace(found, model=model, identity=identity)
    found.model.to(device or torch.device("cpu"))
    return found


def _of_ours(folder: str, options: Mapping[str, str] | None) -> EvaluatedModel | None:
    """A checkpoint folder with its record; None where the weights lie alone."""
    root = open_storage(folder, options=options)
    if not root.exists(RECORD_NAME):
        return None
    record = read_record(root, "")
    model = model_from_state(read_weights(root, "", record), root.url_of(WEIGHTS_NAME)).eval()
    clip = ClipSettings()
    if record.config is not None:
        if "clip" not in record.config:
            raise CheckpointError(f"{folder}: its record has no clip settings; it was written by another release")
        clip = parse_config(record.config["clip"], ClipSettings, folder)
    identity = CheckpointIdentity(
        path=folder,
        sha256=record.sha256[WEIGHTS_NAME],
        kind="ours" if record.stream is not None else "published",
        step=int(record.stream["step"]) if record.stream is not None else None,
    )
    return EvaluatedModel(model, clip, record.spectrogram_statistics, identity)


def _of_a_file(checkpoint: str, folder: str, name: str, options: Mapping[str, str] | None) -> EvaluatedModel:
    model = load_pretrained(checkpoint, options=options)
    root = open_storage(folder, options=options)
    sha256 = hashlib.sha256()
    for piece in root.chunks(name):
        sha256.update(piece)
    published = Path(name).suffix != ".safetensors"
    identity = CheckpointIdentity(
        path=checkpoint, sha256=sha256.hexdigest(), kind="published" if published else "weights", step=None
    )
    return EvaluatedModel(model, ClipSettings(), published_statistics() if published else None, identity)
