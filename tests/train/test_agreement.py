"""Agreement search: golden numbers, a written-out reference, ties, any cut of the work, any number of ranks, errors."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from avid_pipeline.errors import ConfigError
from avid_pipeline.train.agreement import find_positives
from avid_pipeline.train.nearest_rows import choose_tile
from tests.processes import run
from tests.ranks import run_ranks

TESTS = Path(__file__).parents[1]
WORKER = Path(__file__).with_name("agreement_worker.py")
BENCHMARK = TESTS.parent / "benchmarks" / "agreement.py"
KINDS: list[Any] = ["consensus", "union", "video", "audio"]
WORLD_SIZES = [1, 2, 3, 4]


def reference_positives(video: Tensor, audio: Tensor, k: int, kind: str) -> Tensor:
    """All pairs in float64, each added up in the same way; equal ones in the order of their numbers."""
    similarities = [(m.double()[:, None] * m.double()[None]).numpy().sum(axis=2) for m in (video, audio)]
    combine = {"consensus": np.minimum, "union": np.maximum, "video": lambda v, a: v, "audio": lambda v, a: a}[kind]
    scores = combine(*similarities)
    np.fill_diagonal(scores, -np.inf)
    return torch.from_numpy(np.sort(np.argsort(-scores, axis=1, kind="stable")[:, :k], axis=1))


def unit_rows(num_instances: int, dim: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    rows = torch.randn(2, num_instances, dim, generator=torch.Generator().manual_seed(seed))
    video, audio = F.normalize(rows, dim=2)
    return video, audio


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block_bytes", [None, 1, 1 << 16])
def test_golden(kind: Any, block_bytes: int | None) -> None:
    with np.load(TESTS / "golden" / "criteria.npz") as golden:
        video, audio = (torch.from_numpy(golden[f"cma_{name}_memory"]) for name in ("video", "audio"))
        expected = torch.from_numpy(golden[f"cma_positives_{kind}"])
    found = find_positives(video, audio, 8, kind, block_bytes=block_bytes)
    assert found.dtype == torch.int64
    assert torch.equal(found, expected)


@settings(max_examples=120, deadline=None)
@given(
    data=st.data(),
    num_instances=st.integers(2, 90),
    dim=st.integers(1, 40),
    kind=st.sampled_from(KINDS),
    block_bytes=st.sampled_from([1, 1 << 12, 1 << 14, 1 << 16, None]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    distinct=st.integers(1, 90),
    coarse=st.booleans(),
)
def test_equals_the_reference(
    data: st.DataObject,
    num_instances: int,
    dim: int,
    kind: Any,
    block_bytes: int | None,
    dtype: torch.dtype,
    distinct: int,
    coarse: bool,
) -> None:
    # Rows that occur several times, and coarse rows with equal similarities to different rows, make ties.
    k = data.draw(st.integers(1, num_instances - 1))
    seed = data.draw(st.integers(0, 1000))
    video, audio = unit_rows(num_instances, dim, seed)
    if coarse:
        video, audio = (video * 2).round() / 2, (audio * 2).round() / 2
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(0, min(distinct, num_instances), (num_instances,), generator=generator)
    video, audio = video[chosen].to(dtype), audio[chosen].to(dtype)
    found = find_positives(video, audio, k, kind, block_bytes=block_bytes)
    assert torch.equal(found, reference_positives(video, audio, k, kind))


def test_what_float32_cannot_tell_apart_is_decided_in_float64() -> None:
    # Rows that differ from one another by less than a float32 product's error.
    generator = torch.Generator().manual_seed(0)
    base = F.normalize(torch.randn(64, generator=generator), dim=0)
    video = base + 3e-8 * torch.randn(150, 64, generator=generator)
    float32_scores = video @ video.T
    expected = reference_positives(video, video, 9, "consensus")
    by_float32 = float32_scores.fill_diagonal_(-torch.inf).topk(9, dim=1).indices.sort(dim=1).values
    assert not torch.equal(by_float32, expected)
    for block_bytes in (1 << 14, None):
        assert torch.equal(find_positives(video, video, 9, block_bytes=block_bytes), expected)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_the_process_precision_does_not_matter(precision: str) -> None:
    video, audio = unit_rows(300, 64)
    expected = find_positives(video, audio, 9)
    try:
        torch.set_float32_matmul_precision(precision)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(find_positives(video, audio, 9), expected)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")


def test_all_rows_equal_gives_the_smallest_numbers() -> None:
    rows = torch.full((700, 8), 8**-0.5)
    found = find_positives(rows, rows, 3, block_bytes=1 << 16)
    assert found[0].tolist() == [1, 2, 3]
    assert found[2].tolist() == [0, 1, 3]
    assert (found[3:] == torch.arange(3)).all()


@pytest.mark.parametrize("block_bytes", [1, 1000, 1 << 20, 1 << 27])
def test_tile_keeps_to_its_budget(block_bytes: int) -> None:
    for num_columns in (1, 100, 8191, 10**8):
        for k in (1, 32, 5000):
            tile = choose_tile(block_bytes, num_columns, k)
            assert tile.columns % tile.group == 0
            assert tile.rows * tile.columns * 64 <= max(block_bytes, 64 * 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "agreement"}, "kind must be one of consensus, union, video, audio, not 'agreement'"),
        ({"k": 0}, "k must be a whole number from 1 to 9, less than the 10 instances, not 0"),
        ({"k": 10}, "not 10"),
        ({"audio_memory": torch.ones(9, 4)}, "must have one shape [N, D], not [10, 4] and [9, 4]"),
        ({"audio_memory": torch.ones(10, 4).double()}, "float32, bfloat16 or float16, not torch.float32 and torch.fl"),
        (
            {"audio_memory": torch.ones(10, 4).log().log().index_fill(0, torch.arange(6), 0)},
            "row 6 of the audio memory",
        ),
        ({"video_memory": torch.ones(10, 4).index_fill(0, torch.tensor([8, 9]), torch.nan)}, "row 8 of the video memo"),
    ],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"video_memory": torch.ones(10, 4), "audio_memory": torch.ones(10, 4), "k": 3}
    with pytest.raises(ConfigError) as error:
        find_positives(**arguments | change)
    assert message in str(error.value)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_equals_cpu(dtype: torch.dtype) -> None:
    chosen = torch.arange(3000) * 7 % 2000
    video, audio = (memory.to(dtype)[chosen] for memory in unit_rows(2000, 128))
    for kind in KINDS:
        found = find_positives(video.cuda(), audio.cuda(), 32, kind)
        assert found.is_cuda
        assert torch.equal(found.cpu(), find_positives(video, audio, 32, kind))


def test_benchmark_runs(tmp_path: Path) -> None:
    arguments = ["--instances", "70,300", "--k", "5", "--rounds", "1", "--dim", "8", "--data", "classes"]
    command = [sys.executable, str(BENCHMARK), *arguments, "--plot", str(tmp_path / "plot.png")]
    output = run(*command).stdout
    assert "300  all" in output
    assert (tmp_path / "plot.png").stat().st_size > 1000


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What four processes found in groups of one to four of them; see agreement_worker.py."""
    return run_ranks(WORKER, 4, tmp_path_factory.mktemp("agreement"))


