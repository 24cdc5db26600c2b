import json
import shutil

import pytest
import torch

from avid_pipeline.config import load_config
from avid_pipeline.errors import CheckpointError
from avid_pipeline.models import AVModel, load_pretrained
from avid_pipeline.shards_spec.manifest import SpectrogramStatistics
from avid_pipeline.shards_spec.storage import open_storage
from avid_pipeline.streams.state import StreamState
from avid_pipeline.train.checkpoint import (
    BANK_NAME,
    has_record,
    latest_checkpoint,
    read_record,
    restore_bank,
    restore_model,
    restore_trainer_state,
    save_checkpoint,
)
from avid_pipeline.train.config import TrainConfig
from avid_pipeline.train.memory_bank import MemoryBank

INSTANCES, DIM = 30, 8
CHUNK = f"{BANK_NAME}/audio/c/0/0"


def new_model(seed=0):
    return AVModel(10, (16, DIM), torch.Generator().manual_seed(seed))


def save(folder, step=7, epoch=1, seed=0):
    config_file = folder / "config.yaml"
    config_file.write_text("epochs: 2\ndata: {batch_size: 2}\noptimizer: {learning_rate: 1e-3}\n")
    return save_checkpoint(
        open_storage(folder),
        stream=StreamState("sha256:of the data", seed=0, epoch=epoch, step=step),
        config=load_config(config_file, TrainConfig),
        statistics=SpectrogramStatistics(mean=(0.0,) * 257, std=(1.0,) * 257, frames=3),
        model=new_model(seed),
        trainer_state={"criterion": {"step": step, "partition_function": 2.5}},
        bank=MemoryBank(INSTANCES, DIM, seed=seed),
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, save(folder)


@pytest.fixture
def copy(saved, tmp_path):
    """A run folder to damage: the run's root and its checkpoint's folder."""
    shutil.copytree(saved[0], tmp_path / "run")
    return open_storage(tmp_path / "run"), tmp_path / "run" / saved[1]


def test_everything_comes_back(saved):
    folder, name = saved
    root = open_storage(folder)
    assert latest_checkpoint(root) == name == "checkpoints/step-00000007"
    assert has_record(root)
    assert has_record(open_storage(folder / name))
    record = read_record(root)
    assert record == read_record(open_storage(folder / name))
    assert record.config["epochs"] == 2
    assert StreamState.from_dict(record.stream) == StreamState("sha256:of the data", seed=0, epoch=1, step=7)
    model, bank = new_model(seed=1), MemoryBank(INSTANCES, DIM, seed=1)
    restore_model(root, name, record, model)
    restore_bank(root, name, bank)
    for key, tensor in new_model().state_dict().items():
        assert torch.equal(tensor, model.state_dict()[key]), key
    for expected, rows in zip(MemoryBank(INSTANCES, DIM).full(), bank.full(), strict=True):
        assert torch.equal(expected, rows)
    assert restore_trainer_state(root, name, record) == {"criterion": {"step": 7, "partition_function": 2.5}}


def test_the_newest_is_the_one_that_counts(tmp_path):
    save(tmp_path, step=7, seed=0)
    newer = save(tmp_path, step=9, epoch=2, seed=1)
    root = open_storage(tmp_path)
    assert latest_checkpoint(root) == newer
    assert read_record(root).stream["step"] == 9
    assert torch.equal(
        load_pretrained(tmp_path).video_proj.projection[0].weight, new_model(1).video_proj.projection[0].weight
    )


def test_saving_again_keeps_what_a_run_would_go_on_from(tmp_path):
    # Replacing it would leave a moment without any: a step's checkpoint is the same however often it is saved.
    name = save(tmp_path, seed=0)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / name).rglob("*")}
    assert save(tmp_path, seed=1) == name
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / name).rglob("*")} == before


