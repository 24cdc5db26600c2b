"""Batch norm over groups of clips gives the same on any number of ranks as torch's own on one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from avid_pipeline.collectives import RankGroup
from avid_pipeline.errors import ConfigError
from avid_pipeline.models import AVModel
from avid_pipeline.models.batch_norm import averaged_batch_norm, averaged_statistics, group_batch_norms
from tests.ranks import run_ranks

WORKER = Path(__file__).with_name("batch_norm_worker.py")
CLIPS = 12
# Number of ranks -> sizes of groups that can be made of their clips.
GROUPS = {1: (None, 1, 2, 3, 4, 6, 12), 2: (None, 1, 2, 3, 6, 12), 3: (None, 1, 2, 4, 12), 4: (None, 1, 3, 6, 12)}


def small_net(*, dims: int = 3, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Two convolutions, each with a batch norm; channels whose mean is far from 0."""
    torch.manual_seed(0)
    conv, norm = {2: (nn.Conv2d, nn.BatchNorm2d), 3: (nn.Conv3d, nn.BatchNorm3d)}[dims]
    net = nn.Sequential(
        conv(3, 5, 3, bias=False), norm(5), nn.ReLU(inplace=True), conv(5, 4, 2, bias=False), norm(4, momentum=None)
    )
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return net.to(dtype)


