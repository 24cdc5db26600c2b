"""AVID+CMA as a run: what it starts from, its positives in log and checkpoint, and the published models."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import zarr
from click.testing import CliRunner

from avid_pipeline.errors import CheckpointError, ConfigError
from avid_pipeline.models import AVModel, load_pretrained
from avid_pipeline.shards_spec.storage import open_storage
from avid_pipeline.train.agreement import find_positives
from avid_pipeline.train.checkpoint import latest_checkpoint, restore_bank
from avid_pipeline.train.cli import main
from avid_pipeline.train.memory_bank import MemoryBank
from avid_pipeline.train.run_log import read_metrics
from avid_pipeline.train.trainer import train
from tests.processes import run
from tests.train.runs import AGREEMENT, SMALL, command, losses, settings

CMA = {"agreement": AGREEMENT}


@pytest.fixture(scope="module")
def avid(small_dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("avid")
    return folder, train(settings(), str(small_dataset), str(folder))


def saved_bank(folder, rows=10):
    bank = MemoryBank(rows, 8, seed=9)
    restore_bank(open_storage(folder), latest_checkpoint(open_storage(folder)), bank)
    return bank.full()


def test_starts_where_avid_ended(small_dataset, avid, tmp_path):
    folder, before = avid
    state = train(settings(**CMA, start_from=str(folder), epochs=1), str(small_dataset), str(tmp_path))
    log = (tmp_path / "train.log").read_text()
    assert f"starting from {folder}" in log
    assert "searching 2 positives of 10 instances by consensus" in log
    assert state.criterion.partition_function == before.criterion.partition_function
    assert torch.equal(state.positives, find_positives(*saved_bank(folder), 2, "consensus"))
    entries = read_metrics(tmp_path)
    assert {"loss/instance_cross", "loss/positive_within", "memory/video_drift"} <= entries[0].keys()
    assert 0 <= entries[-1]["positives/class_purity"] <= 1
    assert 0 <= entries[-1]["positives/class_purity_at_random"] <= 1
    group = zarr.open_group(str(tmp_path / latest_checkpoint(open_storage(tmp_path)) / "memory_bank.zarr"), mode="r")
    assert np.array_equal(group["positives"][:], state.positives.numpy())


def test_positives_are_searched_again_every_so_many_epochs(small_dataset, avid, tmp_path):
    agreement = AGREEMENT | {"resample_every": 2, "kind": "union"}
    config = settings(agreement=agreement, start_from=str(avid[0]), epochs=5)
    train(config, str(small_dataset), str(tmp_path))
    assert (tmp_path / "train.log").read_text().count("by union") == 3


def test_resumed_in_the_middle_of_an_epoch_with_the_same_positives(small_dataset, avid, tmp_path):
    agreement = AGREEMENT | {"resample_every": 2}
    data = SMALL["data"] | {"batch_size": 2}
    changes = {"agreement": agreement, "start_from": str(avid[0]), "data": data, "epochs": 3}
    train(settings(**changes, checkpoint={"every_steps": 1}), str(small_dataset), str(tmp_path))
    expected = losses(tmp_path)
    assert len(expected) == 15
    for step in (12, 10, 8, 5, 3):  # also at the ends of epochs, with and without a search behind them
        for folder in (tmp_path / "checkpoints").iterdir():
            if int(folder.name[-8:]) > step:
                shutil.rmtree(folder)
        (tmp_path / "latest").write_text(f"checkpoints/step-{step:08d}\n")
        config = settings(**changes, checkpoint={"every_epochs": 100})
        train(config, str(small_dataset), str(tmp_path), resume=True)
        assert losses(tmp_path) == expected, step


def test_nothing_to_start_from_is_refused(small_dataset, tmp_path):
    with pytest.raises(ConfigError, match="--from-scratch"):
        train(settings(**CMA), str(small_dataset), str(tmp_path))
    train(settings(**CMA, epochs=1), str(small_dataset), str(tmp_path), from_scratch=True)
    assert len(losses(tmp_path)) == 2


def test_a_bank_of_other_data_is_refused_unless_it_is_filled_anew(small_dataset, avid, tmp_path):
    data = shutil.copytree(small_dataset, tmp_path / "other")
    content = json.loads((data / "manifest.json").read_text())
    content["split"] = "another"
    (data / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"memory\.init=forward"):
        train(settings(**CMA, start_from=str(avid[0])), str(data), str(tmp_path / "run"))
    config = settings(**CMA, start_from=str(avid[0]), memory={"init": "forward"}, epochs=1)
    state = train(config, str(data), str(tmp_path / "run"))
    assert state.criterion.partition_function != avid[1].criterion.partition_function


def test_another_network_is_refused(small_dataset, avid, tmp_path):
    config = settings(**CMA, start_from=str(avid[0]), model={"video_depth": 18, "projection": (16, 8)})
    with pytest.raises(CheckpointError, match="video_depth"):
        train(config, str(small_dataset), str(tmp_path))


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A file as the published ones are, for ten instances; weights by the golden recipe."""
    model, random = AVModel(10, (16, 8)), np.random.RandomState(0)
    state = {}
    for name, tensor in sorted(model.state_dict().items()):
        shape = tuple(tensor.shape)
        if name.endswith("num_batches_tracked"):
            value = np.zeros(shape, dtype=np.int64)
        elif "running_var" in name:
            value = (0.5 + random.rand(*shape)).astype(np.float32)
        elif len(shape) == 1:
            value = (float("weight" in name) + 0.1 * random.randn(*shape)).astype(np.float32)
        else:
            value = (random.randn(*shape) * np.sqrt(2 / np.prod(shape[1:]))).astype(np.float32)
        state[f"module.{name}"] = torch.from_numpy(value)
    memories = [F.normalize(torch.from_numpy(random.randn(10, 8).astype(np.float32)), dim=1) for _ in range(2)]
    criterion = {
        "nce_average.view1_mem": memories[0],
        "nce_average.view2_mem": memories[1],
        "criterion.avg_exp_score": torch.tensor(1.7),
    }
    path = tmp_path_factory.mktemp("published") / "AVID.pth.tar"
    torch.save({"epoch": 30, "model": state, "optimizer": {}, "train_criterion": criterion}, path)
    return path, state, memories