@pytest.mark.slow
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_any_number_of_ranks_finds_the_same(results: dict[str, Any], world_size: int) -> None:
    single, several = results["1"], results[str(world_size)]
    assert len(several) == 2 * len(KINDS) + 6
    for case, found in several.items():
        assert torch.equal(found, single[case]), case


@pytest.mark.slow
def test_what_ranks_find_is_right(results: dict[str, Any]) -> None:
    sys.path.insert(0, str(WORKER.parent))
    try:
        from agreement_worker import example_memories
    finally:
        sys.path.pop(0)
    for kind in KINDS:
        expected = reference_positives(*example_memories(203, repeated=120), 7, kind)
        assert torch.equal(results["4"][f"{kind}, repeated"], expected)
        assert torch.equal(results["4"][kind], reference_positives(*example_memories(203), 7, kind))
    assert torch.equal(results["4"]["whole"], results["4"]["consensus, repeated"])
    assert results["4"]["tiny"].tolist() == [[1, 2], [0, 2], [0, 1]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("k", "k must be the same on all ranks but is [3, 4, 3, 4] (in rank order)"),
        ("kind", "kind must be the same on all ranks but is ['union', 'unison', 'union', 'union']"),
        ("D", "D must be the same on all ranks but is [16, 15, 14, 13]"),
        ("shapes", "rank 3: video and audio memories must have one shape [N, D], not [20, 16] and [19, 16]"),
        ("lengths", "all ranks must give the whole memory if sharded=False, but give [20, 19, 18, 17] rows"),
        ("row", "row 44 of the video memory holds NaN"),
        ("too many", "from 1 to 79, less than the 80 instances, not 80"),
    ],
)
def test_every_rank_gets_the_error(results: dict[str, Any], case: str, message: str) -> None:
    assert len(results["errors"][case]) == 4
    for error in results["errors"][case]:
        assert message in error


@pytest.mark.slow
def test_no_rank_holds_more_than_a_shard_and_a_block(results: dict[str, Any]) -> None:
    # Neither N x D nor rows x N: the largest tensors are a shard's rows.
    assert results["largest tensors"] == [2000 * 64] * 4
