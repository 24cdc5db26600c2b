import pytest
import torch

from avid_pipeline.errors import ConfigError
from avid_pipeline.models.video import R2Plus1D


@torch.no_grad()
@pytest.mark.parametrize(("depth", "blocks"), [(10, [1, 1, 1, 1]), (18, [2, 2, 2, 2]), (34, [3, 4, 6, 3])])
def test_depths(depth, blocks):
    network = R2Plus1D(depth).eval()
    assert [len(stage) for stage in (network.conv2x, network.conv3x, network.conv4x, network.conv5x)] == blocks
    features = network.features(torch.randn(1, 3, 8, 64, 64))
    assert features["conv5x"].shape == (1, 512, 1, 2, 2)
    assert features["pool"].shape == (1, 512, 1, 1, 1)
    assert torch.isfinite(features["pool"]).all()


def test_only_the_first_blocks_of_stages_3_to_5_have_a_residual_convolution():
    names = {name for name in R2Plus1D(34).state_dict() if "res_conv" in name}
    assert names == {f"conv{stage}x.0.res_conv.weight" for stage in (3, 4, 5)}


@torch.no_grad()
def test_odd_lengths_and_sizes_are_rounded_up():
    features = R2Plus1D(10).eval().features(torch.randn(1, 3, 5, 50, 70))
    assert features["conv1"].shape == (1, 64, 5, 13, 18)
    assert features["conv3x"].shape == (1, 128, 3, 7, 9)
    assert features["conv5x"].shape == (1, 512, 1, 2, 3)


@pytest.mark.parametrize("depth", [0, 9, 50, "18"])
def test_unknown_depth_names_the_allowed_ones(depth):
    with pytest.raises(ConfigError, match=r"video_depth: .*choose one of 10, 18, 34"):
        R2Plus1D(depth)


@pytest.mark.parametrize("shape", [(3, 8, 32, 32), (1, 8, 32, 32, 3)])
def test_other_shapes_are_refused(shape):
    network = R2Plus1D(10)
    for method in (network, network.features):
        with pytest.raises(ValueError, match=r"expected \[batch, 3, time, height, width\], got \["):
            method(torch.zeros(shape))


@pytest.mark.parametrize(("frames", "size"), [(8, 32), (4, 16), (2, 64)])
def test_gradients_in_bfloat16_are_finite_and_the_same_each_time(frames, size):
    # Two frames, as eight are in the fourth stage, and one pixel: cases that torch's own CPU gradient gets wrong.
    model = R2Plus1D(10, torch.Generator().manual_seed(0)).train()
    video = torch.randn(4, 3, frames, size, size, generator=torch.Generator().manual_seed(1))

    def gradients():
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            model(video).float().square().sum().backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    first = gradients()
    assert first.isfinite().all()
    for _ in range(3):
        torch.full((1 << 22,), float("nan"))  # what freed memory may hold
        assert torch.equal(gradients(), first)
