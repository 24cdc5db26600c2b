"""The video network: R(2+1)D, where each 3-d convolution is one over space and then one over time."""

import torch
from torch import Tensor, nn

from avid_pipeline.errors import ConfigError
from avid_pipeline.models.initialisation import initialise, unseen_by_global_generator

BLOCKS_PER_STAGE = {10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}
"""Depth of the network -> residual blocks in conv2x, conv3x, conv4x and conv5x."""

WIDTHS = (64, 128, 256, 512)
"""Channels of conv2x, conv3x, conv4x and conv5x."""

VIDEO_LAYERS = ("conv1", "conv2x", "conv3x", "conv4x", "conv5x", "pool")
"""Names of the layers that :meth:`R2Plus1D.features` gives, first to last."""


class R2Plus1DBlock(nn.Module):
    """A residual block of two (spatial, temporal) pairs of convolutions.

    The input is added before the last batch norm; where the shape changes it goes through a strided
    1x1x1 convolution without batch norm.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output, and of everything between.
        stride: By how much time, height and width shrink.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.spt_conv1 = _spatial(in_channels, out_channels, stride)
        self.spt_bn1 = nn.BatchNorm3d(out_channels)
        self.tmp_conv1 = _temporal(out_channels, stride)
        self.tmp_bn1 = nn.BatchNorm3d(out_channels)
        self.spt_conv2 = _spatial(out_channels, out_channels, 1)
        self.spt_bn2 = nn.BatchNorm3d(out_channels)
        self.tmp_conv2 = _temporal(out_channels, 1)
        self.out_bn = nn.BatchNorm3d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.res_conv: nn.Conv3d | None = None
        if stride != 1 or in_channels != out_channels:
            self.res_conv = nn.Conv3d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False)

    def forward(self, input_BCTHW: Tensor) -> Tensor:
        """Map [B, in_channels, T, H, W] to [B, out_channels, T/stride, H/stride, W/stride], rounded up."""
        x = self.relu(self.spt_bn1(self.spt_conv1(input_BCTHW)))
        x = self.relu(self.tmp_bn1(self.tmp_conv1(x)))
        x = self.relu(self.spt_bn2(self.spt_conv2(x)))
        x = self.tmp_conv2(x)
        shortcut = input_BCTHW if self.res_conv is None else self.res_conv(input_BCTHW)
        output: Tensor = self.relu(self.out_bn(x + shortcut))
        return output


class R2Plus1D(nn.Module):
    """R(2+1)D video network (the video encoder of the paper).

    Args:
        depth: 10, 18 or 34: see :data:`BLOCKS_PER_STAGE`.
        generator: Draws the initial weights (see :func:`~avid_pipeline.models.initialisation.initialise`);
            None for torch's global generator.

    Raises:
        ConfigError: The depth is none of those.
    """

    out_channels = WIDTHS[-1]

    def __init__(self, depth: int = 18, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if depth not in BLOCKS_PER_STAGE:
            allowed = ", ".join(map(str, BLOCKS_PER_STAGE))
            raise ConfigError(f"video_depth: {depth!r} is not a depth of R(2+1)D; choose one of {allowed}")
        self.depth = depth
        blocks = BLOCKS_PER_STAGE[depth]
        with unseen_by_global_generator(generator):
            self.conv1 = nn.Sequential(
                _Convolution(3, 64, kernel_size=(3, 7, 7), stride=(1, 2, 2), padding=(1, 3, 3), bias=False),
                nn.BatchNorm3d(64),
                nn.ReLU(inplace=True),
                nn.MaxPool3d(kernel_size=(1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1)),
            )
            self.conv2x = _stage(64, WIDTHS[0], blocks[0], stride=1)
            self.conv3x = _stage(WIDTHS[0], WIDTHS[1], blocks[1], stride=2)
            self.conv4x = _stage(WIDTHS[1], WIDTHS[2], blocks[2], stride=2)
            self.conv5x = _stage(WIDTHS[2], WIDTHS[3], blocks[3], stride=2)
        initialise(self, generator)

    def forward(self, video_BCTHW: Tensor) -> Tensor:
        """Map videos, float [B, 3, T, H, W], to their globally max-pooled features [B, 512].

        Raises:
            ValueError: The input is not of that shape.
        """
        _check_video(video_BCTHW)
        x = self.conv2x(self.conv1(video_BCTHW))
        x = self.conv5x(self.conv4x(self.conv3x(x)))
        return _global_max_pool(x).flatten(1)

    def features(self, video_BCTHW: Tensor) -> dict[str, Tensor]:
        """Give the output of every layer of :data:`VIDEO_LAYERS`, by name.

        Args:
            video_BCTHW: Videos, float [B, 3, T, H, W].

        Returns:
            Layer name -> [B, C, T', H', W']; ``conv1`` is taken behind its max pool, and ``pool``, the global
            max pool, is [B, 512, 1, 1, 1].

        Raises:
            ValueError: The input is not of that shape.
        """
        _check_video(video_BCTHW)
        features = {"conv1": self.conv1(video_BCTHW)}
        features["conv2x"] = self.conv2x(features["conv1"])
        features["conv3x"] = self.conv3x(features["conv2x"])
        features["conv4x"] = self.conv4x(features["conv3x"])
        features["conv5x"] = self.conv5x(features["conv4x"])
        features["pool"] = _global_max_pool(features["conv5x"])
        return features


class _Convolution(nn.Conv3d):
    """A convolution that is right on the CPU in bfloat16 too."""

    def forward(self, input: Tensor) -> Tensor:
        """See :class:`torch.nn.Conv3d`."""
        tiny = any(width > 1 and size <= 2 for width, size in zip(self.kernel_size, input.shape[2:], strict=True))
        if tiny and input.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            # For such inputs (two frames, one pixel) torch 2.13's bfloat16 weight gradient is what was left in memory:
            # infinite, NaN, another one each time.
            with torch.autocast("cpu", enabled=False):
                return super().forward(input.float())
        return super().forward(input)


def _spatial(in_channels: int, out_channels: int, stride: int) -> nn.Conv3d:
    return _Convolution(
        in_channels,
        out_channels,
        kernel_size=(1, 3, 3),
        stride=(1, stride, stride),
        padding=(0, 1, 1),
        bias=False,
    )


def _temporal(channels: int, stride: int) -> nn.Conv3d:
    return _Convolution(channels, channels, kernel_size=(3, 1, 1), stride=(stride, 1, 1), padding=(1, 0, 0), bias=False)


def _stage(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = R2Plus1DBlock(in_channels, out_channels, stride)
    return nn.Sequential(first, *(R2Plus1DBlock(out_channels, out_channels) for _ in range(blocks - 1)))


def _global_max_pool(x_BCTHW: Tensor) -> Tensor:
    # Not AdaptiveMaxPool3d: its gradient on CUDA is added up in no fixed order.
    return x_BCTHW.amax(dim=(2, 3, 4), keepdim=True)


def _check_video(video: Tensor) -> None:
    if video.ndim != 5 or video.shape[1] != 3:
        raise ValueError(f"video: expected [batch, 3, time, height, width], got {list(video.shape)}")