@pytest.mark.parametrize("imported", [True, False], ids=["imported", "as it is"])
def test_a_published_checkpoint_goes_on(small_dataset, published, tmp_path, imported):
    path, weights, memories = published
    start = path
    if imported:
        start = tmp_path / "imported"
        done = CliRunner().invoke(main, ["import-published", str(path), "--output", str(start)])
        assert done.exit_code == 0, done.output
    config = settings(**CMA, start_from=str(start), epochs=1, optimizer={"learning_rate": 1e-12})
    state = train(config, str(small_dataset), str(tmp_path / "run"))
    assert state.criterion.partition_function == pytest.approx(1.7)
    assert torch.equal(state.positives, find_positives(*memories, 2, "consensus"))
    for name, parameter in state.model.named_parameters():
        torch.testing.assert_close(parameter.detach(), weights[f"module.{name}"], rtol=0, atol=1e-6)
    assert "which instance each row" in (tmp_path / "run" / "train.log").read_text()
    assert len(losses(tmp_path / "run")) == 2


def test_export_and_errors_on_the_command_line(avid, published, small_dataset, tmp_path):
    runner = CliRunner()
    for number, checkpoint in enumerate((avid[0], published[0])):
        target = tmp_path / f"weights-{number}.safetensors"
        done = runner.invoke(main, ["export", str(checkpoint), "--to", str(target)])
        assert done.exit_code == 0, done.output
        expected = load_pretrained(checkpoint).state_dict()
        for name, tensor in load_pretrained(target).state_dict().items():
            assert torch.equal(tensor, expected[name])
        again = runner.invoke(main, ["export", str(checkpoint), "--to", str(target)])
        assert again.exit_code == 1
        assert "Traceback" not in again.output
    for arguments in (
        ["import-published", str(tmp_path / "none.pth.tar"), "--output", str(tmp_path / "x")],
        ["export", str(tmp_path), "--to", str(tmp_path / "x.safetensors")],
    ):
        done = runner.invoke(main, arguments)
        assert done.exit_code == 1
        assert "Error: " in done.output
        assert not (tmp_path / "x").exists()
    assert "import-published" in runner.invoke(main, ["--help"]).output
    for arguments in (["run", "--help"], ["config.yaml", "--help"]):
        assert "--start-from" in runner.invoke(main, arguments).output


def test_the_command_line_starts_from_a_checkpoint(small_dataset, avid, tmp_path):
    arguments = command(tmp_path, small_dataset, tmp_path / "run", "--start-from", str(avid[0]), **CMA, epochs=1)
    assert "training AVID+CMA" in run(*arguments, cwd=tmp_path).stdout
    assert Path(tmp_path / "run" / "latest").exists()
