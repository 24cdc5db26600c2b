import pytest
import torch

from avid_pipeline.models.audio import AudioNetwork


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 100, 333])
def test_any_number_of_frames(frames):
    network = AudioNetwork().eval()
    assert network(torch.randn(2, 1, frames, 257)).shape == (2, 512)


@pytest.mark.parametrize("shape", [(1, 200, 257), (2, 2, 200, 257)])
def test_other_shapes_are_refused(shape):
    network = AudioNetwork()
    for method in (network, network.features):
        with pytest.raises(ValueError, match=r"expected \[batch, 1, frames, frequencies\], got \["):
            method(torch.zeros(shape))
