"""One step: its parts, precision, memory layout, compiler and gradient limit."""

import functools

import pytest
import torch

from avid_pipeline.errors import ConfigError
from avid_pipeline.models import AVModel
from avid_pipeline.train.run_log import read_metrics
from avid_pipeline.train.state import distribute, divide_batch, make_bank, make_model, make_state
from avid_pipeline.train.step import train_step
from avid_pipeline.train.trainer import train
from tests.train.runs import SMALL, losses, settings

CPU = torch.device("cpu")
FOUR = {"data": SMALL["data"] | {"batch_size": 4}}
EIGHT = {"data": SMALL["data"] | {"batch_size": 8}}
GENTLE = {"optimizer": {"name": "sgd", "learning_rate": 1e-5, "momentum": 0.0}}


def batch(size=8, seed=0):
    """Large enough that the deepest batch norm sees several values of each clip."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "video": torch.randn(size, 3, 8, 64, 64, generator=generator),
        "audio": torch.randn(size, 1, 60, 257, generator=generator),
    }


def steps(count=3, precision="float32", **changes):
    """Losses of some steps, and the state after them.

    In float32, rounding decides which of two nearly equal values ReLU and max pooling let through, and two ways to
    compute the same gradient may differ by a hundredth. So what should be the same is compared in float64.
    """
    changes["compute"] = {"precision": precision} | changes.get("compute", {})
    config = settings(**EIGHT | GENTLE | changes)
    model, bank = make_model(config, CPU), make_bank(config, 20, CPU)
    state = make_state(config, model, bank, None)
    state.criterion.partition_function = 1.3
    divide_batch(model, config, bank.group)
    network = distribute(model, config, CPU).train()
    rate = config.optimizer.learning_rate
    found = [
        train_step(network, state, batch(8, step), torch.arange(8) + step, config, CPU, rate) for step in range(count)
    ]
    return found, state


def weights(state):
    return torch.cat([parameter.detach().flatten() for parameter in state.model.parameters()])


def assert_alike(ours, theirs):
    """Losses, and how far the weights have moved, agree up to rounding."""
    (found, state), (expected, reference) = ours, theirs
    for values, others in zip(found, expected, strict=True):
        assert values == pytest.approx(others, rel=1e-5)
    start = weights(steps(0, "float64")[1])
    moved = weights(reference) - start
    assert (weights(state) - weights(reference)).norm() < 1e-4 * moved.norm()


def test_a_step_in_parts_is_the_whole_step():
    groups = {"model": SMALL["model"] | {"batch_norm_clips": 4}}
    whole, parts = (steps(3, "float64", **groups, compute={"accumulate": parts}) for parts in (1, 2))
    assert_alike(parts, whole)
    for ours, theirs in zip(parts[1].criterion.bank.full(), whole[1].criterion.bank.full(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert parts[1].step == parts[1].criterion.step == 3


def test_bfloat16_is_near_float32_and_changes_something():
    exact, rounded = (steps(count=1, compute={"precision": name})[0] for name in ("float32", "bfloat16"))
    assert rounded[0]["loss/total"] == pytest.approx(exact[0]["loss/total"], rel=0.05)
    assert rounded[0]["loss/total"] != exact[0]["loss/total"]


def test_channels_last_is_the_same_network():
    laid_out = steps(3, "float64", compute={"channels_last": True})
    weight = next(tensor for tensor in laid_out[1].model.video_model.parameters() if tensor.ndim == 5)
    assert weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert_alike(laid_out, steps(3, "float64"))


def test_compiled_networks_are_the_same(monkeypatch):
    # Tracing and autograd as always, without the C++ compiler, which not every machine has.
    monkeypatch.setattr(AVModel, "compile", functools.partialmethod(AVModel.compile, backend="aot_eager"))
    torch._dynamo.reset()
    compiled = steps(2, "float64", compute={"compile": True})
    assert compiled[1].model._compiled_call_impl is not None
    assert_alike(compiled, steps(2, "float64"))


def test_gradients_are_limited_and_their_norm_is_told():
    sgd = {"name": "sgd", "learning_rate": 1e-3, "momentum": 0.0}
    (free,), start = steps(count=1, optimizer=sgd | {"clip_gradients": 1e9})
    (limited,), state = steps(count=1, optimizer=sgd | {"clip_gradients": 1e-3})
    assert free["gradient_norm"] == limited["gradient_norm"] > 1e-3
    before = weights(
        make_state(settings(**FOUR), make_model(settings(**FOUR), CPU), make_bank(settings(**FOUR), 10, CPU), None)
    )
    assert (weights(state) - before).norm().item() == pytest.approx(1e-3 * 1e-3, rel=0.1)
    assert (weights(start) - before).norm().item() == pytest.approx(1e-3 * free["gradient_norm"], rel=0.05)


def test_a_loss_that_is_no_number_leaves_the_weights():
    config = settings(**FOUR)
    model, bank = make_model(config, CPU), make_bank(config, 10, CPU)
    state = make_state(config, model, bank, None)
    state.criterion.partition_function = 1.3
    before = weights(state)
    broken = batch(4) | {"video": torch.full((4, 3, 8, 64, 64), float("nan"))}
    with pytest.raises(ConfigError, match="the loss became nan at step 1"):
        train_step(model.train(), state, broken, torch.arange(4), config, CPU, 1e-3)
    assert torch.equal(weights(state), before)


def test_what_cannot_be_divided_is_refused(small_dataset, tmp_path):
    with pytest.raises(ConfigError, match=r"compute\.accumulate 2; choose a multiple of 2"):
        train(settings(compute={"accumulate": 2}), str(small_dataset), str(tmp_path))
    with pytest.raises(ConfigError, match=r"batch_norm_clips"):
        train(settings(model=SMALL["model"] | {"batch_norm_clips": 3}), str(small_dataset), str(tmp_path))


@pytest.mark.parametrize(
    "changes",
    [
        {"memory": {"dtype": "bfloat16", "momentum": 0.5}},
        {"memory": {"init": "forward"}},
        {"optimizer": {"name": "adamw", "learning_rate": 1e-3, "schedule": "cosine", "warmup_epochs": 0.5}},
        {"compute": {"precision": "bfloat16", "accumulate": 2}, "data": {"batch_size": 10, "clips_per_instance": 2}},
    ],
    ids=["half memory", "forward", "cosine", "parts"],
)
def test_runs_of_every_kind_resume_bit_for_bit(small_dataset, tmp_path, changes):
    changes = FOUR | {"epochs": 2, "checkpoint": {"every_steps": 1}} | changes
    state = train(settings(**changes), str(small_dataset), str(tmp_path))
    expected = losses(tmp_path)
    assert len(expected) == 4
    (tmp_path / "latest").write_text("checkpoints/step-00000003\n")
    (tmp_path / "checkpoints" / "step-00000004" / "checkpoint.json").unlink()
    again = train(settings(**changes), str(small_dataset), str(tmp_path), resume=True)
    assert losses(tmp_path) == expected
    assert torch.equal(weights(again), weights(state))
    for ours, theirs in zip(again.criterion.bank.full(), state.criterion.bank.full(), strict=True):
        assert torch.equal(ours, theirs)
    assert read_metrics(tmp_path)[-1]["memory/video_drift"] > 0
