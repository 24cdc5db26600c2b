"""The contrast that all objectives are made of: gradients, several positives, and what it keeps in memory."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from avid_pipeline.train import memory_bank
from avid_pipeline.train.contrast import Contrast, contrastive_loss
from avid_pipeline.train.memory_bank import MemoryBank, OwnedCandidates

GOLDEN = Path(__file__).parents[1] / "golden" / "criteria.npz"

# Columns: the own instance, three further positives, twenty negatives of which one contrast uses five.
CONTRASTS = [
    Contrast("instance", "video", "audio", range(1), range(4, 24), 0.5),
    Contrast("positive", "audio", "video", range(1, 4), range(4, 24), 0.2),
    Contrast("within", "video", "video", range(1, 4), range(4, 9), 0.3),
]


def unit(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return F.normalize(torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(0)), dim=-1)


def example_candidates(num_queries: int, num_instances: int) -> Tensor:
    return torch.randint(0, num_instances, (num_queries, 24), generator=torch.Generator().manual_seed(1))


def test_gradients_are_those_of_finite_differences() -> None:
    bank = MemoryBank(30, 6)
    owned = bank.find_owned(example_candidates(4, 30))

    def loss_of(queries: Tensor) -> Tensor:
        return contrastive_loss(
            bank,
            queries,
            queries.detach(),
            owned,
            CONTRASTS,
            temperature=0.5,
            partition_function=1.3,
        )[0]

    assert torch.autograd.gradcheck(loss_of, unit(4, 2, 6, dtype=torch.float64).requires_grad_())


def test_equals_the_formula_written_out() -> None:
    bank = MemoryBank(30, 6)
    memories = dict(zip(("video", "audio"), (memory.double() for memory in bank.full()), strict=True))
    candidates = example_candidates(4, 30)
    queries = unit(4, 2, 6, dtype=torch.float64)
    expected = []
    for contrast in CONTRASTS:
        query = queries[:, ("video", "audio").index(contrast.query)]
        exp_scores = (memories[contrast.memory][candidates] @ query[:, :, None])[:, :, 0].div(0.1).exp()
        noise = len(contrast.negatives) * 2.5
        positive = -(exp_scores / (exp_scores + noise)).log()[:, list(contrast.positives)]
        negative = -(noise / (exp_scores + noise)).log()[:, list(contrast.negatives)]
        expected.append((positive.mean(dim=1) + negative.sum(dim=1)).mean())
    loss, terms = contrastive_loss(
        bank, queries, queries, bank.find_owned(candidates), CONTRASTS, temperature=0.1, partition_function=2.5
    )
    torch.testing.assert_close(terms, torch.stack(expected))
    torch.testing.assert_close(loss, 0.5 * expected[0] + 0.2 * expected[1] + 0.3 * expected[2])


def test_golden_instance_and_positive_terms() -> None:
    with np.load(GOLDEN) as golden:
        numbers = {name: torch.from_numpy(golden[name]) for name in golden.files if name.startswith("cma_")}
    shares = (numbers["cma_coefficients"] / numbers["cma_coefficients"].sum() / 2).tolist()
    own, positives, negatives, fewer = range(1), range(1, 9), range(9, 49), range(9, 19)
    contrasts = [
        Contrast("inst-v2a", "video", "audio", own, negatives, shares[0]),
        Contrast("inst-a2v", "audio", "video", own, negatives, shares[0]),
        Contrast("pos-v2a", "video", "audio", positives, negatives, shares[2]),
        Contrast("pos-a2v", "audio", "video", positives, negatives, shares[2]),
        Contrast("pos-v2v", "video", "video", positives, fewer, shares[3]),
        Contrast("pos-a2a", "audio", "audio", positives, fewer, shares[3]),
    ]
    bank = MemoryBank(600, 32)
    bank.load(numbers["cma_video_memory"], numbers["cma_audio_memory"])
    embeddings = [numbers[f"cma_{modality}_emb"].requires_grad_() for modality in ("video", "audio")]
    queries = F.normalize(torch.stack(embeddings, dim=1), dim=2)
    candidates = torch.cat([numbers["cma_index"][:, None], numbers["cma_positives"], numbers["cma_negatives"]], dim=1)
    loss, terms = contrastive_loss(
        bank,
        queries,
        queries.detach(),
        bank.find_owned(candidates),
        contrasts,
        temperature=0.07,
        partition_function=numbers["cma_avg_exp_score"].item(),
    )
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == pytest.approx(numbers["cma_loss"].item(), rel=1e-5)
    for contrast, term in zip(contrasts, terms.tolist(), strict=True):
        assert term == pytest.approx(numbers[f"cma_Loss_{contrast.name}"].item(), rel=1e-5)
    for modality, embedding in zip(("video", "audio"), embeddings, strict=True):
        expected = numbers[f"cma_{modality}_grad"]
        torch.testing.assert_close(embedding.grad, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("start", [0, 7, 30])
def test_any_rows_of_the_bank_score_their_candidates_alone(start: int) -> None:
    # What ranks would own, taken together: packed candidates must give what the whole table gives.
    bank = MemoryBank(30, 6)
    candidates, queries = example_candidates(4, 30), unit(4, 2, 6).requires_grad_()
    whole = contrastive_loss(
        bank, queries, queries.detach(), bank.find_owned(candidates), CONTRASTS, temperature=0.3, partition_function=2.0
    )[1]
    parts = torch.zeros_like(whole)
    for rows in (range(start), range(start, 30)):
        packed, columns = torch.zeros(4, 24, dtype=torch.int64), torch.full((4, 24), 24)
        for query, row in enumerate(candidates.tolist()):
            owned = [column for column, instance in enumerate(row) if instance in rows]
            packed[query, : len(owned)] = candidates[query, owned]
            columns[query, : len(owned)] = torch.tensor(owned, dtype=torch.int64)
        part = OwnedCandidates(packed, columns, 24)
        parts += contrastive_loss(
            bank, queries, queries.detach(), part, CONTRASTS, temperature=0.3, partition_function=2.0
        )[1]
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=0)


class LargestTensor(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Remembers the most elements that any operation's result had."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


def test_small_blocks_give_the_same_and_bound_what_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    num_queries, num_instances, dim = 64, 300, 32
    candidates = example_candidates(num_queries, num_instances)
    results = []
    for block_bytes in (1 << 30, 4096):
        monkeypatch.setattr(memory_bank, "_BLOCK_BYTES", {"cpu": block_bytes})
        bank = MemoryBank(num_instances, dim)
        queries = unit(num_queries, 2, dim).requires_grad_()
        with LargestTensor() as measured:  # type: ignore[no-untyped-call]
            owned = bank.find_owned(candidates)
            loss, _ = contrastive_loss(
                bank, queries, queries.detach(), owned, CONTRASTS, temperature=0.07, partition_function=2.0
            )
            loss.backward()  # type: ignore[no-untyped-call]
        assert queries.grad is not None
        results.append((loss.item(), queries.grad, measured.largest))
    (large_loss, gradient, largest), (small_loss, small_gradient, small_largest) = results
    assert small_loss == pytest.approx(large_loss, rel=1e-6)
    torch.testing.assert_close(small_gradient, gradient)
    assert largest == num_queries * 24 * dim
    # No block holds more than 4096 bytes; what remains is the batch's own: queries and the candidate table.
    assert small_largest == max(queries.numel(), candidates.numel())
