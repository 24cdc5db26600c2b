from pathlib import Path

import pytest
from pydantic import ValidationError

from avid_pipeline.config import load_config
from avid_pipeline.optimisation import learning_rate
from avid_pipeline.train.config import AgreementSettings, TrainConfig, changed_settings

CONFIGS = Path(__file__).resolve().parents[2] / "configs"

SMALL = {"epochs": 1, "data": {"batch_size": 4}, "optimizer": {"learning_rate": 2e-4}}


def plain(**changes):
    return TrainConfig.model_validate(SMALL | changes).model_dump(mode="json")


def test_changes_are_named_with_both_values():
    before = plain()
    now = plain(seed=3, optimizer={"learning_rate": 1e-3, "milestones": (2,)})
    assert changed_settings(before, now) == [
        "optimizer.learning_rate was 0.0002 and is now 0.001",
        "optimizer.milestones was [] and is now [2]",
        "seed was 0 and is now 3",
    ]


def test_what_does_not_change_a_clip_or_a_weight_is_free():
    now = plain(epochs=9, log_every=3, checkpoint={"every_epochs": 2}, data={"batch_size": 4, "workers": 3})
    assert changed_settings(plain(), now) == []


def test_a_setting_that_another_release_lacks_is_a_change():
    older = plain()
    del older["loss"]["temperature"]
    assert changed_settings(older, plain()) == ["loss.temperature was None and is now 0.07"]


@pytest.mark.parametrize("loss", [{"cross": 0.0}, {"temperature": 0.0}, {"within": -1.0}, {"num_negatives": 0}])
def test_losses_that_cannot_be(loss):
    with pytest.raises(ValidationError):
        TrainConfig.model_validate(SMALL | {"loss": loss})


PUBLISHED = {
    "avid/kinetics400": (256, 10, 30, 2e-4, None),
    "avid/audioset": (160, 5, 40, 5e-4, None),
    "avid-cma/kinetics400": (256, 10, 20, 2e-4, 5),
    "avid-cma/audioset": (160, 5, 40, 1e-4, 10),
}


def test_every_configuration_is_known():
    names = {path.relative_to(CONFIGS).with_suffix("").as_posix() for path in CONFIGS.rglob("*.yaml")}
    assert {name for name in names if name.startswith("avid")} == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_experiments(name):
    batch, visits, epochs, rate, resample_every = PUBLISHED[name]
    config = load_config(CONFIGS / f"{name}.yaml", TrainConfig)
    assert (config.data.batch_size, config.data.clips_per_instance, config.epochs) == (batch, visits, epochs)
    optimizer = config.optimizer
    assert (optimizer.name, optimizer.learning_rate, optimizer.weight_decay) == ("adam", rate, 1e-5)
    assert learning_rate(optimizer, 0, 100, epochs) == learning_rate(optimizer, 100 * epochs - 1, 100, epochs) == rate
    clip = config.clip
    assert (clip.video_seconds, clip.fps, clip.crop_size, clip.audio_seconds) == (0.5, 16, 224, 2.0)
    assert config.augmentation.crop == "multi_scale"
    assert (config.model.video_depth, config.model.projection) == (18, (512, 512, 128))
    assert config.model.batch_norm_clips == batch // 8
    loss = config.loss
    assert (loss.num_negatives, loss.temperature, loss.cross, loss.within) == (1024, 0.07, 1.0, 0.0)
    assert config.memory.momentum == 0.5
    if resample_every is None:
        assert config.agreement is None
        return
    expected = {"kind": "consensus", "num_positives": 32, "cross": 0.0, "within": 1.0, "num_within_negatives": 64}
    assert config.agreement == AgreementSettings(resample_every=resample_every, **expected)


def test_every_other_configuration_loads():
    found = {path.stem: load_config(path, TrainConfig) for path in CONFIGS.glob("*.yaml")}
    assert {name: config.agreement is not None for name, config in found.items()} == {"demo": False, "demo-cma": True}


def test_epochs_are_free_to_change_unless_the_rate_looks_ahead():
    cosine = {"learning_rate": 1e-3, "schedule": "cosine"}
    assert changed_settings(plain(), plain(epochs=5)) == []
    assert changed_settings(plain(optimizer=cosine), plain(optimizer=cosine, epochs=5)) == ["epochs was 1 and is now 5"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": {"num_negatives": 8}, "agreement": {}}, "num_within_negatives is 64, but loss.num_negatives"),
        ({"memory": {"init": "checkpoint"}}, "start_from names none"),
        ({"compute": {"accumulate": 0}}, "accumulate"),
        ({"agreement": {"kind": "both"}}, "kind"),
    ],
)
def test_what_does_not_fit_together(changes, message):
    with pytest.raises(ValidationError, match=message):
        TrainConfig.model_validate(SMALL | changes)