def batches(dims: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Inputs of two forward passes and the gradients of their outputs, [2, CLIPS, ...]."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(2, CLIPS, 3, *[5, 6, 7][:dims], generator=generator, dtype=torch.float64)
    scale = torch.rand(2, CLIPS, 3, *[1] * dims, generator=generator, dtype=torch.float64)
    gradients = torch.randn(2, CLIPS, 4, *[2, 3, 4][:dims], generator=generator, dtype=torch.float64)
    return (10 * scale * inputs + 30 * scale).to(dtype), gradients.to(dtype)


def reference(clips_per_group: int | None, **settings: Any) -> dict[str, Any]:
    """What torch's batch norm gives with one copy of the net for each group; running statistics are their mean."""
    size = clips_per_group or CLIPS
    of_groups = []
    inputs, gradients = batches(settings.get("dims", 3), settings.get("dtype", torch.float64))
    for first in range(0, CLIPS, size):
        net = small_net(**settings)
        clips = inputs[:, first : first + size].clone().requires_grad_()
        outputs = torch.stack([net(batch) for batch in clips])
        outputs.backward(gradients[:, first : first + size])
        with torch.no_grad():
            net(clips[0])
        of_groups.append((outputs.detach(), clips.grad, [p.grad for p in net.parameters()], net.state_dict()))
    states = [state for *_, state in of_groups]
    state = {name: torch.stack([s[name].double() for s in states]).mean(0) for name in states[0]}
    net = small_net(**settings)
    net.load_state_dict(state)
    return {
        "outputs": torch.cat([outputs for outputs, *_ in of_groups], dim=1),
        "input gradients": torch.cat([gradient for _, gradient, *_ in of_groups], dim=1),
        "gradients": [sum(gradients) for gradients in zip(*(group[2] for group in of_groups), strict=True)],
        "state": state,
        "evaluated": net.eval()(inputs[0]).detach(),
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What four processes computed in groups of one to four of them; see batch_norm_worker.py."""
    return run_ranks(WORKER, 4, tmp_path_factory.mktemp("batch_norm"))


def assert_equal(found: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    pairs = [(found[name], expected[name]) for name in ("outputs", "input gradients", "evaluated")]
    pairs += zip(found["gradients"].values(), expected["gradients"], strict=True)
    pairs += [(found["state"][name], tensor) for name, tensor in expected["state"].items()]
    for actual, reference in pairs:
        close(actual, reference, tolerance)


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape
    assert (found.double() - expected.double()).abs().max() <= tolerance * max(1.0, float(expected.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "clips_per_group"), [(r, g) for r, groups in GROUPS.items() for g in groups])
def test_equals_torch_on_one_process(results: dict[str, Any], ranks: int, clips_per_group: int | None) -> None:
    found = results[f"{clips_per_group} {ranks}"]
    assert_equal(found, reference(clips_per_group), 1e-11)
    assert found["names kept"]


@pytest.mark.slow
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(("ranks", "clips_per_group"), [(r, g) for r in GROUPS for g in (None, 3) if g in GROUPS[r]])
def test_single_precision(results: dict[str, Any], ranks: int, clips_per_group: int | None, dims: int) -> None:
    expected = reference(clips_per_group, dims=dims)
    for case in ("single", "channels last"):
        found = results[f"{case} {dims}d {clips_per_group} {ranks}"]
        assert found["format kept"]
        assert found["outputs"].dtype == torch.float32
        assert_equal(found, expected, 2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_autocast_computes_statistics_in_float32(results: dict[str, Any], ranks: int) -> None:
    single, found = results["autocast 3d None 1"], results[f"autocast 3d None {ranks}"]
    assert found["format kept"]
    assert found["outputs"].dtype == torch.bfloat16
    assert found["state"]["1.running_var"].dtype == torch.float32
    # The first statistics are of the same bfloat16 numbers, so only float32 rounds them.
    close(found["state"]["1.running_mean"], single["state"]["1.running_mean"], 1e-5)
    close(found["state"]["1.running_var"], single["state"]["1.running_var"], 1e-4)
    for name in ("outputs", "input gradients"):
        close(found[name], single[name], 2**-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "as_first"),
    [
        ("6 4", [True, True, False, False]),
        ("3 4", [True, False, False, False]),
        ("2 3", [True, False, False]),
        ("None 4", [True] * 4),
    ],
)
def test_averaged_statistics(results: dict[str, Any], case: str, as_first: list[bool]) -> None:
    found = results[case]
    for name, tensor in found["state"].items():
        assert all(torch.equal(of_rank[name], tensor) for of_rank in found["of ranks"])
        assert torch.equal(found["inside"][name], tensor)
        close(torch.stack([own[name].double() for own in found["own"]]).mean(0), tensor, 1e-12)
    assert found["restored"]
    assert found["state"]["1.num_batches_tracked"] == 3
    means = [own["1.running_mean"] for own in found["own"]]
    same = [torch.equal(mean, means[0]) for mean in means]
    assert same == {"6 4": [True, True, False, False], "None 4": [True] * 4}.get(
        case, [True] + [False] * (len(same) - 1)
    )


@pytest.mark.slow
def test_gradients_are_those_of_the_whole_group(results: dict[str, Any]) -> None:
    assert results["gradient problems"] == [[]] * 4


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_training_gives_the_same_losses(results: dict[str, Any], optimizer: str, ranks: int) -> None:
    single, found = results[f"{optimizer} 1"], results[f"{optimizer} {ranks}"]
    # In float64: in float32 a rounding moves maxima and ReLUs, and a run with it.
    assert found["losses"] == pytest.approx(single["losses"], rel=1e-8)
    assert sum(single["losses"][-4:]) < sum(single["losses"][:4])
    for name, tensor in single["state"].items():
        close(found["state"][name], tensor, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["compiled", "copied"])
def test_compiled_and_copied_models_do_the_same(results: dict[str, Any], case: str) -> None:
    assert results[case] == [True] * 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "message"),
    [
        (
            "five",
            "model.batch_norm_clips: groups of 5 clips cannot be made of 24 (the batch size, divided by the parts of "
            "gradient accumulation), which are 6 on each of 4 rank(s): a group is part of one rank's clips, or all "
            "clips of neighbouring ranks; choose one of 1, 2, 3, 6, 12, 24, or another data.batch_size",
        ),
        ("three ranks of four", "groups of 18 clips cannot be made of 24"),
        ("unequal", "clips in a forward pass must be the same on all ranks but is [6, 7, 6, 7]"),
        ("other batch", "expected 2 clips on a rank in training mode, got 12"),
        ("one value", "Expected more than 1 value per channel when training"),
    ],
)
def test_errors_on_every_rank(results: dict[str, Any], case: str, message: str) -> None:
    assert len(results[case]) == 4
    for error in results[case]:
        assert message in error


@pytest.mark.parametrize("clips_per_group", [None, CLIPS])
def test_the_whole_batch_of_one_process_is_left_to_torch(clips_per_group: int | None) -> None:
    grouped, plain = group_batch_norms(small_net(), clips_per_group, CLIPS), small_net()
    assert [type(module) for module in grouped] == [type(module) for module in plain]
    assert torch.equal(grouped(batches(3, torch.float64)[0][0]), plain(batches(3, torch.float64)[0][0]))


def test_groups_can_change() -> None:
    net = small_net()
    clips = batches(3, torch.float64)[0][0]
    by_three = group_batch_norms(net, 3, CLIPS)(clips)
    by_six = group_batch_norms(net, 6, CLIPS)(clips)
    assert net is group_batch_norms(net, None, CLIPS)
    assert [type(module) for module in net] == [type(module) for module in small_net()]
    assert torch.equal(by_three[:3], small_net()(clips[:3]))
    assert torch.equal(by_six[:6], small_net()(clips[:6]))


def test_model_keeps_names_and_evaluation() -> None:
    plain = AVModel(10, (8,), torch.Generator().manual_seed(0)).eval()
    grouped = group_batch_norms(AVModel(10, (8,), torch.Generator().manual_seed(0)), 1, 2).eval()
    assert list(grouped.state_dict()) == list(plain.state_dict())
    grouped.load_state_dict(plain.state_dict())
    clips = torch.randn(3, 3, 4, 32, 32), torch.randn(3, 1, 30, 257)
    for found, expected in zip(grouped(*clips), plain(*clips), strict=True):
        assert torch.equal(found, expected)


def test_one_process_has_nothing_to_average() -> None:
    net = small_net()
    net(batches(3, torch.float64)[0][0])
    state, averaged = net.state_dict(), averaged_statistics(net, RankGroup())
    assert list(averaged) == list(state)
    assert all(torch.equal(averaged[name], tensor) for name, tensor in state.items())
    averaged["1.running_mean"].zero_()
    assert net.state_dict()["1.running_mean"].abs().min() > 0


def test_statistics_come_back_after_an_error() -> None:
    net = small_net()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}

    def fail() -> None:
        with averaged_batch_norm(net, RankGroup()):
            net[1].running_mean.fill_(7)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_impossible_groups_on_one_process() -> None:
    with pytest.raises(ConfigError, match=r"choose one of 1, 2, 4, or another data.batch_size"):
        group_batch_norms(small_net(), 3, 4)


def test_other_batch_norms_are_refused() -> None:
    with pytest.raises(TypeError, match="0: expected BatchNorm2d or BatchNorm3d, got BatchNorm1d"):
        group_batch_norms(nn.Sequential(nn.BatchNorm1d(3)), None, 4)
