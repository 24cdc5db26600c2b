"""The audio-visual model: two networks and two projection heads."""

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from avid_pipeline.errors import ConfigError
from avid_pipeline.models.audio import AudioNetwork
from avid_pipeline.models.initialisation import initialise, unseen_by_global_generator
from avid_pipeline.models.video import R2Plus1D


class ProjectionHead(nn.Module):
    """Linear layers with ReLU between them (the paper's multi-layer perceptron heads).

    Args:
        in_features: Size of the network's features.
        sizes: Output size of every linear layer.
        generator: Draws the initial weights (see :func:`~avid_pipeline.models.initialisation.initialise`);
            None for torch's global generator.

    Raises:
        ConfigError: There is no layer, or a size is not positive.
    """

    def __init__(self, in_features: int, sizes: Sequence[int], generator: torch.Generator | None = None) -> None:
        super().__init__()
        if not sizes or min(sizes) < 1:
            raise ConfigError(
                f"projection: expected one positive size or more, such as (512, 512, 128), got {tuple(sizes)}"
            )
        layers: list[nn.Module] = []
        with unseen_by_global_generator(generator):
            for size in sizes:
                layers += [nn.Linear(in_features, size), nn.ReLU(inplace=True)]
                in_features = size
        self.projection = nn.Sequential(*layers[:-1])
        initialise(self, generator)

    def forward(self, features_BC: Tensor) -> Tensor:
        """Map features [B, in_features] to embeddings [B, sizes[-1]], not normalised."""
        embeddings: Tensor = self.projection(features_BC)
        return embeddings


class AVModel(nn.Module):
    """Embeds videos and sounds in one space (paper, section 3).

    Its state dict has the names and shapes of the published AVID-CMA checkpoints.

    Initial weights: He's normal distribution (fan-out for convolutions, fan-in for linear layers), biases 0,
    batch norms the identity; see :func:`~avid_pipeline.models.initialisation.initialise`. They are drawn in
    the order video network, audio network, video head, audio head.

    Args:
        video_depth: Depth of the video network: 10, 18 or 34.
        projection: Output sizes of the linear layers of each head; the last is the embeddings' size.
        generator: Draws the initial weights, and then torch's global generator does not move; None for
            torch's global generator.

    Raises:
        ConfigError: The depth or the projection is none that exists.
    """

    def __init__(
        self,
        video_depth: int = 18,
        projection: Sequence[int] = (512, 512, 128),
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.video_depth = video_depth
        self.projection = tuple(projection)
        self.video_model = R2Plus1D(video_depth, generator)
        self.audio_model = AudioNetwork(generator)
        self.video_proj = ProjectionHead(R2Plus1D.out_channels, projection, generator)
        self.audio_proj = ProjectionHead(AudioNetwork.out_channels, projection, generator)

    def forward(self, video_BCTHW: Tensor, audio_BCTF: Tensor) -> tuple[Tensor, Tensor]:
        """Embed videos and sounds.

        Args:
            video_BCTHW: Videos, float [B, 3, T, H, W].
            audio_BCTF: Log spectrograms, float [B, 1, frames, 257].

        Returns:
            Video embeddings and audio embeddings, [B, projection[-1]] each, not normalised.

        Raises:
            ValueError: An input is not of that shape.
        """
        return self.embed_video(video_BCTHW), self.embed_audio(audio_BCTF)

    def embed_video(self, video_BCTHW: Tensor) -> Tensor:
        """Map videos, float [B, 3, T, H, W], to embeddings [B, projection[-1]], not normalised."""
        embeddings: Tensor = self.video_proj(self.video_model(video_BCTHW))
        return embeddings

    def embed_audio(self, audio_BCTF: Tensor) -> Tensor:
        """Map log spectrograms, float [B, 1, frames, 257], to embeddings [B, projection[-1]]."""
        embeddings: Tensor = self.audio_proj(self.audio_model(audio_BCTF))
        return embeddings

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move or convert the model as :meth:`torch.nn.Module.to` does.

        ``memory_format=torch.channels_last_3d`` works too, though this model has 2-d convolutions, for which
        torch alone refuses it: the video network takes ``channels_last_3d`` and the audio network
        ``channels_last``. Inputs may stay in any memory format.
        """
        memory_format: torch.memory_format | None = kwargs.pop("memory_format", None)
        if args or kwargs:
            super().to(*args, **kwargs)
        if memory_format is None:
            return self
        channels_last = memory_format in (torch.channels_last, torch.channels_last_3d)
        # A dict of Any, because torch's type hints do not know this argument.
        video_format: dict[str, Any] = {"memory_format": torch.channels_last_3d}
        audio_format: dict[str, Any] = {"memory_format": torch.channels_last}
        if not channels_last:
            video_format = audio_format = {"memory_format": memory_format}
        self.video_model.to(**video_format)
        self.audio_model.to(**audio_format)
        return self
