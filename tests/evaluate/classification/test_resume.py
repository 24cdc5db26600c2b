"""Evaluations that are interrupted, killed, done already, of something else, or damaged."""

import shutil
import signal

import pytest
import safetensors.torch
import torch

from avid_pipeline.errors import CheckpointError, ConfigError
from avid_pipeline.evaluate.classification.progress import MODEL_NAME, PROGRESS_NAME
from avid_pipeline.evaluate.results import REPORT_NAME, RESULTS_NAME, read_results
from avid_pipeline.shards_spec.storage import open_storage
from tests.evaluate.classification.labelled import (
    SMALL,
    StoppedError,
    command,
    fine_tune,
    finetune_config,
    same_state,
    small_evaluated,
    stop_after,
    write_config,
)
from tests.processes import run, started


# Four steps an epoch, with a save behind the third and the last: within and between epochs, in both stages.
@pytest.mark.parametrize("saves", [1, 2, 3, 6])
def test_an_interrupted_run_goes_on_bit_for_bit(undisturbed, folds, evaluated, tmp_path, monkeypatch, saves):
    output, results = undisturbed
    config = finetune_config(save_every_steps=3)
    with monkeypatch.context() as patch:
        stop_after(patch, saves)
        with pytest.raises(StoppedError):
            fine_tune(config, evaluated, folds, tmp_path)
    assert (tmp_path / PROGRESS_NAME).exists()
    # Neither how often it is saved nor how data are read is part of the result.
    resumed = fine_tune(finetune_config(data=SMALL["data"] | {"workers": 2}), evaluated, folds, tmp_path)
    assert resumed.tables == results.tables
    ours, theirs = (safetensors.torch.load_file(folder / MODEL_NAME) for folder in (tmp_path, output))
    assert same_state(ours, theirs)


def test_the_same_again_only_gives_the_results(undisturbed, folds, evaluated, monkeypatch):
    output, results = undisturbed
    monkeypatch.setattr("avid_pipeline.evaluate.classification.run.train", None)
    assert fine_tune(finetune_config(), evaluated, folds, output) == results


def test_another_evaluation_is_refused_unless_overwritten(undisturbed, folds, evaluated, tmp_path, monkeypatch):
    output = shutil.copytree(undisturbed[0], tmp_path / "done")
    with pytest.raises(ConfigError, match=r"settings\.seed was 0 and is now 5") as error:
        fine_tune(finetune_config(seed=5), evaluated, folds, output)
    assert "--overwrite" in str(error.value)
    with pytest.raises(ConfigError, match=r"data\.train\.subset was 'fold1-train' and is now 'fold2-train'"):
        fine_tune(finetune_config(), evaluated, folds, output, fold=2)
    with pytest.raises(ConfigError, match="checkpoint was"):
        fine_tune(finetune_config(), small_evaluated(tmp_path, seed=1), folds, output)
    brief = finetune_config(classifier_epochs=0, epochs=1, optimizer={"learning_rate": 1e-4})
    results = fine_tune(brief, evaluated, folds, output, overwrite=True)
    assert list(results.tables[1].rows) == ["1 (network)"]
    # The same holds while it is under way.
    under_way = tmp_path / "under-way"
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(StoppedError):
            fine_tune(finetune_config(), evaluated, folds, under_way)
    with pytest.raises(ConfigError, match=r"progress\.pt: is of another evaluation: settings\.dropout was 0\.5"):
        fine_tune(finetune_config(dropout=0.1), evaluated, folds, under_way)


@pytest.mark.parametrize("damage", ["cut", "flipped", "foreign", "empty"])
def test_damaged_progress_is_named(folds, evaluated, tmp_path, monkeypatch, damage):
    config = finetune_config(classifier_epochs=1, epochs=1, optimizer={"learning_rate": 1e-4})
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(StoppedError):
            fine_tune(config, evaluated, folds, tmp_path)
    path = tmp_path / PROGRESS_NAME
    data = bytearray(path.read_bytes())
    if damage == "cut":
        data = data[: len(data) // 2]
    elif damage == "flipped":
        data[len(data) // 2] ^= 1
    elif damage == "empty":
        data = bytearray()
    path.write_bytes(data)
    if damage == "foreign":
        torch.save({"weights": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=rf"{PROGRESS_NAME}: .*--overwrite"):
        fine_tune(config, evaluated, folds, tmp_path)
    assert fine_tune(config, evaluated, folds, tmp_path, overwrite=True).tables


def test_remains_of_a_killed_write_go(undisturbed, folds, evaluated, tmp_path):
    output = shutil.copytree(undisturbed[0], tmp_path / "done")
    (output / f".writing-0123-{PROGRESS_NAME}").touch()
    (output / "notes.txt").touch()
    fine_tune(finetune_config(), evaluated, folds, output)
    assert sorted(path.name for path in output.iterdir()) == [MODEL_NAME, "notes.txt", REPORT_NAME, RESULTS_NAME]


def test_kill_9_and_the_same_command_again(folds, tmp_path):
    weights = small_evaluated(tmp_path).identity.path
    config = write_config(tmp_path / "config.yaml", finetune_config())
    outputs = [tmp_path / name for name in ("calm", "killed")]
    calm, killed = (
        command("finetune", config, weights, "--data", folds, "--fold", 1, "--output", output) for output in outputs
    )
    with started(*killed) as process:
        process.wait_until((outputs[1] / PROGRESS_NAME).exists)
        process.signal(signal.SIGKILL)
        process.wait()
    assert not (outputs[1] / RESULTS_NAME).exists()
    run(*calm)
    assert "goes on after" in run(*killed).stdout
    assert read_results(open_storage(outputs[1])).tables == read_results(open_storage(outputs[0])).tables
    assert same_state(*(safetensors.torch.load_file(output / MODEL_NAME) for output in outputs))
