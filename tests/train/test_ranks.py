"""A run on two ranks: its losses are those of one process on the same global batches."""

import subprocess

import pytest
import torch

from avid_pipeline.models import load_pretrained
from avid_pipeline.shards_spec.storage import open_storage
from avid_pipeline.train.checkpoint import latest_checkpoint, restore_bank
from avid_pipeline.train.memory_bank import MemoryBank
from avid_pipeline.train.run_log import read_metrics
from avid_pipeline.train.trainer import train
from tests.train.runs import AGREEMENT, SMALL, command, losses, settings

# In float32, rounding decides which of two nearly equal values ReLU and max pooling let through, and that grows: the
# losses of one process and two agree for a few steps only, as do those of one process and itself with its clips in
# another order. Here only the loss is float32, and they agree for longer.
EXACT = {
    "data": SMALL["data"] | {"batch_size": 10, "clips_per_instance": 2},
    "clip": SMALL["clip"] | {"crop_size": 32},
    "epochs": 2,
    "compute": {"precision": "float64"},
    "optimizer": {"learning_rate": 1e-4},
}
CASES = {
    "AVID": {},
    "AVID+CMA": {"agreement": AGREEMENT},
    "groups of five clips": {"model": SMALL["model"] | {"batch_norm_clips": 5}},
    "parts": {
        "compute": {"precision": "float64", "accumulate": 2},
        "data": SMALL["data"] | {"batch_size": 8, "clips_per_instance": 2},
    },
    "memories by a pass": {"memory": {"init": "forward"}},
}


def bank(folder):
    found = MemoryBank(10, 8, seed=9)
    restore_bank(open_storage(folder), latest_checkpoint(open_storage(folder)), found)
    return torch.stack(found.full())


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_are_one_process(small_dataset, tmp_path, case):
    changes = EXACT | CASES[case]
    two, one = tmp_path / "two", tmp_path / "one"
    evaluation = {"evaluation": {"data": str(small_dataset)}}
    arguments = command(tmp_path, small_dataset, two, "--from-scratch", ranks=2, **changes, **evaluation)
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 process(es)" in done.stdout
    train(settings(**changes, **evaluation), str(small_dataset), str(one), from_scratch=True)
    assert [step for step, _ in losses(two)] == list(range(1, 5))
    assert [loss for _, loss in losses(two)] == pytest.approx([loss for _, loss in losses(one)], rel=1e-5)
    torch.testing.assert_close(bank(two), bank(one), rtol=0, atol=1e-4)
    for name, expected in load_pretrained(one).state_dict().items():
        torch.testing.assert_close(load_pretrained(two).state_dict()[name], expected, rtol=1e-3, atol=1e-4)
    of_two, of_one = (
        [entry for entry in read_metrics(folder) if any(name.startswith("retrieval/") for name in entry)]
        for folder in (two, one)
    )
    assert len(of_two) == len(of_one) == 2
    for ours, theirs in zip(of_two, of_one, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    if case == "AVID+CMA":
        for folder in (one, two):
            assert "positives/class_purity" in read_metrics(folder)[-2]


@pytest.mark.slow
def test_a_run_goes_on_at_another_number_of_ranks(small_dataset, tmp_path):
    train(settings(**EXACT), str(small_dataset), str(tmp_path / "one"))
    moved = tmp_path / "moved"
    half = EXACT | {"epochs": 1}
    begun = command(tmp_path, small_dataset, moved, ranks=2, **half)
    done = subprocess.run(begun, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    state = train(settings(**EXACT), str(small_dataset), str(moved), resume=True)
    assert state.step == 4
    expected = [loss for _, loss in losses(tmp_path / "one")]
    assert [loss for _, loss in losses(moved)] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_float32_begins_alike(small_dataset, tmp_path):
    changes = EXACT | {"epochs": 1, "compute": {"precision": "float32"}}
    arguments = command(tmp_path, small_dataset, tmp_path / "two", ranks=2, **changes)
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    train(settings(**changes), str(small_dataset), str(tmp_path / "one"))
    (_, first), (_, second) = losses(tmp_path / "two")
    (_, expected), (_, later) = losses(tmp_path / "one")
    assert first == pytest.approx(expected, rel=1e-5)
    assert second == pytest.approx(later, rel=1e-2)
