"""Class purity of positives: by hand, against brute force, and on several ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avid_pipeline.collectives import RankGroup
from avid_pipeline.errors import ConfigError
from avid_pipeline.train import class_purity
from avid_pipeline.train.class_purity import LabelTable
from tests.ranks import run_ranks

WORKER = Path(__file__).with_name("label_worker.py")


def make_table(num_rows: int, num_classes: int, labels: dict[int, tuple[int, ...]]) -> LabelTable:
    table = LabelTable(range(num_rows), num_classes, RankGroup())
    table.learn(torch.tensor(list(labels), dtype=torch.int64), list(labels.values()))
    return table


def brute_force(labels: dict[int, tuple[int, ...]], index: list[int], candidates: list[list[int]]) -> float | None:
    """Plain Python: pairs of two rows with classes that have one in common, among those of two rows with classes."""
    pairs = [
        (set(labels[query]), set(labels[candidate]))
        for query, row in zip(index, candidates, strict=True)
        for candidate in row
        if labels.get(query) and labels.get(candidate)
    ]
    return sum(bool(ours & theirs) for ours, theirs in pairs) / len(pairs) if pairs else None


def test_by_hand() -> None:
    # Row 4 was never seen and row 3 has no label, so neither counts.
    table = make_table(6, 527, {0: (0, 526), 1: (526,), 2: (63, 64), 3: (), 5: (64,)})
    index, candidates = torch.tensor([0, 2, 3]), torch.tensor([[1, 2, 3, 4], [5, 0, 4, 3], [0, 1, 2, 5]])
    # 0 and 1 share 526, 0 and 2 nothing; 2 and 5 share 64, 2 and 0 nothing.
    assert table.purity(index, candidates) == 2 / 4
    assert table.purity(index[:1], candidates[:1, :1]) == 1
    assert table.purity(index[:1], candidates[:1, 1:2]) == 0
    assert table.purity(index[2:], candidates[2:]) is None


def test_labels_of_later_batches_count_from_then_on() -> None:
    table = make_table(4, 3, {0: (1,), 1: (1,)})
    index, candidates = torch.tensor([0]), torch.tensor([[1, 2, 3]])
    assert table.purity(index, candidates) == 1
    table.learn(torch.tensor([2, 3]), [(2,), (0, 2)])
    assert table.purity(index, candidates) == pytest.approx(1 / 3)


def test_data_without_labels_have_no_purity() -> None:
    unlabelled = make_table(3, 0, {0: (), 1: ()})
    assert unlabelled.purity(torch.tensor([0]), torch.tensor([[1]])) is None
    assert make_table(3, 5, {0: (), 1: (4,)}).purity(torch.tensor([0]), torch.tensor([[1]])) is None


class_sets = st.sets(st.sampled_from([0, 1, 31, 62, 63, 64, 127, 128, 199]), max_size=3).map(
    lambda classes: tuple(sorted(classes))
)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_equals_brute_force(data: st.DataObject) -> None:
    num_rows = data.draw(st.integers(2, 12))
    rows = st.integers(0, num_rows - 1)
    labels = data.draw(st.dictionaries(rows, class_sets, max_size=num_rows))
    index = data.draw(st.lists(rows, min_size=1, max_size=6))
    width = data.draw(st.integers(0, 5))
    candidates = data.draw(
        st.lists(st.lists(rows, min_size=width, max_size=width), min_size=len(index), max_size=len(index))
    )
    table = make_table(num_rows, 200, labels)
    given_candidates = torch.tensor(candidates, dtype=torch.int64).view(len(index), width)
    assert table.purity(torch.tensor(index), given_candidates) == brute_force(labels, index, candidates)


def test_random_candidates_give_chance() -> None:
    # Four classes, evenly: two different rows of a hundred share one with probability 24 / 99.
    table = make_table(100, 4, {row: (row % 4,) for row in range(100)})
    index = torch.arange(100)
    others = torch.randint(1, 100, (100, 400), generator=torch.Generator().manual_seed(0))
    assert table.purity(index, (index[:, None] + others) % 100) == pytest.approx(24 / 99, abs=0.01)


def test_what_does_not_fit_is_refused() -> None:
    table = LabelTable(range(4), 3, RankGroup())
    for label in (3, -1):
        with pytest.raises(ConfigError, match=f"label {label}: expected a class from 0 to 2"):
            table.learn(torch.tensor([0]), [(label,)])
    with pytest.raises(ConfigError, match="expected those of 2 clips, found 1"):
        table.learn(torch.tensor([0, 1]), [(1,)])
    with pytest.raises(ConfigError, match=r"found \[2\] and \[3, 1\]"):
        table.purity(torch.tensor([0, 1]), torch.tensor([[0], [1], [2]]))


def test_the_buffer_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(class_purity, "_MOST_BUFFERED", 10)
    table = LabelTable(range(4), 3, RankGroup())
    for _ in range(9):
        table.learn(torch.tensor([0, 1, 2, 3]), [(0,), (0,), (1,), (2,)])
        assert sum(len(part) for part in table._buffer) < 10
    assert table.purity(torch.tensor([0]), torch.tensor([[1, 2, 3]])) == pytest.approx(1 / 3)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What four processes computed in groups of one to four of them; see label_worker.py."""
    return run_ranks(WORKER, 4, tmp_path_factory.mktemp("labels"))


def worker_values(num_classes: int) -> list[float | None]:
    """What the worker's steps should give, from its own labels and batches but by brute force."""
    worker: dict[str, Any] = {"__name__": "label_worker"}
    exec(compile(WORKER.read_text(), str(WORKER), "exec"), worker)
    known: dict[int, tuple[int, ...]] = {}
    found = []
    for step in range(worker["STEPS"]):
        index, candidates = worker["batch_of"](step)
        known |= dict(zip(index.tolist(), worker["labels_of"](num_classes, index), strict=True))
        if step % 2:
            found.append(brute_force(known, index.tolist(), candidates.tolist()))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("num_classes", [3, 64, 200])
def test_any_number_of_ranks_gives_the_same(results: dict[str, Any], num_classes: int, world_size: int) -> None:
    expected = worker_values(num_classes)
    assert all(value is not None and 0 < value < 1 for value in expected)
    for of_rank in results[f"{world_size}"]:
        assert of_rank[num_classes] == expected
    if num_classes == 200:
        assert results[f"small buffers {world_size}"] == [expected] * world_size


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("clips", "number of clips whose labels were learned must be the same on all ranks but is [2, 3, 2, 3]"),
        ("queries", "number of queries must be the same on all ranks but is [12, 11, 10, 9]"),
        ("candidates", "number of candidates must be the same on all ranks but is [5, 4, 3, 2]"),
    ],
)
def test_unequal_ranks_are_an_error_on_all(results: dict[str, Any], case: str, message: str) -> None:
    assert len(results["unequal"]) == 4
    for errors in results["unequal"]:
        assert message in errors[case]


@pytest.mark.slow
def test_ranks_talk_only_when_asked(results: dict[str, Any]) -> None:
    # Three counts; 20 batches of 12 rows with two words each; the queries' two words; two counts.
    assert results["collectives"] == {
        "learning": [],
        "asking": [3, 20 * 12 * 3, 12 * 2, 2],
        "asking again": [3, 12 * 2, 2],
    }
