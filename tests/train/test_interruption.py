"""Runs that are killed, stopped, or find a damaged checkpoint: their losses are those of an undisturbed run."""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from avid_pipeline.errors import CheckpointError
from avid_pipeline.shards_spec.storage import open_storage
from avid_pipeline.train.checkpoint import latest_checkpoint, list_checkpoints, read_record
from avid_pipeline.train.run_log import read_metrics
from avid_pipeline.train.trainer import train
from tests.processes import processes, run, started
from tests.train.runs import AGREEMENT, SMALL, command, losses, settings, train_on_ranks

EVERY_STEP = {"checkpoint": {"every_steps": 1, "keep": 3}}
ONCE = {"checkpoint": {"every_epochs": 100}}
CMA = {"agreement": AGREEMENT | {"resample_every": 2}}
KINDS = {"AVID": {}, "AVID+CMA": CMA}
# On three ranks, for two numbers add up to the same in any order.
ON_RANKS = {"data": SMALL["data"] | {"batch_size": 6, "clips_per_instance": 2}, "epochs": 4}


@pytest.fixture(scope="module")
def calm_on_ranks(small_dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("calm")
    train_on_ranks(3, folder, small_dataset, {kind: ON_RANKS | ONCE | changes for kind, changes in KINDS.items()})
    return folder


def lives(run):
    """How often a run has been begun or gone on with."""
    log = run / "train.log"
    return log.read_text().count("training AVID") if log.exists() else 0


def workers(process):
    """The processes that a launcher started, in the order of their ranks."""
    return sorted(pid for pid, (parent, _) in processes().items() if parent == process.pid)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_kill_9_of_a_rank_under_torchrun_with_restarts(small_dataset, calm_on_ranks, tmp_path, kind):
    # All ranks start anew from the newest checkpoint; the user gave no --resume.
    killed = tmp_path / "killed"
    scratch = ("--from-scratch",) if kind == "AVID+CMA" else ()
    changes = ON_RANKS | {"checkpoint": {"every_steps": 2, "keep": 3}} | KINDS[kind]
    with started(*command(tmp_path, small_dataset, killed, *scratch, ranks=3, **changes), merge=True) as process:
        for life, (steps, rank) in enumerate(((2, 1), (7, 2)), 1):
            process.wait_until(
                lambda life=life, steps=steps: (
                    lives(killed) == life and len(read_metrics(killed)) >= steps and len(workers(process)) == 3
                )
            )
            os.kill(workers(process)[rank], signal.SIGKILL)
        assert process.wait() == 0, str(process)
        assert process.stdout.count("training AVID") == 3
    assert losses(killed) == losses(calm_on_ranks / kind)
    assert [step for step, _ in losses(killed)] == list(range(1, 13))


@pytest.mark.parametrize("kind", KINDS)
def test_sigterm_writes_a_checkpoint_in_the_middle_of_an_epoch(small_dataset, tmp_path, kind):
    data = SMALL["data"] | {"batch_size": 2, "clips_per_instance": 2}
    changes = {"epochs": 3, "data": data} | ONCE | KINDS[kind]
    train(settings(**changes), str(small_dataset), str(tmp_path / "calm"), from_scratch=True)
    stopped = tmp_path / "stopped"
    with started(*command(tmp_path, small_dataset, stopped, "--from-scratch", **changes), merge=True) as process:
        process.wait_until(lambda: len(read_metrics(stopped)) >= 12)
        process.signal(signal.SIGTERM)
        assert process.wait() == 143, str(process)
        assert "stopped by SIGTERM" in process.stdout
    root = open_storage(stopped)
    stream = read_record(root).stream
    assert stream["epoch"] == stream["step"] // 10
    assert latest_checkpoint(root) == f"checkpoints/step-{stream['step']:08d}"
    train(settings(**changes), str(small_dataset), str(stopped), resume=True)
    assert losses(stopped) == losses(tmp_path / "calm")


@pytest.mark.slow
def test_kill_9_at_any_moment_loses_at_most_the_steps_since_the_checkpoint(small_dataset, tmp_path):
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    train(settings(epochs=7, **ONCE), str(small_dataset), str(calm))
    arguments = command(tmp_path, small_dataset, killed, "--resume", epochs=7, **EVERY_STEP)
    kills = 0
    for extra in range(3):
        with started(*arguments) as process:
            process.wait_until(lambda extra=extra: len(read_metrics(killed)) >= 2 + 3 * extra)
            time.sleep(0.02 * extra)  # at other places of a step or of a save
            if process.running:
                process.signal(signal.SIGKILL)
            kills += process.wait() == -signal.SIGKILL
        saved = read_record(open_storage(killed)).stream["step"]
        assert saved >= losses(killed)[-1][0] - 1
    assert kills >= 2
    run(*arguments)
    assert losses(killed) == losses(calm)


@pytest.fixture(scope="module")
def four_checkpoints(small_dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    config = settings(epochs=2, checkpoint={"every_steps": 1}, **CMA)
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
