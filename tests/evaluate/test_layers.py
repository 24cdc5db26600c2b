"""Features by name: their sizes, and that each network runs once."""

import pytest
import torch
import torch.nn.functional as F

from avid_pipeline.errors import ConfigError
from avid_pipeline.evaluate.layers import compute_features, feature_dim, known_features, modalities_of
from avid_pipeline.models import AVModel


@pytest.fixture(scope="module")
def model():
    return AVModel(10, (16, 8), torch.Generator().manual_seed(0)).eval()


@pytest.fixture(scope="module")
def clips():
    generator = torch.Generator().manual_seed(1)
    return {
        "video": torch.randn(2, 3, 8, 112, 112, generator=generator),
        "audio": torch.randn(2, 1, 200, 257, generator=generator),
    }


def test_every_name_has_the_size_it_says(model, clips):
    with torch.inference_mode():
        found = compute_features(model, known_features(), clips)
    assert list(found) == list(known_features())
    assert {name: values.shape for name, values in found.items()} == {
        name: (2, feature_dim(name, model)) for name in known_features()
    }
    # The numbers of the paper's linear probes.
    for modality in ("video", "audio"):
        sizes = [found[f"{modality}.{layer}"].shape[1] for layer in ("conv2x", "conv3x", "conv4x", "conv5x")]
        assert sizes == [9216, 8192, 9216, 8192]


def test_they_are_those_of_the_model(model, clips):
    with torch.inference_mode():
        found = compute_features(model, ("audio.conv4x", "video", "video.pool", "video.conv5x"), clips)
        layers = model.video_model.features(clips["video"])
        assert torch.equal(found["video"], model.embed_video(clips["video"]))
        assert torch.equal(found["video.pool"], model.video_model(clips["video"]))
        expected = layers["conv5x"].amax(dim=2)  # 4 x 4 already at 112 pixels
        assert torch.equal(found["video.conv5x"].view(2, 512, 4, 4), expected)
        sound = model.audio_model.features(clips["audio"])["conv4x"]
        assert torch.equal(found["audio.conv4x"], F.adaptive_max_pool2d(sound, (6, 6)).flatten(1))


def test_networks_that_are_not_needed_do_not_run(model, clips):
    with torch.inference_mode():
        alone = compute_features(model, ("audio",), {"audio": clips["audio"]})
        assert torch.equal(alone["audio"], model.embed_audio(clips["audio"]))
    assert modalities_of(("audio.pool",)) == ("audio",)
    assert modalities_of(("audio", "video.conv2x")) == ("video", "audio")


@pytest.mark.parametrize("names", [(), ("picture",), ("video.conv1",), ("video", "video")])
def test_other_names_are_clear_errors(names):
    with pytest.raises(ConfigError, match=r"features: expected some of video, audio, video\.conv2x"):
        modalities_of(names)
