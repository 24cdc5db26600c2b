"""Vectors of instances: mean directions of their clips' features."""

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (the name everyone knows)
from torch import Tensor

from avid_pipeline.errors import ConfigError
from avid_pipeline.evaluate.feature_store import FeatureStore

__all__ = ["instance_vectors"]


def instance_vectors(store: FeatureStore, name: str, clips: range | None = None) -> tuple[Tensor, Tensor]:
    """One unit vector for each instance: the mean of its clips' unit vectors, scaled to length 1.

    Args:
        store: the features.
        name: of the feature.
        clips: which clips count; None for all.

    Returns:
        Vectors, float32 [N, F], zeros for an instance none of whose clips could be decoded; and whether one could be,
        bool [N].

    Raises:
        ConfigError: the store has no such feature, or no such clip.
        StorageError: the features are damaged.
    """
    chosen = range(store.clips) if clips is None else clips
    if len(chosen) == 0 or chosen[-1] >= store.clips:
        raise ConfigError(
            f"{store.storage.url}: clips {list(chosen)} of each instance are wanted, but there are {store.clips}; "
            "compute more with --clips"
        )
    found = store.found()[list(chosen)]
    total = torch.zeros(len(store.index), store.description["features"][name])
    for clip, ok in zip(chosen, found, strict=True):
        of_clip = torch.from_numpy(store.features(name, clip).astype(np.float32))
        total += F.normalize(of_clip, dim=1) * torch.from_numpy(ok)[:, None]
    return F.normalize(total, dim=1), torch.from_numpy(found.any(axis=0))
