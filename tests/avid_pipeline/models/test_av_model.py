import numpy as np
import pytest
import torch

from avid_pipeline.errors import ConfigError
from avid_pipeline.models import AVModel
from avid_pipeline.models.audio import AUDIO_LAYERS
from avid_pipeline.models.video import VIDEO_LAYERS


def test_state_dict_has_the_published_names_and_shapes(published_shapes):
    shapes = {name: list(tensor.shape) for name, tensor in AVModel().state_dict().items()}
    assert shapes == published_shapes


@torch.no_grad()
def test_embeddings_in_evaluation_mode(golden_model, golden_inputs, golden, assert_golden):
    video_emb, audio_emb = golden_model(*golden_inputs)
    assert_golden(video_emb, golden["video_emb_eval"])
    assert_golden(audio_emb, golden["audio_emb_eval"])


@torch.no_grad()
def test_embeddings_in_training_mode(golden_model, golden_inputs, golden, assert_golden):
    video_emb, audio_emb = golden_model.train()(*golden_inputs)
    assert_golden(video_emb, golden["video_emb_train"])
    assert_golden(audio_emb, golden["audio_emb_train"])


@torch.no_grad()
@pytest.mark.parametrize("modality", ["video", "audio"])
def test_layer_features(modality, golden_model, golden_inputs, golden, assert_golden):
    network, names, clips = {
        "video": (golden_model.video_model, VIDEO_LAYERS, golden_inputs[0]),
        "audio": (golden_model.audio_model, AUDIO_LAYERS, golden_inputs[1]),
    }[modality]
    features = network.features(clips)
    assert tuple(features) == names == ("conv1", "conv2x", "conv3x", "conv4x", "conv5x", "pool")
    checked = 0
    for name in names:
        if f"{modality}_{name}_shape" not in golden:
            continue
        assert list(features[name].shape) == golden[f"{modality}_{name}_shape"].tolist()
        assert_golden(features[name].flatten(2).mean(2), golden[f"{modality}_{name}_mean"])
        checked += 1
    assert checked == {"video": 6, "audio": 5}[modality]
    assert torch.equal(network(clips), features["pool"].flatten(1))


def test_audio_conv1_halves_the_spectrogram_once(golden_model, golden_inputs):
    assert golden_model.audio_model.features(golden_inputs[1])["conv1"].shape == (2, 64, 100, 129)


@torch.no_grad()
def test_embed_one_modality(golden_model, golden_inputs):
    video_emb, audio_emb = golden_model(*golden_inputs)
    assert torch.equal(golden_model.embed_video(golden_inputs[0]), video_emb)
    assert torch.equal(golden_model.embed_audio(golden_inputs[1]), audio_emb)


@torch.no_grad()
def test_channels_last_gives_the_same_embeddings(golden_model, golden_inputs, golden):
    converted = golden_model.to(memory_format=torch.channels_last_3d)
    assert converted is golden_model
    stem = golden_model.video_model.conv1[0].weight
    assert stem.is_contiguous(memory_format=torch.channels_last_3d)
    assert not stem.is_contiguous()
    video, audio = golden_inputs
    for clips in (video, video.to(memory_format=torch.channels_last_3d)):
        # Sums are taken in another order, so errors follow the largest values, not each value.
        for found, name in zip(golden_model(clips, audio), ("video_emb_eval", "audio_emb_eval"), strict=True):
            assert np.abs(found.numpy() - golden[name]).max() < 1e-5 * np.abs(golden[name]).max()
    golden_model.to(memory_format=torch.contiguous_format)
    assert all(parameter.is_contiguous() for parameter in golden_model.parameters())


def test_to_converts_dtype_and_memory_format_together():
    model = AVModel(10).to(torch.float64, memory_format=torch.channels_last_3d)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    assert model.audio_model.conv1[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_every_parameter_gets_a_finite_gradient():
    random = torch.Generator().manual_seed(0)
    model = AVModel(10, generator=random).train()
    video_emb, audio_emb = model(
        torch.randn(2, 3, 8, 56, 56, generator=random), torch.randn(2, 1, 100, 257, generator=random)
    )
    (video_emb.square().sum() + audio_emb.square().sum()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_initial_weights_come_from_the_given_generator_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = AVModel(10, generator=torch.Generator().manual_seed(5)).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second = AVModel(10, generator=torch.Generator().manual_seed(5)).state_dict()
    other = AVModel(10, generator=torch.Generator().manual_seed(6)).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["video_model.conv1.0.weight"], other["video_model.conv1.0.weight"])


def test_initial_weights_follow_the_global_generator_without_one():
    torch.manual_seed(3)
    first = AVModel(10).state_dict()
    torch.manual_seed(3)
    second = AVModel(10).state_dict()
    third = AVModel(10).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["audio_proj.projection.4.weight"], third["audio_proj.projection.4.weight"])


def test_initial_weights_have_the_documented_spread():
    state = AVModel(10, generator=torch.Generator().manual_seed(0)).state_dict()
    expected = {
        "video_model.conv5x.0.spt_conv2.weight": (2 / (512 * 9)) ** 0.5,
        "audio_model.block4.conv1.weight": (2 / (512 * 9)) ** 0.5,
        "video_proj.projection.4.weight": (2 / 512) ** 0.5,
    }
    for name, deviation in expected.items():
        assert state[name].std().item() == pytest.approx(deviation, rel=0.02), name
    assert state["video_proj.projection.0.bias"].abs().max() == 0
    assert torch.equal(state["video_model.conv5x.0.out_bn.weight"], torch.ones(512))


def test_other_projections():
    model = AVModel(10, projection=(32,))
    assert model.video_proj.projection[0].weight.shape == (32, 512)
    assert model.embed_audio(torch.zeros(2, 1, 40, 257)).shape == (2, 32)


@pytest.mark.parametrize("projection", [(), (512, 0), (-1,)])
def test_impossible_projections_are_refused(projection):
    with pytest.raises(ConfigError, match=r"projection: expected one positive size"):
        AVModel(10, projection=projection)
