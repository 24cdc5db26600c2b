import math
from itertools import pairwise

import pytest
import torch

from avid_pipeline.optimisation import learning_rate, make_optimizer
from avid_pipeline.train.config import OptimizerSettings

KINDS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}


def rates(epochs=4, steps_per_epoch=10, **settings):
    chosen = OptimizerSettings(learning_rate=1.0, **settings)
    return [learning_rate(chosen, step, steps_per_epoch, epochs) for step in range(epochs * steps_per_epoch)]


def test_constant_without_milestones():
    assert rates() == [1.0] * 40


def test_milestones_are_epochs():
    found = rates(milestones=(1, 3), gamma=0.5)
    assert found == pytest.approx([1.0] * 10 + [0.5] * 20 + [0.25] * 10)


def test_warm_up_is_a_line_that_ends_at_the_rate():
    found = rates(warmup_epochs=0.5)
    assert found[:6] == pytest.approx([(step + 1) / 6 for step in range(6)])
    assert found[5:] == [1.0] * 35


def test_cosine_falls_from_the_warm_up_to_nothing():
    found = rates(schedule="cosine", warmup_epochs=1.0)
    assert found[9] < found[10] == 1.0
    assert found[25] == pytest.approx((1 + math.cos(math.pi / 2)) / 2)
    assert all(later < earlier for earlier, later in pairwise(found[10:]))
    assert 0 < found[-1] < 0.01
    # A run that is trained for longer than it was planned stays at the end.
    assert learning_rate(OptimizerSettings(learning_rate=1.0, schedule="cosine"), 50, 10, 4) == pytest.approx(0)


@pytest.mark.parametrize(("name", "kind"), KINDS.items())
def test_optimizers(name, kind):
    settings = OptimizerSettings(name=name, learning_rate=0.1, weight_decay=0.01, betas=(0.8, 0.9), momentum=0.7)
    optimizer = make_optimizer(settings, [torch.nn.Parameter(torch.ones(2))])
    assert type(optimizer) is kind
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (0.1, 0.01)
    assert group["momentum"] == 0.7 if name == "sgd" else group["betas"] == (0.8, 0.9)
