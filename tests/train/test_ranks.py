"""A run on two ranks: its losses are those of one process on the same global batches."""

import functools

import pytest
import torch

from avid_pipeline.models import load_pretrained
from avid_pipeline.shards_spec.storage import open_storage
from avid_pipeline.train.checkpoint import latest_checkpoint, restore_bank
from avid_pipeline.train.memory_bank import MemoryBank
from avid_pipeline.train.run_log import read_metrics
from avid_pipeline.train.trainer import train
from tests.train.runs import AGREEMENT, SMALL, losses, settings, train_on_ranks

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
HALF = EXACT | {"epochs": 1}
FLOAT32 = HALF | {"compute": {"precision": "float32"}}


def bank(folder):
    found = MemoryBank(10, 8, seed=9)
    restore_bank(open_storage(folder), latest_checkpoint(open_storage(folder)), found)
    return torch.stack(found.full())


@pytest.fixture(scope="module")
def of_two_ranks(small_dataset, tmp_path_factory):
    """Folder of what two ranks have trained: all cases, and two short runs."""
    folder = tmp_path_factory.mktemp("two")
    evaluation = {"evaluation": {"data": str(small_dataset)}}
    runs = {case: EXACT | changes | evaluation for case, changes in CASES.items()}
    train_on_ranks(2, folder, small_dataset, runs | {"half": HALF, "float32": FLOAT32})
    return folder


@pytest.fixture(scope="module")
def of_one_process(small_dataset, tmp_path_factory):
    """Gives the folder of what one process has trained."""

    @functools.cache
    def folder_of(case):
        folder = tmp_path_factory.mktemp("one")
        config = settings(**EXACT | CASES[case], evaluation={"data": str(small_dataset)})
        train(config, str(small_dataset), str(folder), from_scratch=True)
        return folder

    return folder_of


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_are_one_process(of_two_ranks, of_one_process, case):
    two, one = of_two_ranks / case, of_one_process(case)
    assert "2 process(es)" in (two / "train.log").read_text()
    assert [step for step, _ in losses(two)] == list(range(1, 5))
    assert [loss for _, loss in losses(two)] == pytest.approx([loss for _, loss in losses(one)], rel=1e-5)
    torch.testing.assert_close(bank(two), bank(one), rtol=0, atol=1e-4)
    found = load_pretrained(two).state_dict()
    for name, expected in load_pretrained(one).state_dict().items():
        torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=1e-4)
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
def test_a_run_goes_on_at_another_number_of_ranks(small_dataset, of_two_ranks, of_one_process):
    state = train(settings(**EXACT), str(small_dataset), str(of_two_ranks / "half"), resume=True)
    assert state.step == 4
    expected = [loss for _, loss in losses(of_one_process("AVID"))]
    assert [loss for _, loss in losses(of_two_ranks / "half")] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_float32_begins_alike(small_dataset, of_two_ranks, tmp_path):
    train(settings(**FLOAT32), str(small_dataset), str(tmp_path))
    (_, first), (_, second) = losses(of_two_ranks / "float32")
    (_, expected), (_, later) = losses(tmp_path)
    assert first == pytest.approx(expected, rel=1e-5)
    assert second == pytest.approx(later, rel=1e-2)
