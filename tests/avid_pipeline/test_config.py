from pathlib import Path

import pytest

from avid_pipeline.config import load_config
from avid_pipeline.errors import ConfigError
from avid_pipeline.train.config import TrainConfig

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
# Those of fine-tuning and linear probes are tests/evaluate's.
TRAINING = [path for path in sorted(CONFIGS.rglob("*.yaml")) if path.parent.name not in ("finetune", "linear")]
SMALL = "epochs: 1\ndata: {batch_size: 4}\noptimizer: {learning_rate: 2e-4}\n"


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(SMALL)
    return path


@pytest.mark.parametrize("path", TRAINING, ids=lambda path: path.stem)
def test_shipped_configs_load(path):
    assert load_config(path, TrainConfig).epochs >= 1


def test_published_values():
    config = load_config(CONFIGS / "avid" / "kinetics400.yaml", TrainConfig)
    assert (config.epochs, config.data.batch_size, config.data.clips_per_instance) == (30, 256, 10)
    assert (config.optimizer.learning_rate, config.optimizer.weight_decay) == (2e-4, 1e-5)
    assert (config.loss.cross, config.loss.within, config.loss.num_negatives) == (1.0, 0.0, 1024)
    assert config.clip.num_frames == 8


def test_scientific_notation_and_overrides(config_file):
    overrides = ["optimizer.learning_rate=1e-3", "augmentation.area=[0.5, 1]", "seed=7"]
    config = load_config(config_file, TrainConfig, overrides)
    assert config.optimizer.learning_rate == 1e-3
    assert config.augmentation.area == (0.5, 1.0)
    assert config.seed == 7


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.learing_rate=1", r"optimizer\.learing_rate: unknown key; known here: .*learning_rate"),
        ("colour=1", r"colour: unknown key; known here: .*seed"),
        ("epochs=many", r"epochs: .*integer, found 'many'"),
        ("data.batch_size=0", r"data\.batch_size: .*greater than or equal to 1, found 0"),
        ("loss.cross=0", "loss.cross and loss.within are both 0"),
        ("epochs", "expected key=value"),
        ("epochs.x=1", "epochs is a value, not a group"),
        ("epochs=[", "no YAML"),
    ],
)
def test_errors_name_the_field(config_file, override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(config_file, TrainConfig, [override])


def test_files_that_are_no_config(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(tmp_path / "none.yaml", TrainConfig)
    for text, message in (("- 1", "expected a mapping"), ("a: [", "cannot be read as YAML"), ("epochs: 1", "data")):
        (tmp_path / "x.yaml").write_text(text)
        with pytest.raises(ConfigError, match=message):
            load_config(tmp_path / "x.yaml", TrainConfig)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.learning_rate=.inf", r"optimizer\.learning_rate: .*finite"),
        ("optimizer.learning_rate=.nan", r"optimizer\.learning_rate: "),
        ("optimizer.learning_rate=true", r"optimizer\.learning_rate: .*number, found True"),
        ("optimizer.betas=[0.9, 1]", r"optimizer\.betas\.1: .*less than 1"),
        ("epochs=1.5", r"epochs: .*found 1\.5"),
        ("seed=2000-01-01", "no number, text, list or mapping"),
        ("augmentation.ratio=[0, 1]", r"augmentation\.ratio: .*0 < lowest <= highest, found \[0\.0, 1\.0\]"),
        ("augmentation.area=[0.5, 0.2]", r"augmentation\.area: .*found \[0\.5, 0\.2\]"),
        ("augmentation.area=[8, 100]", r"augmentation\.area: .*<= 1, found \[8\.0, 100\.0\]"),
        ("model.projection=[]", r"model\.projection: .*at least 1"),
        ("=1", "expected key=value"),
    ],
)
def test_values_that_would_fail_later_fail_here(config_file, override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(config_file, TrainConfig, [override])


def test_every_problem_is_told_at_once_and_shortly(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("epochs: 1\nsede: 3\nclip: {fbs: 16}\noptimizer: {learning_rate: a}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path, TrainConfig)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "data: is missing and has no default" in message
    assert "sede: unknown key; known here: seed, epochs" in message
    assert "clip.fbs: unknown key; known here: video_seconds, fps" in message
    assert "optimizer.learning_rate: Input should be a valid number, found 'a'" in message


def test_a_file_that_holds_itself_is_an_error(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("epochs: &again [*again]\n")
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        load_config(path, TrainConfig)


def test_a_configuration_does_not_change(config_file):
    config = load_config(config_file, TrainConfig)
    with pytest.raises(ValueError, match="frozen"):
        config.epochs = 2