def test_an_unfinished_checkpoint_is_none(copy):
    # What a killed process leaves before its first checkpoint is complete: files, but nobody named them latest.
    root, folder = copy
    (folder / "checkpoint.json").unlink()
    (folder.parents[1] / "latest").unlink()
    assert latest_checkpoint(root) is None
    assert not has_record(root)
    with pytest.raises(CheckpointError, match=r"checkpoint\.json: does not exist"):
        read_record(root)


def flip(data):
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 4]) + data[len(data) // 2 + 1 :]


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        (CHUNK, lambda data: None),
        (CHUNK, lambda data: b""),
        (CHUNK, lambda data: data[:50]),
        (CHUNK, flip),
        (f"{BANK_NAME}/audio/zarr.json", lambda data: None),
        (f"{BANK_NAME}/audio/zarr.json", lambda data: data[:50]),
        (f"{BANK_NAME}/zarr.json", lambda data: None),
    ],
    ids=["no chunk", "empty chunk", "cut chunk", "flipped bit", "no array", "cut array", "no group"],
)
def test_a_damaged_bank_is_never_loaded(copy, file, damage):
    root, folder = copy
    path = folder / file
    damaged = damage(path.read_bytes())
    path.unlink()
    if damaged is not None:
        path.write_bytes(damaged)
    bank = MemoryBank(INSTANCES, DIM, seed=5)
    with pytest.raises(CheckpointError, match=BANK_NAME):
        restore_bank(root, folder.relative_to(root.local_root).as_posix(), bank)
    assert torch.equal(bank.full()[0], MemoryBank(INSTANCES, DIM, seed=5).full()[0]), "not even half of it"


def test_a_missing_bank_is_not_made(copy):
    root, folder = copy
    shutil.rmtree(folder / BANK_NAME)
    with pytest.raises(CheckpointError, match=r"memory_bank\.zarr/zarr\.json: is missing"):
        restore_bank(root, folder.relative_to(root.local_root).as_posix(), MemoryBank(INSTANCES, DIM))
    assert not (folder / BANK_NAME).exists()


def test_a_bank_of_other_data_is_refused(saved):
    folder, name = saved
    with pytest.raises(CheckpointError, match=r"expected shape \[31, 8\], found \[30, 8\]"):
        restore_bank(open_storage(folder), name, MemoryBank(INSTANCES + 1, DIM))
    with pytest.raises(CheckpointError, match=r"expected shape \[30, 9\], found \[30, 8\]"):
        restore_bank(open_storage(folder), name, MemoryBank(INSTANCES, DIM + 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content | {"format_version": 2}, "format_version"),
        (lambda content: content | {"spam": 1}, "spam"),
        (lambda content: {key: value for key, value in content.items() if key != "stream"}, "stream"),
    ],
)
def test_a_record_of_another_form_names_the_field(copy, change, message):
    root, folder = copy
    path = folder / "checkpoint.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(CheckpointError, match=rf"checkpoint\.json: .*{message}"):
        read_record(root)


@pytest.mark.parametrize("file", ["model.safetensors", "trainer.pt"])
def test_missing_and_cut_files_are_named(copy, file):
    root, folder = copy
    name, record = folder.relative_to(root.local_root).as_posix(), read_record(root)
    restore = {
        "model.safetensors": lambda: restore_model(root, name, record, new_model()),
        "trainer.pt": lambda: restore_trainer_state(root, name, record),
    }[file]
    (folder / file).write_bytes((folder / file).read_bytes()[:-5])
    with pytest.raises(CheckpointError, match=rf"{file}: does not have the checksum"):
        restore()
    (folder / file).unlink()
    with pytest.raises(CheckpointError, match=rf"{file}: does not exist"):
        restore()


def test_weights_of_another_model_are_refused(saved):
    folder, name = saved
    root = open_storage(folder)
    other = AVModel(10, (16, DIM + 1), torch.Generator())
    with pytest.raises(CheckpointError, match=r"model\.safetensors: does not fit the model"):
        restore_model(root, name, read_record(root), other)
