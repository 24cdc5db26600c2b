"""Saving and going on: what stays, what is taken up, after damage, after a kill, on disk and in an object store."""

import json
import re
import shutil
import sys
from importlib.util import module_from_spec, spec_from_file_location
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from avid_pipeline.collectives import RankGroup
from avid_pipeline.errors import CheckpointError, ConfigError, StorageError
from avid_pipeline.shards_spec.storage import open_storage
from avid_pipeline.train.checkpoint import (
    BANK_NAME,
    has_record,
    latest_checkpoint,
    list_checkpoints,
    read_record,
    restore_bank,
    restore_positives,
    restore_trainer_state,
    resume_newest,
)
from avid_pipeline.train.memory_bank import MemoryBank
from tests import processes

HERE = Path(__file__).parent


def load_worker():
    spec = spec_from_file_location("checkpoint_worker", HERE / "checkpoint_worker.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


worker = load_worker()
save, resume = worker.save, worker.resume


def named(step):
    return f"checkpoints/step-{step:08d}"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    for step in (1, 2, 3):
        save(open_storage(folder), step)
    return folder


@pytest.fixture
def root(run, tmp_path):
    return open_storage(shutil.copytree(run, tmp_path / "run"))


def test_the_newest_is_taken_up(root):
    assert list_checkpoints(root) == [named(1), named(2), named(3)]
    assert resume(root) == (named(3), [])


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("checkpoint.json", r"checkpoint\.json: "),
        ("model.safetensors", r"model\.safetensors: does not have the checksum"),
        ("trainer.pt", r"trainer\.pt: does not have the checksum"),
        (f"{BANK_NAME}/zarr.json", r"memory_bank\.zarr/zarr\.json: "),
        (f"{BANK_NAME}/audio/zarr.json", r"audio/zarr\.json: "),
        (f"{BANK_NAME}/video/c/0/0", r"video/c/0/0: "),
        (f"{BANK_NAME}/positives/c/0/0", r"positives/c/0/0: "),
    ],
)
@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_damage_of_any_file_falls_back(root, file, reason, damage):
    path = root.local_root / named(3) / file
    data = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(data[:-7])
    name, warnings = resume(root)
    assert name == named(2)
    assert len(warnings) == 1
    assert named(3) in warnings[0]
    assert warnings[0].endswith(f"falling back to {named(2)}")
    if damage == "cut":
        assert re.search(reason, warnings[0])
    assert latest_checkpoint(root) == named(2)
    assert list_checkpoints(root) == [named(1), named(2)]
    # The run passes the damaged one again and replaces it.
    assert save(root, 3) == named(3)
    assert resume(root) == (named(3), [])


def test_several_damaged_ones(root):
    (root.local_root / named(3) / "model.safetensors").unlink()
    (root.local_root / named(2) / "trainer.pt").write_bytes(b"")
    name, warnings = resume(root)
    assert name == named(1)
    assert [warning.split(" falling back to ")[1] for warning in warnings] == [named(2), named(1)]
    assert "model.safetensors: does not exist" in warnings[0]
    assert "trainer.pt: does not have" in warnings[1]


def test_none_that_is_whole(root):
    for step in (1, 2, 3):
        (root.local_root / named(step) / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=rf"{named(3)}/model\.safetensors: does not.*no checkpoint of .* 3 tried"):
        resume(root)
    assert list_checkpoints(root) == [named(1), named(2), named(3)], "nothing is set aside for nothing"


@pytest.mark.parametrize("content", [named(4), "", "../elsewhere", "a\0b", "\udcff"])
def test_latest_that_names_nothing(root, content):
    (root.local_root / "latest").write_bytes(content.encode(errors="surrogateescape"))
    name, (warning,) = resume(root)
    assert name == named(3)
    assert "latest: names" in warning
    assert latest_checkpoint(root) == named(3)


def test_latest_alone_is_no_run_to_begin_anew(tmp_path):
    (tmp_path / "latest").write_text(named(4))
    with pytest.raises(CheckpointError, match=r"latest: names 'checkpoints/step-00000004', which is missing"):
        resume(open_storage(tmp_path))


def test_a_first_checkpoint_without_latest(tmp_path):
    root = open_storage(tmp_path)
    save(root, 5)
    (tmp_path / "latest").unlink()
    assert latest_checkpoint(root) == named(5)
    assert has_record(root)
    assert resume(root) == (named(5), [])
    assert (tmp_path / "latest").read_text() == f"{named(5)}\n"


