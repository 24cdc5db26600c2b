"""Runs that are killed, stopped, or find a damaged checkpoint: their losses are those of an undisturbed run."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from avid_pipeline.errors import CheckpointError
from avid_pipeline.shards_spec.storage import open_storage
from avid_pipeline.train.checkpoint import latest_checkpoint, list_checkpoints, read_record
from avid_pipeline.train.run_log import read_metrics
from avid_pipeline.train.trainer import train
from tests.train.runs import AGREEMENT, SMALL, command, losses, settings

EPOCHS = 8
EVERY_STEP = {"checkpoint": {"every_steps": 1, "keep": 3}, "epochs": EPOCHS}
CMA = {"agreement": AGREEMENT | {"resample_every": 2}}


def start(arguments, folder):
    return subprocess.Popen(
        arguments, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def wait_for_steps(process, run, count):
    deadline = time.monotonic() + 120
    while len(read_metrics(run)) < count:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def workers(pid):
    """Processes that a launcher started, by their parent's number in /proc."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
        if parent == pid:
            found.append(int(path.parent.name))
    return sorted(found)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, CMA], ids=["AVID", "AVID+CMA"])
def test_kill_9_of_a_rank_under_torchrun_with_restarts(small_dataset, tmp_path, changes):
    # Both ranks start anew from the newest checkpoint; the user gave no --resume.
    # Three of them, for two numbers add up to the same in any order.
    changes = EVERY_STEP | {"data": SMALL["data"] | {"batch_size": 6, "clips_per_instance": 2}, "epochs": 6} | changes
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    scratch = ("--from-scratch",) if "agreement" in changes else ()
    undisturbed = start(command(tmp_path, small_dataset, calm, *scratch, ranks=3, **changes), tmp_path)
    output = undisturbed.communicate()[0]
    assert undisturbed.returncode == 0, output
    process = start(command(tmp_path, small_dataset, killed, *scratch, ranks=3, **changes), tmp_path)
    for steps, rank in ((3, 1), (9, 2)):
        wait_for_steps(process, killed, steps)
        os.kill(workers(process.pid)[rank], signal.SIGKILL)
        time.sleep(1)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    assert output.count("training AVID") == 3
    assert losses(killed) == losses(calm)
    assert [step for step, _ in losses(killed)] == list(range(1, 19))


@pytest.mark.parametrize("changes", [{}, CMA], ids=["AVID", "AVID+CMA"])
def test_sigterm_writes_a_checkpoint_in_the_middle_of_an_epoch(small_dataset, tmp_path, changes):
    data = SMALL["data"] | {"batch_size": 2, "clips_per_instance": 2}
    changes = {"epochs": 4, "data": data, "checkpoint": {"every_epochs": 100}} | changes
    train(settings(**changes), str(small_dataset), str(tmp_path / "calm"), from_scratch=True)
    stopped = tmp_path / "stopped"
    process = start(command(tmp_path, small_dataset, stopped, "--from-scratch", **changes), tmp_path)
    wait_for_steps(process, stopped, 13)
    process.send_signal(signal.SIGTERM)
    output = process.communicate()[0]
    assert process.returncode == 143, output
    assert "stopped by SIGTERM" in output
    root = open_storage(stopped)
    stream = read_record(root).stream
    assert stream["epoch"] == stream["step"] // 10
    assert latest_checkpoint(root) == f"checkpoints/step-{stream['step']:08d}"
    train(settings(**changes), str(small_dataset), str(stopped), resume=True)
    assert losses(stopped) == losses(tmp_path / "calm")


@pytest.mark.slow
def test_kill_9_at_any_moment_loses_at_most_the_steps_since_the_checkpoint(small_dataset, tmp_path):
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    train(settings(**EVERY_STEP), str(small_dataset), str(calm))
    arguments = command(tmp_path, small_dataset, killed, "--resume", **EVERY_STEP)
    kills = 0
    for extra in range(4):
        process = start(arguments, tmp_path)
        wait_for_steps(process, killed, 2 + 3 * extra)
        time.sleep(0.013 * extra)  # at other places of a step or of a save
        os.killpg(process.pid, signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        process.communicate()
        saved = read_record(open_storage(killed)).stream["step"]
        assert saved >= losses(killed)[-1][0] - 1
    assert kills >= 3
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert losses(killed) == losses(calm)


@pytest.fixture(scope="module")
def four_checkpoints(small_dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    config = settings(**EVERY_STEP | {"epochs": 2, "checkpoint": {"every_steps": 1}}, **CMA)
    train(config, str(small_dataset), str(folder), from_scratch=True)
    assert len(list_checkpoints(open_storage(folder))) == 5  # one before the first step
    return folder, config


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    "file",
    [
        "model.safetensors",
        "trainer.pt",
        "memory_bank.zarr/video/c/0/0",
        "memory_bank.zarr/positives/c/0/0",
        "checkpoint.json",
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    small_dataset, four_checkpoints, tmp_path, capsys, file
):
    folder, config = four_checkpoints
    expected = losses(folder)
    folder = Path(shutil.copytree(folder, tmp_path / "run"))
    flip(folder / "checkpoints" / "step-00000004" / file)
    state = train(config, str(small_dataset), str(folder), resume=True)
    said = capsys.readouterr().out
    assert "step-00000004" in said
    assert file.split("/")[0] in said
    assert "falling back to checkpoints/step-00000003" in said
    assert "from step 3" in said
    assert state.step == 4
    assert losses(folder) == expected
    assert latest_checkpoint(open_storage(folder)) == "checkpoints/step-00000004"


def test_no_checkpoint_that_is_whole_is_an_error(small_dataset, four_checkpoints, tmp_path):
    folder = Path(shutil.copytree(four_checkpoints[0], tmp_path / "run"))
    for file in folder.glob("checkpoints/*/model.safetensors"):
        flip(file)
    with pytest.raises(CheckpointError, match=r"step-00000004/model\.safetensors"):
        train(four_checkpoints[1], str(small_dataset), str(folder), resume=True)


def test_only_the_newest_checkpoints_stay(small_dataset, tmp_path):
    train(settings(epochs=3, checkpoint={"every_steps": 1, "keep": 2}), str(small_dataset), str(tmp_path))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000005", "step-00000006"]


def test_generators_come_back(small_dataset, tmp_path):
    torch.manual_seed(1)
    train(settings(epochs=1), str(small_dataset), str(tmp_path))
    expected = torch.rand(3)
    torch.manual_seed(2)
    train(settings(epochs=1), str(small_dataset), str(tmp_path), resume=True)
    assert torch.equal(torch.rand(3), expected)
