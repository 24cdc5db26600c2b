import pytest
from pydantic import ValidationError

from avid_pipeline.train.config import TrainConfig, changed_settings

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
