"""Features of a model by name: its embeddings, and its layers pooled to some thousand numbers a clip."""

from collections.abc import Mapping, Sequence

import torch.nn.functional as F  # noqa: N812 (the name everyone knows)
from torch import Tensor

from avid_pipeline.errors import ConfigError
from avid_pipeline.models import AVModel
from avid_pipeline.models.video import WIDTHS
from avid_pipeline.shards_spec.manifest import Modality

__all__ = ["LAYERS", "POOLED_SIDE", "compute_features", "feature_dim", "known_features", "modalities_of"]

POOLED_SIDE = {"conv2x": 12, "conv3x": 8, "conv4x": 6, "conv5x": 4}
"""Layer to the side of the square that its features are max-pooled to (paper, section 5): for 9216, 8192, 9216 and
8192 numbers of both networks. Time is pooled to 1 in the video network."""

LAYERS = tuple(POOLED_SIDE)
_POOL = "pool"
_CHANNELS = dict(zip(LAYERS, WIDTHS, strict=True))


def known_features() -> tuple[str, ...]:
    """All names of features.

    ``video`` and ``audio`` are embeddings, ``video.conv4x`` and the like pooled layers, ``video.pool`` the 512 numbers
    that the projection head sees.
    """
    layers = (*LAYERS, _POOL)
    return ("video", "audio", *(f"{modality}.{layer}" for modality in ("video", "audio") for layer in layers))


def modalities_of(names: Sequence[str]) -> tuple[Modality, ...]:
    """What must be read for these features, video first.

    Raises:
        ConfigError: there is none, a name is unknown, or is there twice.
    """
    unknown = [name for name in names if name not in known_features()]
    if not names or unknown or len(set(names)) != len(names):
        found = ", ".join(unknown or names) or "none"
        raise ConfigError(f"features: expected some of {', '.join(known_features())}, each once; found {found}")
    chosen = {name.partition(".")[0] for name in names}
    both: tuple[Modality, ...] = ("video", "audio")
    return tuple(modality for modality in both if modality in chosen)


def feature_dim(name: str, model: AVModel) -> int:
    """How many numbers a clip's feature of this name has."""
    _, _, layer = name.partition(".")
    if not layer:
        return model.projection[-1]
    return WIDTHS[-1] if layer == _POOL else _CHANNELS[layer] * POOLED_SIDE[layer] ** 2


def compute_features(model: AVModel, names: Sequence[str], clips: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Features of a batch of clips, each network run once.

    Args:
        model: in the mode it is to be used in.
        names: of :func:`known_features`.
        clips: ``video`` [B, 3, T, H, W] and ``audio`` [B, 1, frames, 257], as far as the names need them.

    Returns:
        Name to [B, :func:`feature_dim`]; embeddings are not normalised.
    """
    found: dict[str, Tensor] = {}
    for modality in modalities_of(names):
        network = model.video_model if modality == "video" else model.audio_model
        head = model.video_proj if modality == "video" else model.audio_proj
        wanted = {name.partition(".")[2]: name for name in names if name.partition(".")[0] == modality}
        if wanted.keys() <= {"", _POOL}:
            layers = {_POOL: network(clips[modality])}
        else:
            layers = network.features(clips[modality])
        for layer, name in wanted.items():
            found[name] = head(layers[_POOL].flatten(1)) if not layer else _pooled(layer, layers[layer])
    return {name: found[name] for name in names}


def _pooled(layer: str, features: Tensor) -> Tensor:
    """Global or max-pooled features, [B, F]."""
    side = POOLED_SIDE.get(layer)
    if side is None:
        return features.flatten(1)
    if features.ndim == 5:
        return F.adaptive_max_pool3d(features, (1, side, side)).flatten(1)
    return F.adaptive_max_pool2d(features, (side, side)).flatten(1)
