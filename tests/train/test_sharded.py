"""The memory bank divided over ranks gives what one process gives: losses, gradients, memories, errors."""

from pathlib import Path
from typing import Any

import pytest
import torch

from avid_pipeline.train.memory_bank import MemoryBank
from tests.ranks import run_ranks

WORKER = Path(__file__).with_name("sharded_worker.py")
WORLD_SIZES = [2, 3, 4]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What four processes computed in groups of one to four of them; see sharded_worker.py."""
    return run_ranks(WORKER, 4, tmp_path_factory.mktemp("sharded"))


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("case", ["drawn", "forced", "strided", "tiny", "cma", "cma repeat", "cma tiny"])
def test_equals_one_process(results: dict[str, Any], case: str, world_size: int) -> None:
    # Which rank holds which sample of a global batch must not matter either, unless instances repeat.
    check_equal(results[f"{case} {world_size}"], results["drawn 1" if case == "strided" else f"{case} 1"])


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_a_step_in_parts_equals_the_whole_step_of_one_process(results: dict[str, Any], world_size: int) -> None:
    check_equal(results[f"cma fixed {world_size}"], results["cma fixed 1"])
    check_equal(results[f"cma parts {world_size}"], results["cma fixed 1"])


def check_equal(sharded: dict[str, Any], single: dict[str, Any]) -> None:
    assert sharded["same_on_all_ranks"]
    assert sharded["losses"] == pytest.approx(single["losses"], rel=1e-5)
    assert sharded["partition_function"] == pytest.approx(single["partition_function"], rel=1e-5)
    assert sharded["drift"] == pytest.approx(single["drift"], rel=1e-5)
    for terms, single_terms in zip(sharded["terms"], single["terms"], strict=True):
        assert terms == pytest.approx(single_terms, rel=1e-5)
    for gradient, expected in zip(sharded["gradients"], single["gradients"], strict=True):
        assert (gradient - expected).abs().max() < 1e-5 * expected.abs().max()
    torch.testing.assert_close(sharded["memories"], single["memories"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("case", ["half", "cma half", "cma float16"])
def test_half_precision_rows_equal_one_process(results: dict[str, Any], case: str, world_size: int) -> None:
    single, sharded = results[f"{case} 1"], results[f"{case} {world_size}"]
    assert sharded["same_on_all_ranks"]
    # A last digit of float32 may decide how a row is rounded to bfloat16, whose steps below 1 are up to 2^-8.
    assert sharded["losses"] == pytest.approx(single["losses"], rel=1e-3)
    torch.testing.assert_close(sharded["memories"], single["memories"], rtol=0, atol=2**-7)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_the_same_on_any_number_of_ranks(results: dict[str, Any], dtype: torch.dtype, world_size: int) -> None:
    expected = torch.stack(MemoryBank(61, 16, seed=7, dtype=dtype).full())
    rows = results[f"rows {world_size}"][str(dtype)]
    assert torch.equal(rows["initial"], expected)
    assert torch.equal(rows["by rank"], expected)
    assert torch.equal(rows["reversed"], expected.flip(1))


@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_two_ranks_run_goes_on_at_another_number(results: dict[str, Any], world_size: int) -> None:
    single, resumed = results["drawn 1"], results[f"resumed {world_size}"]
    assert resumed["losses"] == pytest.approx(single["losses"][10:], rel=1e-5)
    torch.testing.assert_close(resumed["memories"], single["memories"], rtol=0, atol=1e-5)


def test_no_rank_holds_more_than_its_rows(results: dict[str, Any]) -> None:
    # The largest tensors are the rank's own rows: not all N, nor all vectors of a batch (12 queries, 10,000 negatives).
    own_rows = 100_000 * 16
    assert own_rows < 12 * 10_000 * 16
    assert results["largest tensors"] == [own_rows] * 4
    # Its positives (8 for each of its rows) and what looks them up are smaller.
    assert results["largest tensors of CMA"] == [own_rows] * 4


def test_something_happens_in_these_runs(results: dict[str, Any]) -> None:
    run = results["drawn 1"]
    assert len(set(run["losses"])) == 20
    assert (run["gradients"].abs().amax(dim=1) > 0.01).all()
    changed = (run["memories"] - torch.stack(MemoryBank(61, 16, seed=7).full())).norm(dim=2)
    assert (changed > 0.1).all(dim=0).sum() > 50
    assert set(run["terms"][0]) == {
        "video_to_audio",
        "audio_to_video",
        "cross",
        "video_to_video",
        "audio_to_audio",
        "within",
    }
    cma = results["cma 1"]
    assert len(set(cma["losses"])) == 20
    assert len(cma["terms"][0]) == 12
    assert all(value > 0 for terms in cma["terms"] for value in terms.values())
    assert all(drift > 0.01 for drift in cma["drift"].values())


def test_every_rank_owns_its_part(results: dict[str, Any]) -> None:
    assert results["drawn 4"]["owned"] == [16, 16, 16, 13]
    assert results["drawn 3"]["owned"] == [21, 21, 19]
    assert results["tiny 4"]["owned"] == [1, 1, 1, 0]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_positives_of_any_instances_reach_every_rank(results: dict[str, Any], world_size: int) -> None:
    for num_instances, looked_up in zip((3, 61), results[f"positives {world_size}"], strict=True):
        positives = looked_up["given"]
        assert positives.shape == (num_instances, 1)
        assert len(looked_up["found"]) == world_size
        for found in looked_up["found"]:
            assert torch.equal(found, positives[looked_up["index"]])
        assert torch.equal(looked_up["held"], positives)


def test_traffic_depends_on_neither_instances_nor_negatives(results: dict[str, Any]) -> None:
    # Bytes that one of four ranks gives, with three samples each, two modalities of 16 float32, and int64 instances;
    # a float64 for each of four terms.
    embeddings, instances = 3 * 2 * 16 * 4, 3 * 8
    gather = [("_allgather_base_", embeddings), ("_allgather_base_", instances)]
    scatter = [("_reduce_scatter_base_", 4 * embeddings)]
    expected = {
        "traffic": [*gather, ("allreduce_", 4 * 8), *scatter],
        # Five int32 positives of each of twelve samples; eight terms.
        "traffic of CMA": [*gather, ("allreduce_", 12 * 5 * 4), ("allreduce_", 8 * 8), *scatter],
    }
    expected["traffic of parts"] = 3 * expected["traffic of CMA"]
    for case, collectives in expected.items():
        assert len(results[case]) == 4
        for traffic in results[case].values():
            assert traffic == collectives


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("made too early", "bank was made for 1 rank(s) but the process group now has 4"),
        ("unequal batches", "batch size must be the same on all ranks but is [2, 3, 2, 3]"),
        ("unequal seeds", "(num_instances, dim, seed) must be the same on all ranks but is [(20, 16, 0), (20, 16, 1)"),
        ("unequal positives", "number of positives must be the same on all ranks but is [1, 2, 1, 2]"),
        ("changed batch", "this rank's batch has 3 samples after batches of 2"),
    ],
)
def test_what_would_hang_is_an_error_on_every_rank(results: dict[str, Any], case: str, message: str) -> None:
    assert len(results[case]) == 4
    for error in results[case]:
        assert message in error
