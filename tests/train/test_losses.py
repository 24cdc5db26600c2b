"""The AVID loss in one process: golden numbers, what it leaves out, its state, and its errors."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from avid_pipeline.errors import CheckpointError, ConfigError
from avid_pipeline.train.losses import AVIDLoss
from avid_pipeline.train.memory_bank import MemoryBank

GOLDEN = Path(__file__).parents[1] / "golden" / "criteria.npz"
TERM_NAMES = {
    "v2a": "video_to_audio",
    "a2v": "audio_to_video",
    "v2v": "video_to_video",
    "a2a": "audio_to_audio",
    "xModal": "cross",
    "wModal": "within",
}


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    with np.load(GOLDEN) as numbers:
        return {name: torch.from_numpy(numbers[name]) for name in numbers.files}


def batch(step: int = 0, size: int = 6, dim: int = 8, num_instances: int = 50) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    video, audio = torch.randn(2, size, dim, generator=generator)
    return video.requires_grad_(), audio.requires_grad_(), torch.randperm(num_instances, generator=generator)[:size]


def make_loss() -> AVIDLoss:
    return AVIDLoss(MemoryBank(50, 8, seed=2), num_negatives=16, within=0.5)


@pytest.mark.parametrize(("name", "cross", "within"), [("cross", 1, 0), ("self", 0, 1), ("joint", 1, 1)])
def test_golden(golden: dict[str, Tensor], name: str, cross: float, within: float) -> None:
    bank = MemoryBank(600, 32, momentum=0.5)
    bank.load(golden[f"{name}_video_memory_before"], golden[f"{name}_audio_memory_before"])
    criterion = AVIDLoss(bank, num_negatives=40, temperature=0.07, cross=cross, within=within)
    assert criterion.partition_function is None
    for step in range(2):
        numbers = {key: golden[f"{name}_step{step}_{key}"] for key in ("index", "negatives", "loss")}
        video, audio = (golden[f"{name}_step{step}_{m}_emb"].clone().requires_grad_() for m in ("video", "audio"))
        loss, terms = criterion(video, audio, numbers["index"], negatives=numbers["negatives"])
        loss.backward()  # type: ignore[no-untyped-call]
        assert loss.item() == pytest.approx(numbers["loss"].item(), rel=1e-5)
        for modality, embeddings in (("video", video), ("audio", audio)):
            expected = golden[f"{name}_step{step}_{modality}_grad"]
            assert embeddings.grad is not None
            error = (embeddings.grad - expected).abs().max() / expected.abs().max()
            assert error < 1e-5
        expected_z = golden[f"{name}_step{step}_avg_exp_score"].item()
        assert criterion.partition_function == pytest.approx(expected_z, rel=1e-5)
        for original, term in TERM_NAMES.items():
            recorded = golden.get(f"{name}_step{step}_Loss_{original}")
            if recorded is not None and recorded.item() != 0:
                assert terms[term] == pytest.approx(recorded.item(), rel=1e-5)
            else:
                assert term not in terms
    for memory, modality in zip(bank.full(), ("video", "audio"), strict=True):
        torch.testing.assert_close(memory, golden[f"{name}_{modality}_memory_after"], rtol=0, atol=1e-6)


def test_same_seed_same_run_other_seed_other_run() -> None:
    def run(seed: int) -> list[float]:
        criterion = AVIDLoss(MemoryBank(50, 8, seed=seed), num_negatives=16)
        return [criterion(*batch(step))[0].item() for step in range(3)]

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_negatives_change_with_the_step() -> None:
    video, audio, index = batch()
    losses = set()
    for step in range(3):
        criterion = make_loss()
        criterion.partition_function = 1.5
        criterion.step = step
        losses.add(criterion(video, audio, index)[0].item())
        assert criterion.step == step + 1
    assert len(losses) == 3


def test_a_run_goes_on_from_its_state() -> None:
    straight = make_loss()
    expected = [straight(*batch(step))[0].item() for step in range(6)]
    first = make_loss()
    for step in range(3):
        first(*batch(step))
    assert first.state_dict() == {"step": 3, "partition_function": straight.partition_function}
    resumed = AVIDLoss(MemoryBank(50, 8, seed=2), num_negatives=16, within=0.5)
    resumed.bank.load_local(*first.bank.local())
    resumed.load_state_dict(first.state_dict())
    assert [resumed(*batch(step))[0].item() for step in range(3, 6)] == expected[3:]
    for one, other in zip(resumed.bank.full(), straight.bank.full(), strict=True):
        assert torch.equal(one, other)


def test_partition_function_is_fixed_by_the_first_batch_and_settable() -> None:
    criterion = make_loss()
    first_video, first_audio, first_index = batch(0)
    memory = criterion.bank.full()[1]
    negatives = torch.randint(0, 50, (6, 16), generator=torch.Generator().manual_seed(9))
    criterion(first_video, first_audio, first_index, negatives)
    scores = (memory[negatives] @ F.normalize(first_video.detach(), dim=1)[:, :, None]) / 0.07
    assert criterion.partition_function == pytest.approx(scores.exp().mean().item(), rel=1e-5)
    fixed = criterion.partition_function
    criterion(*batch(1))
    assert criterion.partition_function == fixed
    criterion.partition_function = 3.0
    criterion(*batch(2))
    assert criterion.partition_function == 3.0


def test_memories_are_read_before_they_are_updated() -> None:
    video, audio, index = batch()
    once, twice = make_loss(), make_loss()
    loss = once(video, audio, index)[0]
    assert twice(video, audio, index)[0].item() == loss.item()
    twice.step = 0
    assert twice(video, audio, index)[0].item() < loss.item()


def test_gradient_flows_from_bfloat16_embeddings_under_autocast() -> None:
    video, audio, index = batch()
    expected = make_loss()(video, audio, index)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = make_loss()(video, audio, index)
    assert loss.item() == expected.item()
    half_video = video.detach().bfloat16().requires_grad_()
    loss, _ = make_loss()(half_video, audio.detach().bfloat16(), index)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=0.05)
    assert half_video.grad is not None
    assert half_video.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rows_change_the_loss_little(dtype: torch.dtype) -> None:
    exact = AVIDLoss(MemoryBank(50, 8, seed=2), num_negatives=16)
    rounded = AVIDLoss(MemoryBank(50, 8, seed=2, dtype=dtype), num_negatives=16)
    for step in range(5):
        loss = exact(*batch(step))[0].item()
        assert rounded(*batch(step))[0].item() == pytest.approx(loss, rel=0.02)
    assert rounded.bank.dtype == dtype


def test_without_gradients_the_loss_is_the_same() -> None:
    with torch.no_grad():
        loss, _ = make_loss()(*batch())
    assert not loss.requires_grad
    assert loss.item() == make_loss()(*batch())[0].item()


def test_scaling_the_loss_scales_gradients() -> None:
    gradients = []
    for scale in (1.0, 1024.0):
        video, audio, index = batch()
        (make_loss()(video, audio, index)[0] * scale).backward()  # type: ignore[no-untyped-call]
        assert video.grad is not None
        gradients.append(video.grad / scale)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_negatives": 0}, "num_negatives must be at least 1, not 0"),
        ({"temperature": 0.0}, "temperature must be a positive number, not 0.0"),
        ({"cross": 0.0, "within": 0.0}, "one must be positive, but they are 0.0 and 0.0"),
        ({"cross": -1.0, "within": 2.0}, "must not be negative"),
        ({"cross": float("nan")}, "one must be positive"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AVIDLoss(MemoryBank(10, 4), **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"video_emb": torch.zeros(6, 9)}, r"video embeddings have shape \[6, 9\], not \[B, 8\]"),
        ({"audio_emb": torch.zeros(5, 8)}, "6 video embeddings but 5 audio embeddings"),
        ({"index": torch.arange(5)}, r"index must be int64 of shape \[6\].* shape \[5\]"),
        ({"index": torch.arange(6, dtype=torch.int32)}, "index must be int64.* but is torch.int32"),
        ({"index": torch.tensor([0, 1, 2, 3, 4, 50])}, "index holds instance 50.*num_instances=50"),
        ({"index": torch.tensor([0, 1, 2, 3, 4, -1])}, "index holds instance -1.*num_instances=50"),
        ({"negatives": torch.zeros(6, dtype=torch.int64)}, r"negatives must be int64 of shape \[6, 6\]"),
        ({"negatives": torch.zeros(6, 0, dtype=torch.int64)}, r"negatives must be int64 of shape \[6, 0\]"),
        ({"negatives": torch.full((6, 3), 77)}, "negatives holds instance 77"),
    ],
)
def test_batches_that_do_not_fit(change: dict[str, Tensor], message: str) -> None:
    video, audio, index = batch()
    criterion = make_loss()
    before = criterion.bank.full()[0]
    with pytest.raises(ConfigError, match=message):
        criterion(**({"video_emb": video, "audio_emb": audio, "index": index} | change))
    assert criterion.step == 0
    assert torch.equal(criterion.bank.full()[0], before)


def test_first_batch_must_be_finite() -> None:
    video, audio, index = batch()
    with pytest.raises(ConfigError, match="partition function would be nan"):
        make_loss()(video.detach() * float("nan"), audio, index)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"step": 1}, r"expected entries step and partition_function, found \['step'\]"),
        ({"step": -1, "partition_function": None}, "step must be an integer >= 0, not -1"),
        ({"step": 1, "partition_function": "1"}, "partition_function must be a positive float or None, not '1'"),
        (
            {"step": 1, "partition_function": float("nan")},
            "partition_function must be a positive float or None, not nan",
        ),
    ],
)
def test_states_of_something_else(state: dict[str, object], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        make_loss().load_state_dict(state)


def test_partition_function_of_another_type_is_a_float_in_the_state() -> None:
    criterion, other = make_loss(), make_loss()
    for value in (3, torch.tensor(3.0), np.float32(3)):
        criterion.partition_function = value  # type: ignore[assignment]
        other.load_state_dict(criterion.state_dict())
        assert other.partition_function == 3.0


def test_partition_function_must_be_positive() -> None:
    with pytest.raises(ConfigError, match=r"positive number or None, not 0\.0"):
        make_loss().partition_function = 0.0
