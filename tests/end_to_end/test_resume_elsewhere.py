"""A run that was killed goes on with another number of ranks and loader threads, and sees what it would have seen."""

import json
from collections import defaultdict
from pathlib import Path

import pytest

from tests.ranks import launch_ranks

WORKER = Path(__file__).with_name("recording_worker.py")


def run(dataset: Path, output: Path, records: Path, ranks: int, workers: int, killed_before: int = 0) -> None:
    records.mkdir()
    arguments = (records.with_suffix(".meeting"), dataset, output, records, workers, killed_before)
    done = launch_ranks(WORKER, ranks, *arguments, check=not killed_before)
    if killed_before:
        assert "a rank ended with -9" in done.stderr, done.stderr


def seen(records: Path) -> dict[int, set[tuple[int, int, str]]]:
    """Step to the clips of its global batch: instance, visit, pixels and sound."""
    steps = defaultdict(set)
    for path in records.iterdir():
        for line in path.read_text().splitlines():
            step, clip = json.loads(line)
            steps[step].add(tuple(clip))
    return dict(steps)


@pytest.fixture(scope="module")
def undisturbed(small_dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    run(small_dataset, folder / "run", folder / "records", ranks=1, workers=1)
    return seen(folder / "records")


def test_the_undisturbed_run_is_what_the_others_are_compared_with(undisturbed):
    assert sorted(undisturbed) == list(range(1, 13))
    assert all(len({instance for instance, _, _ in clips}) == 4 for clips in undisturbed.values())
    assert len(set().union(*undisturbed.values())) == 48


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [((2, 1), (1, 3)), ((1, 2), (2, 1))])
def test_killed_and_resumed_elsewhere(small_dataset, undisturbed, tmp_path, before, after):
    output, first, rest = tmp_path / "run", tmp_path / "first", tmp_path / "rest"
    ranks, workers = before
    run(small_dataset, output, first, ranks, workers, killed_before=6)
    ranks, workers = after
    run(small_dataset, output, rest, ranks, workers)
    assert {step: clips for step, clips in undisturbed.items() if step <= 5} == seen(first)
    assert {step: clips for step, clips in undisturbed.items() if step > 5} == seen(rest)
