"""What learns: a video network with a classifier on top, or linear classifiers of frozen features."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from avid_pipeline.models.video import R2Plus1D

__all__ = ["FinetunedNetwork", "LinearHeads", "dropout_mask"]

# First words of the keys of the generators here, so that no two purposes share a sequence.
_CLASSIFIER, _DROPOUT = 200, 201


class FinetunedNetwork(nn.Module):
    """The video network, and one linear layer on its pooled features, some of which a training step drops.

    Args:
        network: the pre-trained one; it is taken over, not copied.
        num_classes: C.
        seed: of the classifier's first weights.
    """

    def __init__(self, network: R2Plus1D, num_classes: int, seed: int) -> None:
        super().__init__()
        self.network = network
        self.classifier = _make_classifier(network.out_channels, num_classes, seed, 0)

    def forward(self, video_BCTHW: Tensor, mask_BF: Tensor | None = None) -> Tensor:
        """Classify clips.

        Args:
            video_BCTHW: float [B, 3, T, H, W].
            mask_BF: what pooled features are multiplied with, of :func:`dropout_mask`; None to keep all.

        Returns:
            Logits [B, C].
        """
        features_BF = self.network(video_BCTHW)
        logits_BC: Tensor = self.classifier(features_BF if mask_BF is None else features_BF * mask_BF)
        return logits_BC


class _Head(nn.Module):
    """Batch norm and a linear layer."""

    def __init__(self, num_features: int, num_classes: int, seed: int, number: int) -> None:
        super().__init__()
        # Of one pixel: this is BatchNorm1d, in the class that can normalise the clips of several ranks together.
        self.norm = nn.BatchNorm2d(num_features)
        self.classifier = _make_classifier(num_features, num_classes, seed, number)

    def forward(self, features_BF: Tensor) -> Tensor:
        logits_BC: Tensor = self.classifier(self.norm(features_BF[:, :, None, None]).flatten(1))
        return logits_BC


class LinearHeads(nn.Module):
    """One linear classifier, with batch norm before it, on each of some layers.

    Args:
        dims: layer to the number of its features.
        num_classes: C.
        seed: of the classifiers' first weights.
    """

    def __init__(self, dims: Mapping[str, int], num_classes: int, seed: int) -> None:
        super().__init__()
        self.heads = nn.ModuleDict(
            {layer: _Head(dim, num_classes, seed, number) for number, (layer, dim) in enumerate(dims.items())}
        )

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Classify clips by each layer's features, [B, F] by layer; logits [B, C] by layer."""
        return {layer: head(features[layer]) for layer, head in self.heads.items()}


def dropout_mask(share: float, global_batch_size: int, num_features: int, seed: int, step: int) -> Tensor:
    """What the features of a global batch are multiplied with in a training step.

    It is drawn for the whole batch, keyed by (seed, step), and each rank takes the rows of its clips: so results do not
    depend on the number of ranks.

    Args:
        share: of the features that are dropped; the others are scaled up by 1 / (1 - share).
        global_batch_size: B.
        num_features: F.
        seed: of the run.
        step: over all epochs.

    Returns:
        float32 [B, F].
    """
    drawn = np.random.default_rng([_DROPOUT, seed, step]).random((global_batch_size, num_features), dtype=np.float32)
    return torch.from_numpy((drawn >= share) / np.float32(1 - share))


def _make_classifier(num_features: int, num_classes: int, seed: int, number: int) -> nn.Linear:
    """A linear layer with weights uniform within 1 / sqrt(features), as torch draws them, and biases 0.

    The generator is keyed by (seed, number of the classifier).
    """
    layer = nn.Linear(num_features, num_classes, device="meta").to_empty(device="cpu")
    bound = num_features**-0.5
    drawn = np.random.default_rng([_CLASSIFIER, seed, number]).uniform(-bound, bound, layer.weight.shape)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(drawn))
        layer.bias.zero_()
    return layer
