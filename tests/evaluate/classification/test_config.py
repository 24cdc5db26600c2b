from pathlib import Path

import pytest

from avid_pipeline.config import load_config, parse_config
from avid_pipeline.errors import ConfigError
from avid_pipeline.evaluate.classification.config import FinetuneConfig, LinearConfig
from avid_pipeline.evaluate.layers import known_features

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
SMALL = {"epochs": 1, "data": {"batch_size": 4}, "optimizer": {"learning_rate": 1e-3}}

# frames, batch, clips per video for training and tests, brightness = contrast = saturation, epochs, milestones
PUBLISHED = {
    "ucf101-8frames": (8, 64, 10, 5, 0.4, 16, (6, 10, 14)),
    "ucf101-32frames": (32, 32, 5, 5, 0.4, 16, (6, 10, 14)),
    "hmdb51-8frames": (8, 64, 25, 1, 1.0, 10, (3, 6, 8)),
    "hmdb51-32frames": (32, 32, 10, 1, 1.0, 10, (3, 6, 8)),
}


@pytest.mark.parametrize("path", sorted((CONFIGS / "finetune").glob("*.yaml")), ids=lambda path: path.stem)
def test_finetuning_configs_load(path):
    assert load_config(path, FinetuneConfig).epochs >= 1


@pytest.mark.parametrize("path", sorted((CONFIGS / "linear").glob("*.yaml")), ids=lambda path: path.stem)
def test_linear_configs_load(path):
    assert set(load_config(path, LinearConfig).features.values()) <= set(known_features())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_finetuning(name):
    config = load_config(CONFIGS / "finetune" / f"{name}.yaml", FinetuneConfig)
    frames, batch, train, test, colour, epochs, milestones = PUBLISHED[name]
    assert config.clip.num_frames == frames
    assert (config.clip.fps, config.clip.crop_size) == (16, 224)
    assert (config.data.batch_size, config.data.clips_per_instance) == (batch, train)
    assert config.test.clips_per_instance == test
    assert (config.test.clip_level_clips, config.test.video_level_clips) == (25, 10)
    augmentation = config.augmentation
    assert (augmentation.brightness, augmentation.contrast, augmentation.saturation) == (colour,) * 3
    assert augmentation.hue == 0.2
    assert (augmentation.crop, augmentation.area) == ("multi_scale", (0.08, 1.0))
    optimizer = config.optimizer
    assert (optimizer.name, optimizer.learning_rate, optimizer.weight_decay) == ("adam", 1e-4, 0.0)
    assert (config.epochs, optimizer.schedule, optimizer.milestones) == (epochs, "multistep", milestones)
    assert optimizer.gamma == 0.3
    assert (config.classifier_epochs, config.dropout) == (5, 0.5)


def test_published_linear_probe():
    config = load_config(CONFIGS / "linear" / "kinetics.yaml", LinearConfig)
    assert config.modality == "video"
    assert config.layers == ("conv2x", "conv3x", "conv4x", "conv5x")
    assert (config.clip.num_frames, config.clip.crop_size) == (8, 224)
    assert config.augmentation.crop == "resize"
    assert (config.data.batch_size, config.epochs) == (128, 12)
    optimizer = config.optimizer
    assert (optimizer.name, optimizer.learning_rate, optimizer.gamma) == ("adam", 1e-4, 0.1)
    assert optimizer.milestones == (6, 9)


def test_sound_is_probed_with_two_seconds():
    config = load_config(CONFIGS / "linear" / "esc50.yaml", LinearConfig)
    assert config.features["conv5x"] == "audio.conv5x"
    assert config.clip.audio_seconds == 2.0


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (FinetuneConfig, {"dropout": 1.0}, "dropout"),
        (FinetuneConfig, {"layers": ["conv2x"]}, "layers: unknown key"),
        (FinetuneConfig, {"clip": {"modalities": ["video"]}}, "clip.modalities has no meaning here"),
        (LinearConfig, {"layers": ["conv2x", "conv2x"]}, "expected each once"),
        (LinearConfig, {"layers": ["conv6x"]}, "layers.0"),
        (LinearConfig, {"layers": []}, "layers"),
        (LinearConfig, {"modality": "both"}, "modality"),
        (LinearConfig, {"data": {"batch_size": 1}}, "data.batch_size: expected at least 2"),
        (LinearConfig, {"test": {"every": 0}}, "test.every"),
    ],
)
def test_what_makes_no_sense_is_refused(kind, change, message):
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        parse_config(SMALL | change, kind, "here")
