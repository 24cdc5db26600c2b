"""The audio network: a convolutional network over log spectrograms."""

import torch
from torch import Tensor, nn

from avid_pipeline.models.initialisation import initialise, unseen_by_global_generator

AUDIO_LAYERS = ("conv1", "conv2x", "conv3x", "conv4x", "conv5x", "pool")
"""Names of the layers that :meth:`AudioNetwork.features` gives; conv2x to conv5x are block1 to block4."""


class AudioBlock(nn.Module):
    """Two 3x3 convolutions, each with batch norm and ReLU.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        stride: By how much the first convolution shrinks time and frequency.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, input_BCTF: Tensor) -> Tensor:
        """Map [B, in_channels, T, F] to [B, out_channels, T/stride, F/stride], rounded up."""
        x = self.relu(self.bn1(self.conv1(input_BCTF)))
        output: Tensor = self.relu(self.bn2(self.conv2(x)))
        return output


class AudioNetwork(nn.Module):
    """Spectrogram network of ten layers (the audio encoder of the paper).

    Nine convolutions and a global max pool; it takes any number of frames and of frequencies.

    Args:
        generator: Draws the initial weights (see :func:`~avid_pipeline.models.initialisation.initialise`);
            None for torch's global generator.
    """

    out_channels = 512

    def __init__(self, generator: torch.Generator | None = None) -> None:
        super().__init__()
        with unseen_by_global_generator(generator):
            self.conv1 = nn.Sequential(
                nn.Conv2d(1, 64, kernel_size=7, stride=2, padding=3, bias=False),
                nn.BatchNorm2d(64),
                nn.ReLU(inplace=True),
            )
            self.block1 = AudioBlock(64, 64, stride=2)
            self.block2 = AudioBlock(64, 128, stride=2)
            self.block3 = AudioBlock(128, 256, stride=2)
            self.block4 = AudioBlock(256, 512, stride=1)
        initialise(self, generator)

    def forward(self, audio_BCTF: Tensor) -> Tensor:
        """Map spectrograms, float [B, 1, frames, 257], to their globally max-pooled features [B, 512].

        Raises:
            ValueError: The input is not of that shape.
        """
        _check_audio(audio_BCTF)
        x = self.block1(self.conv1(audio_BCTF))
        x = self.block4(self.block3(self.block2(x)))
        return _global_max_pool(x).flatten(1)

    def features(self, audio_BCTF: Tensor) -> dict[str, Tensor]:
        """Give the output of every layer of :data:`AUDIO_LAYERS`, by name.

        Args:
            audio_BCTF: Spectrograms, float [B, 1, frames, 257].

        Returns:
            Layer name -> [B, C, T', F']; ``conv2x`` to ``conv5x`` are the four blocks, and ``pool``, the
            global max pool, is [B, 512, 1, 1].

        Raises:
            ValueError: The input is not of that shape.
        """
        _check_audio(audio_BCTF)
        features = {"conv1": self.conv1(audio_BCTF)}
        features["conv2x"] = self.block1(features["conv1"])
        features["conv3x"] = self.block2(features["conv2x"])
        features["conv4x"] = self.block3(features["conv3x"])
        features["conv5x"] = self.block4(features["conv4x"])
        features["pool"] = _global_max_pool(features["conv5x"])
        return features


def _global_max_pool(x_BCTF: Tensor) -> Tensor:
    # Not AdaptiveMaxPool2d: its gradient on CUDA is added up in no fixed order.
    return x_BCTF.amax(dim=(2, 3), keepdim=True)


def _check_audio(audio: Tensor) -> None:
    if audio.ndim != 4 or audio.shape[1] != 1:
        raise ValueError(f"audio: expected [batch, 1, frames, frequencies], got {list(audio.shape)}")
