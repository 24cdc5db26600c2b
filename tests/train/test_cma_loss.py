"""The AVID+CMA loss in one process: golden numbers, positives, which terms, and a step in parts."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from avid_pipeline.errors import CheckpointError, ConfigError
from avid_pipeline.train import criterion as criterion_module
from avid_pipeline.train.losses import AVIDCMALoss, AVIDLoss
from avid_pipeline.train.memory_bank import MemoryBank
from avid_pipeline.train.negatives import draw_negatives

GOLDEN = Path(__file__).parents[1] / "golden" / "criteria.npz"
TERM_NAMES = {
    "inst-v2a": "instance_video_to_audio",
    "inst-a2v": "instance_audio_to_video",
    "pos-v2a": "positive_video_to_audio",
    "pos-a2v": "positive_audio_to_video",
    "pos-v2v": "positive_video_to_video",
    "pos-a2a": "positive_audio_to_audio",
}
N, DIM, BATCH = 50, 8, 6


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    with np.load(GOLDEN) as numbers:
        return {name: torch.from_numpy(numbers[name]) for name in numbers.files if name.startswith("cma_")}


def make_positives(k: int = 3, seed: int = 0) -> Tensor:
    """Positives [N, k]: distinct other instances."""
    order = torch.rand(N, N, generator=torch.Generator().manual_seed(seed)).fill_diagonal_(2).argsort(dim=1)
    return order[:, :k].sort(dim=1).values


def make_loss(dtype: torch.dtype = torch.float32, **coefficients: float) -> AVIDCMALoss:
    bank = MemoryBank(N, DIM, seed=2, dtype=dtype)
    return AVIDCMALoss(bank, make_positives(), num_negatives=16, num_within_negatives=5, **coefficients)


def batch(step: int = 0, size: int = BATCH) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    video, audio = torch.randn(2, size, DIM, generator=generator)
    return video.requires_grad_(), audio.requires_grad_(), torch.randperm(N, generator=generator)[:size]


def test_golden(golden: dict[str, Tensor]) -> None:
    bank = MemoryBank(600, 32, momentum=0.5)
    bank.load(golden["cma_video_memory"], golden["cma_audio_memory"])
    positives, index = golden["cma_positives_consensus"], golden["cma_index"]
    assert torch.equal(positives[index], golden["cma_positives"])
    criterion = AVIDCMALoss(bank, positives, 40, 10, *golden["cma_coefficients"].tolist())
    criterion.partition_function = golden["cma_avg_exp_score"].item()
    embeddings = [golden[f"cma_{modality}_emb"].clone().requires_grad_() for modality in ("video", "audio")]
    loss, terms = criterion(*embeddings, index, negatives=golden["cma_negatives"])
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == pytest.approx(golden["cma_loss"].item(), rel=1e-5)
    recorded = {name: golden[f"cma_Loss_{original}"].item() for original, name in TERM_NAMES.items()}
    assert {name: terms[name] for name in recorded} == pytest.approx(recorded, rel=1e-5)
    means = {
        "instance_cross": (recorded["instance_video_to_audio"] + recorded["instance_audio_to_video"]) / 2,
        "positive_cross": (recorded["positive_video_to_audio"] + recorded["positive_audio_to_video"]) / 2,
        "positive_within": (recorded["positive_video_to_video"] + recorded["positive_audio_to_audio"]) / 2,
    }
    assert terms == pytest.approx(recorded | means, rel=1e-5)
    for modality, embedding, memory in zip(("video", "audio"), embeddings, bank.full(), strict=True):
        expected = golden[f"cma_{modality}_grad"]
        assert embedding.grad is not None
        assert (embedding.grad - expected).abs().max() < 1e-5 * expected.abs().max()
        torch.testing.assert_close(memory, golden[f"cma_{modality}_memory_after"], rtol=0, atol=1e-6)


def test_instance_terms_alone_are_those_of_avid() -> None:
    negatives = torch.randint(0, N, (BATCH, 16), generator=torch.Generator().manual_seed(4))
    avid = AVIDLoss(MemoryBank(N, DIM, seed=2), 16, cross=1, within=0.5)
    cma = make_loss(instance_within=0.5, positive_within=0.0)
    for step in range(3):
        expected, avid_terms = avid(*batch(step), negatives)
        loss, terms = cma(*batch(step), negatives)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
        assert terms == pytest.approx({f"instance_{name}": value for name, value in avid_terms.items()}, rel=1e-6)


@pytest.mark.parametrize("active", ["instance_cross", "instance_within", "positive_cross", "positive_within"])
def test_only_terms_with_a_coefficient_are_computed(active: str) -> None:
    names = ("instance_cross", "instance_within", "positive_cross", "positive_within")
    together = make_loss(**dict.fromkeys(names, 1.0))
    alone = make_loss(**(dict.fromkeys(names, 0.0) | {active: 3.0}))
    together.partition_function = alone.partition_function = 1.3
    loss, terms = together(*batch())
    loss_alone, terms_alone = alone(*batch())
    assert loss.item() == pytest.approx(sum(terms[name] for name in names) / 4, rel=1e-6)
    assert len(terms_alone) == 3
    assert active in terms_alone
    assert terms_alone == pytest.approx({name: terms[name] for name in terms_alone}, rel=1e-6)
    assert loss_alone.item() == pytest.approx(terms[active], rel=1e-6)


def test_negatives_are_neither_the_instance_nor_its_positives(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []

    def recorded(*args: int, **kwargs: int) -> Tensor:
        drawn.append(draw_negatives(*args, **kwargs))  # type: ignore[arg-type]
        return drawn[-1]

    monkeypatch.setattr(criterion_module, "draw_negatives", recorded)
    criterion = make_loss()
    for step in range(20):
        video, audio, index = batch(step)
        criterion(video, audio, index)
        excluded = torch.cat([index[:, None], make_positives()[index]], dim=1)
        assert not (drawn[-1][:, :, None] == excluded[:, None]).any()
    assert len(drawn) == 20
    assert drawn[0].shape == (BATCH, 16)
    assert not torch.equal(drawn[0], drawn[1])


def test_positives_are_kept_small_and_can_be_replaced() -> None:
    given, other = make_positives(), make_positives(k=2, seed=1)
    criterion = make_loss()
    assert criterion._stored.dtype == torch.int32
    assert criterion.positives.dtype == torch.int64
    assert torch.equal(criterion.positives, given)
    index = torch.tensor([4, 4, 49, 0])
    assert torch.equal(criterion.positives_of(index), given[index])
    first = criterion(*batch())[1]["positive_within"]
    criterion.positives = other
    expected = other.clone()
    other.fill_(0)
    assert torch.equal(criterion.positives_of(index), expected[index])
    criterion.step = 0
    assert criterion(*batch())[1]["positive_within"] != first


@pytest.mark.parametrize(
    ("positives", "message"),
    [
        (torch.zeros(49, 3, dtype=torch.int64), r"shape \[50, k\].*are torch.int64 of shape \[49, 3\]"),
        (torch.zeros(50, dtype=torch.int64), r"of shape \[50\]"),
        (torch.zeros(50, 0, dtype=torch.int64), r"k >= 1, but are torch.int64 of shape \[50, 0\]"),
        (torch.zeros(50, 3), "are torch.float32"),
        (torch.full((50, 3), 50), "positives holds instance 50.*num_instances=50"),
        (torch.full((50, 3), -1), "positives holds instance -1"),
        (torch.zeros(50, 49, dtype=torch.int64), "49 positives leave no negatives among 50 instances; use at most 48"),
    ],
)
def test_positives_that_do_not_fit(positives: Tensor, message: str) -> None:
    criterion = make_loss()
    with pytest.raises(ConfigError, match=message):
        criterion.positives = positives
    assert torch.equal(criterion.positives, make_positives())
    with pytest.raises(ConfigError, match=message):
        AVIDCMALoss(MemoryBank(N, DIM), positives)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_negatives": 0}, "num_negatives must be at least 1, not 0"),
        ({"num_within_negatives": 17}, r"between 1 and num_negatives.*\(16\), but is 17"),
        ({"num_within_negatives": 0}, "but is 0"),
        ({"temperature": -1.0}, r"AVID\+CMA loss: temperature must be a positive number"),
        (
            {"instance_cross": 0.0, "positive_within": 0.0},
            "instance_cross, instance_within, positive_cross and pos.*0.0",
        ),
        ({"positive_cross": -1.0}, "must not be negative"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, float], message: str) -> None:
    defaults: dict[str, float] = {"num_negatives": 16, "num_within_negatives": 5}
    with pytest.raises(ConfigError, match=message):
        AVIDCMALoss(MemoryBank(N, DIM), make_positives(), **(defaults | arguments))  # type: ignore[arg-type]


def test_a_run_goes_on_from_its_state() -> None:
    straight, first, resumed = make_loss(), make_loss(), make_loss()
    expected = [straight(*batch(step))[0].item() for step in range(6)]
    for step in range(3):
        first(*batch(step))
    assert first.state_dict() == {"step": 3, "partition_function": straight.partition_function}
    resumed.bank.load_local(*first.bank.local())
    resumed.load_state_dict(first.state_dict())
    assert [resumed(*batch(step))[0].item() for step in range(3, 6)] == expected[3:]
    with pytest.raises(CheckpointError, match=r"state of the AVID\+CMA loss: step must be"):
        resumed.load_state_dict({"step": 1.5, "partition_function": None})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rows_change_the_loss_little(dtype: torch.dtype) -> None:
    exact, rounded = make_loss(), make_loss(dtype)
    for step in range(5):
        loss = exact(*batch(step))[0].item()
        assert rounded(*batch(step))[0].item() == pytest.approx(loss, rel=0.02)
    assert rounded.bank.dtype == dtype


def run_in_parts(criterion: AVIDLoss | AVIDCMALoss, parts: int) -> tuple[list[float], list[Tensor]]:
    """Mean losses of five steps, and the gradients of all embeddings; step 2 repeats instances in and over parts."""
    losses, gradients = [], []
    criterion.partition_function = 1.3
    for step in range(5):
        video, audio, index = batch(step)
        if step == 2:
            index = torch.tensor([7, 8, 7, 9, 8, 7])
        loss = torch.zeros(())
        chunks = zip(video.chunk(parts), audio.chunk(parts), index.chunk(parts), strict=True)
        for part, (video_part, audio_part, index_part) in enumerate(chunks):
            before = criterion.bank.full()[0]
            of_part, _ = criterion(video_part, audio_part, index_part, end_of_step=part == parts - 1)
            changed = not torch.equal(criterion.bank.full()[0], before)
            assert changed == (part == parts - 1)
            assert criterion.step == step + (part == parts - 1)
            loss = loss + of_part / parts
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.item())
        assert video.grad is not None
        assert audio.grad is not None
        gradients.append(torch.stack([video.grad, audio.grad]))
    return losses, gradients


@pytest.mark.parametrize("parts", [2, 3, 6])
@pytest.mark.parametrize("kind", ["AVID", "AVID+CMA"])
def test_a_step_in_parts_is_the_whole_step(kind: str, parts: int) -> None:
    def make() -> AVIDLoss | AVIDCMALoss:
        return make_loss() if kind == "AVID+CMA" else AVIDLoss(MemoryBank(N, DIM, seed=2), 16, within=1.0)

    whole, divided = make(), make()
    losses, gradients = run_in_parts(whole, 1)
    losses_of_parts, gradients_of_parts = run_in_parts(divided, parts)
    assert losses_of_parts == pytest.approx(losses, rel=1e-6)
    torch.testing.assert_close(gradients_of_parts, gradients, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(divided.bank.full(), whole.bank.full(), rtol=0, atol=1e-6)


def test_loading_a_state_drops_the_parts_of_an_unfinished_step() -> None:
    criterion, expected = make_loss(), make_loss()
    criterion(*batch(1), end_of_step=False)
    criterion.load_state_dict({"step": 0, "partition_function": None})
    assert criterion(*batch(0))[0].item() == expected(*batch(0))[0].item()
    assert torch.equal(criterion.bank.full()[0], expected.bank.full()[0])


def test_kept_back_parts_are_the_batch_alone() -> None:
    criterion = make_loss()
    for part in range(4):
        criterion(*batch(part), end_of_step=False)
    kept = [tensor for part in criterion._kept_back for tensor in part]
    assert sum(tensor.untyped_storage().nbytes() for tensor in kept) == 4 * BATCH * (2 * DIM * 4 + 8)
    assert not any(tensor.requires_grad for tensor in kept)