def test_wrong_settings_are_not_damage(root):
    def attempt(name, record):
        raise ConfigError("epochs was 1 and is now 2")

    with pytest.raises(ConfigError, match="epochs was 1"):
        resume_newest(root, RankGroup(), attempt, print)
    assert list_checkpoints(root) == [named(1), named(2), named(3)]


def test_keep(tmp_path):
    root = open_storage(tmp_path)
    for step in (1, 2, 3):
        save(root, step)
    (tmp_path / named(1) / "notes.txt").write_text("mine")
    (tmp_path / "checkpoints" / "mine").mkdir()
    (tmp_path / named(2) / "model.safetensors#1").write_text("what a killed write leaves")
    leftover = tmp_path / named(0) / "memory_bank.zarr"
    leftover.mkdir(parents=True)
    later = tmp_path / named(9) / "memory_bank.zarr"
    later.mkdir(parents=True)
    save(root, 4, keep=2)
    assert list_checkpoints(root) == [named(3), named(4)]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "mine",
        "step-00000001",
        "step-00000003",
        "step-00000004",
        "step-00000009",
    ]
    assert [path.name for path in (tmp_path / named(1)).iterdir()] == ["notes.txt"]
    save(root, 5, keep=1)
    assert list_checkpoints(root) == [named(5)]
    save(root, 6)
    assert list_checkpoints(root) == [named(5), named(6)]


def test_remains_of_a_killed_save_are_not_mixed_in(tmp_path):
    root = open_storage(tmp_path)
    save(root, 1, num_instances=90)
    (tmp_path / named(1) / "checkpoint.json").unlink()
    (tmp_path / "latest").unlink()
    (tmp_path / named(1) / BANK_NAME / "video" / "c" / "7").mkdir()
    save(root, 1)
    assert not (tmp_path / named(1) / BANK_NAME / "video" / "c" / "7").exists()
    assert resume(root) == (named(1), [])


def test_positives_are_optional(tmp_path):
    root = open_storage(tmp_path)
    name = save(root, 1, positives=False)
    assert restore_positives(root, name, MemoryBank(worker.NUM_INSTANCES, worker.DIM)) is None


def test_positives_of_other_data_are_refused(root):
    with pytest.raises(CheckpointError, match=r"positives: expected shape \[62, 3\], found \[61, 3\]"):
        restore_positives(root, named(3), MemoryBank(62, worker.DIM))


def test_a_save_that_fails_leaves_the_one_before(root, monkeypatch):
    def fail(self, name, pieces, size):
        raise StorageError(f"{self.url_of(name)}: cannot write: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("avid_pipeline.shards_spec.storage.Storage.write_pieces", fail)
        with pytest.raises(StorageError, match=r"step-00000004/.*No space left"):
            save(root, 4)
    assert resume(root) == (named(3), [])


def test_killed_while_saving(tmp_path):
    lives = json.loads(processes.run(sys.executable, HERE / "killed_save_worker.py", tmp_path, 0).stdout)
    # Every life went on from a whole checkpoint (the worker compares its contents), and lost none that was saved.
    assert lives[0]["resumed"] == 0
    for before, after in pairwise(lives):
        assert after["resumed"] >= max(before["saved"], before["resumed"])
        assert after["warnings"] == []
    assert lives[-1]["resumed"] > 5
    assert sum(life["incomplete"] > 0 for life in lives) >= 3, "they were killed at the wrong moments"


def test_on_an_object_store(make_bucket):
    bucket = make_bucket()
    root = open_storage(f"{bucket.url}/run", options=bucket.options)
    assert resume(root) == (None, [])
    for step in (1, 2, 3):
        save(root, step, keep=2)
    assert list_checkpoints(root) == [named(2), named(3)]
    assert not list(root.names(named(1)))
    assert resume(root) == (named(3), [])
    checkpoint = open_storage(f"{bucket.url}/run/{named(3)}", options=bucket.options)
    assert read_record(checkpoint) == read_record(root) == read_record(root, named(3))
    assert restore_trainer_state(checkpoint, "", read_record(checkpoint)) == {"step": 3}
    bank = MemoryBank(worker.NUM_INSTANCES, worker.DIM, seed=4)
    restore_bank(checkpoint, "", bank)
    assert torch.equal(bank.full()[0], worker.memories(3)[0])
    chunk = f"{named(3)}/{BANK_NAME}/audio/c/0/0"
    root.write(chunk, root.read(chunk)[:40])
    name, (warning,) = resume(root)
    assert name == named(2)
    assert f"{root.url}/{chunk}: holds 40 bytes instead of" in warning
    save(root, 4, keep=1)
    assert list_checkpoints(root) == [named(4)]
    assert not list(root.names(named(3))), "what was set aside goes too"
