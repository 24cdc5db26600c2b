import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from avid_pipeline.errors import CheckpointError
from avid_pipeline.models import load_pretrained
from avid_pipeline.shards_spec.storage import open_storage
from avid_pipeline.train.checkpoint import latest_checkpoint, read_record
from avid_pipeline.train.cli import main
from avid_pipeline.train.config import TrainConfig
from avid_pipeline.train.run_log import read_metrics
from avid_pipeline.train.trainer import train

DEMO = Path(__file__).resolve().parents[2] / "configs" / "demo.yaml"
SMALL = {
    "epochs": 2,
    "model": {"video_depth": 10, "projection": (16, 8)},
    "clip": {"crop_size": 16, "video_seconds": 0.25, "audio_seconds": 0.3},
    "data": {"batch_size": 5, "clips_per_instance": 1, "workers": 1},
    "loss": {"num_negatives": 8},
    "optimizer": {"learning_rate": 1e-3, "milestones": (1,)},
    "log_every": 1,
}


def settings(**changes):
    return TrainConfig.model_validate(SMALL | changes)


def losses(folder):
    return [(entry["step"], entry["loss/total"]) for entry in read_metrics(folder)]


@pytest.fixture(scope="module")
def undisturbed(small_dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, train(settings(), str(small_dataset), str(folder))


def test_what_a_run_leaves(undisturbed):
    folder, state = undisturbed
    assert state.step == 4
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    entries = read_metrics(folder)
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4]
    assert {"clips_per_second", "data_wait_share", "learning_rate", "loss/cross"} <= entries[0].keys()
    assert entries[-1]["learning_rate"] == pytest.approx(1e-4)
    assert list((folder / "tensorboard").iterdir())
    model = load_pretrained(folder)
    assert model.video_depth == 10
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state.model.state_dict()[name])


def test_resumed_equals_undisturbed_bit_for_bit(small_dataset, undisturbed, tmp_path):
    folder, state = undisturbed
    train(settings(epochs=1), str(small_dataset), str(tmp_path))
    resumed = train(settings(), str(small_dataset), str(tmp_path), resume=True)
    assert losses(tmp_path) == losses(folder)
    for name, tensor in resumed.model.state_dict().items():
        assert torch.equal(tensor, state.model.state_dict()[name]), name
    for ours, theirs in zip(resumed.criterion.bank.full(), state.criterion.bank.full(), strict=True):
        assert torch.equal(ours, theirs)


def invoke(*arguments):
    return CliRunner().invoke(main, [str(DEMO), *map(str, arguments)])


def assert_clear_error(result, message):
    assert result.exit_code == 1
    assert message in result.output
    assert "Traceback" not in result.output


def test_errors_on_the_command_line(small_dataset, undisturbed, tmp_path):
    folder, _ = undisturbed
    data = ("--data", small_dataset)
    assert_clear_error(invoke("--data", tmp_path / "none", "--output", tmp_path), "does not exist")
    assert_clear_error(invoke(*data, "--output", tmp_path, "--set", "los.cross=1"), "los: unknown key")
    assert_clear_error(invoke(*data, "--output", folder), "--resume")
    assert_clear_error(
        invoke(*data, "--output", folder, "--resume", "--set", "data.batch_size=2"), "settings it began with"
    )
    assert_clear_error(invoke(*data, "--output", tmp_path / "x"), "use at most 10")


def test_other_data_are_refused(small_dataset, undisturbed, tmp_path):
    folder, _ = undisturbed
    data = shutil.copytree(small_dataset, tmp_path / "other")
    content = json.loads((data / "manifest.json").read_text())
    content["split"] = "another"
    (data / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="fingerprint"):
        train(settings(), str(data), str(folder), resume=True)


@pytest.mark.parametrize("file", ["model.safetensors", "trainer.pt"])
def test_a_damaged_checkpoint_is_named(small_dataset, undisturbed, tmp_path, file):
    folder = shutil.copytree(undisturbed[0], tmp_path / "run")
    path = folder / latest_checkpoint(open_storage(folder)) / file
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match=file):
        train(settings(), str(small_dataset), str(folder), resume=True)


def command(data, output, *more):
    sets = ["epochs=3", "clip.crop_size=16", "clip.audio_seconds=0.3", "clip.video_seconds=0.25", "data.workers=1"]
    sets += ["data.batch_size=4", "data.clips_per_instance=2", "loss.num_negatives=8", "log_every=1"]
    arguments = [str(DEMO), "--data", str(data), "--output", str(output), *more]
    return arguments + [word for setting in sets for word in ("--set", setting)]


@pytest.mark.slow
def test_killed_and_resumed(small_dataset, tmp_path):
    run = [sys.executable, "-m", "avid_pipeline.train", *command(small_dataset, tmp_path / "run", "--resume")]
    process = subprocess.Popen(run, start_new_session=True, cwd=tmp_path, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "latest").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert read_record(open_storage(tmp_path / "run")).epoch >= 1
    done = subprocess.run(run, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "training from step" in done.stdout
    assert [step for step, _ in losses(tmp_path / "run")] == list(range(1, 16))


@pytest.mark.slow
def test_torchrun_with_two_ranks(small_dataset, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = [*launcher, "-m", "avid_pipeline.train", *command(small_dataset, tmp_path / "run")]
    done = subprocess.run(run, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 process(es)" in done.stdout
    assert len(losses(tmp_path / "run")) == 15
    assert load_pretrained(tmp_path / "run").video_depth == 10
