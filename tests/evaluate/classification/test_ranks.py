"""Any number of ranks gives the same numbers, and counts every test instance once."""

import json
from pathlib import Path

import pytest
import torch

from avid_pipeline.collectives import RankGroup
from avid_pipeline.evaluate.classification.progress import MODEL_NAME
from avid_pipeline.evaluate.results import REPORT_NAME, RESULTS_NAME, read_results
from avid_pipeline.shards_spec.storage import open_storage
from tests.evaluate.classification import ranks_worker
from tests.evaluate.classification.labelled import (
    command,
    small_evaluated,
    write_config,
)
from tests.processes import run
from tests.ranks import run_ranks

# Neither the 14 instances to train on nor the 7 for tests divide by it.
RANKS = 3


@pytest.fixture(scope="module")
def places(folds, splits, tmp_path_factory):
    weights = small_evaluated(tmp_path_factory.mktemp("ranks")).identity.path
    return (str(folds), str(splits[0]), str(splits[1]), weights)


@pytest.fixture(scope="module")
def one_process(places, tmp_path_factory):
    step = ranks_worker.training._step
    try:
        return ranks_worker.evaluate(RankGroup(), tmp_path_factory.mktemp("one"), *places)
    finally:
        ranks_worker.training._step = step


@pytest.fixture(scope="module")
def several(places, tmp_path_factory):
    folder = tmp_path_factory.mktemp("several")
    return run_ranks(Path(ranks_worker.__file__), RANKS, folder, str(folder / "output"), *places)


@pytest.mark.parametrize("name", ["finetune", "linear", "cached"])
def test_steps_do_not_depend_on_the_number_of_ranks(one_process, several, name):
    ours, theirs = one_process[name]["steps"], several[name]["steps"]
    assert ours.shape == theirs.shape
    # Clips of each step, all counted.
    assert torch.equal(ours[:, -1], theirs[:, -1])
    assert torch.allclose(ours, theirs, rtol=1e-6)


def test_test_scores_are_equal_to_the_last_bit(one_process, several):
    for name, value in one_process["outcome"].items():
        theirs = several["outcome"][name]
        if isinstance(value, dict):
            assert all(torch.equal(value[classifier], theirs[classifier]) for classifier in value)
        else:
            assert torch.equal(value, theirs)
    # Every test instance is on one rank, and no rank is idle.
    assert len(several["shares"]) == RANKS
    assert all(several["shares"])
    assert [i for share in several["shares"] for i in share] == one_process["shares"][0]
    assert len(one_process["shares"][0]) == 7


def test_all_ranks_have_the_results_of_all_test_instances(one_process, several):
    for of_rank in several["of_ranks"]:
        assert of_rank == several["of_ranks"][0]
    for name, found in several["of_ranks"][0].items():
        accuracy = json.loads(found)["tables"][0]
        assert "7 test instances" in accuracy["note"]
        assert accuracy == json.loads(one_process[name]["results"])["tables"][0]


@pytest.mark.slow
def test_under_torchrun_the_first_rank_alone_speaks(one_process, folds, places, tmp_path):
    config = write_config(tmp_path / "config.yaml", ranks_worker.FINETUNE)
    output = tmp_path / "output"
    done = run(*command("finetune", config, places[-1], "--data", folds, "--fold", 1, "--output", output, ranks=2))
    assert (done.stdout + done.stderr).count("epoch 2/2 (network)") == 1
    assert done.stdout.count("mean class") == 1
    accuracy, _ = read_results(open_storage(output)).tables
    assert accuracy.model_dump(mode="json") == json.loads(one_process["finetune"]["results"])["tables"][0]
    assert sorted(path.name for path in output.iterdir()) == [MODEL_NAME, REPORT_NAME, RESULTS_NAME]
