"""A file in the published format, made by the golden recipe, to our folder and back out as weights."""

import json
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from click.testing import CliRunner

from avid_pipeline.clips.settings import ClipSettings
from avid_pipeline.errors import CheckpointError, ConfigError, StorageError
from avid_pipeline.evaluate.checkpoint import open_checkpoint
from avid_pipeline.evaluate.cli import main as evaluate
from avid_pipeline.evaluate.results import read_results
from avid_pipeline.models import AVModel, load_pretrained
from avid_pipeline.models.pretrained import import_published
from avid_pipeline.models.published_statistics import published_statistics
from avid_pipeline.shards_spec.storage import open_storage
from avid_pipeline.train.checkpoint import read_record, restore_bank, restore_trainer_state
from avid_pipeline.train.memory_bank import MemoryBank
from avid_pipeline.train.published import export_weights, import_published_checkpoint

TESTS = Path(__file__).resolve().parents[1]
NUM_INSTANCES = 50


def write_published(path, state, dim, num_instances=NUM_INSTANCES, **replaced):
    random = torch.Generator().manual_seed(1)
    criterion = {
        "nce_average.view1_mem": torch.randn(num_instances, dim, generator=random),
        "nce_average.view2_mem": torch.randn(num_instances, dim, generator=random),
        "criterion.avg_exp_score": torch.tensor(3.25),
    }
    content = {
        "epoch": 200,
        "model": {f"module.{name}": tensor for name, tensor in state.items()},
        "optimizer": {"state": {}, "param_groups": []},
        "train_criterion": criterion,
    }
    torch.save({key: value for key, value in (content | replaced).items() if value is not None}, path)
    return path


@pytest.fixture(scope="module")
def golden_file(tmp_path_factory):
    spec = spec_from_file_location("golden_models", TESTS / "avid_pipeline" / "models" / "conftest.py")
    recipe = module_from_spec(spec)
    spec.loader.exec_module(recipe)
    shapes = json.loads((TESTS / "golden" / "checkpoint_tensors.json").read_text())["r2plus1d_18"]
    state = {
        name: recipe._golden_tensor(name, shapes[name], np.random.RandomState(place))
        for place, name in enumerate(sorted(shapes))
    }
    return write_published(tmp_path_factory.mktemp("published") / "AVID_Kinetics.pth.tar", state, 128)


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    model = AVModel(10, (16, 8), torch.Generator().manual_seed(0))
    return write_published(tmp_path_factory.mktemp("published") / "small.pth.tar", model.state_dict(), 8)


@pytest.fixture(scope="module")
def imported(small_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("imported") / "folder"
    assert import_published_checkpoint(str(small_file), str(folder)) == str(folder)
    return folder


def assert_same_weights(first, second):
    expected, found = first.state_dict(), second.state_dict()
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name


def assert_same_bank(file, folder, dim):
    published, bank = import_published(file), MemoryBank(NUM_INSTANCES, dim, seed=3)
    restore_bank(folder, "", bank)
    assert torch.equal(bank.full()[0], published.video_memory)
    assert torch.equal(bank.full()[1], published.audio_memory)


def test_the_golden_file_round_trip(golden_file, tmp_path):
    folder = import_published_checkpoint(str(golden_file), str(tmp_path / "imported"))
    original = load_pretrained(golden_file)
    assert original.video_depth == 18
    assert_same_weights(original, load_pretrained(folder))
    assert_same_bank(golden_file, open_storage(folder), 128)
    written = export_weights(folder, str(tmp_path / "new" / "weights.safetensors"))
    assert_same_weights(original, load_pretrained(written))


def test_what_an_imported_folder_says(small_file, imported):
    folder = open_storage(imported)
    record = read_record(folder)
    assert record.source == f"{small_file}, epoch 200"
    assert record.stream is None
    assert record.config is None
    assert restore_trainer_state(folder, "", record) == {"criterion": {"step": 0, "partition_function": 3.25}}
    assert_same_bank(small_file, folder, 8)
    with np.load(TESTS / "golden" / "spectrogram_norm_stats_24k_257bins.npz") as golden:
        mean, std = record.spectrogram_statistics.arrays()
        assert np.array_equal(mean, golden["mean"])
        assert np.array_equal(std, golden["std"])
    assert record.spectrogram_statistics == published_statistics()


def test_an_imported_folder_is_evaluated_with_the_published_settings(imported, small_dataset, tmp_path):
    arguments = ["retrieval", str(imported), "--data", str(small_dataset), "--clips", "1", "--batch-size", "5"]
    done = CliRunner().invoke(evaluate, [*arguments, "--output", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    results = read_results(open_storage(tmp_path / "out"))
    assert results.checkpoint.kind == "published"
    assert results.data[0].instances == 10
    evaluated = open_checkpoint(str(imported))
    assert evaluated.clip == ClipSettings()
    assert evaluated.statistics == published_statistics()


def test_nothing_is_overwritten(small_file, imported, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in imported.rglob("*")}
    with pytest.raises(CheckpointError, match=r"checkpoint\.json: a checkpoint is here already"):
        import_published_checkpoint(str(small_file), str(imported))
    assert {path: path.stat().st_mtime_ns for path in imported.rglob("*")} == before
    (tmp_path / "latest").write_text("checkpoints/step-00000001")
    with pytest.raises(CheckpointError, match=r"latest: a checkpoint is here already"):
        import_published_checkpoint(str(small_file), str(tmp_path))


def test_an_import_that_was_cut_is_no_checkpoint_and_is_done_again(small_file, tmp_path, monkeypatch):
    original = type(open_storage(tmp_path)).write_pieces

    def fail(self, name, pieces, size):
        if name == "checkpoint.json":
            raise StorageError(f"{self.url_of(name)}: cannot write: No space left on device")
        original(self, name, pieces, size)

    (tmp_path / "notes.txt").write_text("mine")
    with monkeypatch.context() as patch:
        patch.setattr("avid_pipeline.shards_spec.storage.Storage.write_pieces", fail)
        with pytest.raises(StorageError, match="No space left"):
            import_published_checkpoint(str(small_file), str(tmp_path))
    with pytest.raises(CheckpointError, match=r"checkpoint\.json: does not exist"):
        read_record(open_storage(tmp_path))
    import_published_checkpoint(str(small_file), str(tmp_path))
    assert_same_bank(small_file, open_storage(tmp_path), 8)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_other_files_are_refused(tmp_path, small_file, imported):
    (tmp_path / "page.pth.tar").write_bytes(b"<!DOCTYPE html>\n")
    torch.save({"epoch": 1}, tmp_path / "other.pth.tar")
    state = import_published(small_file).model
    write_published(tmp_path / "scratch.pth.tar", state, 8, train_criterion=None)
    write_published(tmp_path / "dim.pth.tar", state, 9)
    for name, message in [
        ("page.pth.tar", r"page\.pth\.tar: not a readable PyTorch file"),
        ("other.pth.tar", r"other\.pth\.tar: the key `train_criterion` is missing"),
        ("scratch.pth.tar", r"the key `train_criterion` is missing"),
        ("dim.pth.tar", r"its memories have 9 dimensions and its embeddings 8"),
        ("nothing.pth.tar", r"nothing\.pth\.tar: no such checkpoint"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            import_published_checkpoint(str(tmp_path / name), str(tmp_path / "out"))
    with pytest.raises(CheckpointError, match=r"use load_pretrained"):
        import_published_checkpoint(str(imported), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_exported_weights(small_file, imported, tmp_path):
    target = tmp_path / "weights.safetensors"
    for checkpoint, source in [(imported, f"{small_file}, epoch 200"), (small_file, str(small_file))]:
        written = export_weights(str(checkpoint), str(target), overwrite=True)
        assert written == str(target)
        assert_same_weights(load_pretrained(small_file), load_pretrained(target))
        with safetensors.safe_open(target, "pt") as file:
            metadata = file.metadata()
        assert metadata["format"] == "pt"
        assert metadata["source"] == source
        assert "avid-pipeline" in metadata
    content = target.read_bytes()
    with pytest.raises(CheckpointError, match=r"weights\.safetensors: is there already"):
        export_weights(str(imported), str(target))
    assert target.read_bytes() == content
    with pytest.raises(ConfigError, match=r"must end in \.safetensors"):
        export_weights(str(imported), str(tmp_path / "weights.pt"))
    with pytest.raises(CheckpointError, match=r"does not exist"):
        export_weights(str(tmp_path), str(tmp_path / "other.safetensors"))


def test_damaged_weights_are_not_exported(small_file, tmp_path):
    folder = Path(import_published_checkpoint(str(small_file), str(tmp_path / "imported")))
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-9] ^= 4
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: does not have the checksum"):
        export_weights(str(folder), str(tmp_path / "weights.safetensors"))
    assert not (tmp_path / "weights.safetensors").exists()


def test_on_an_object_store(small_file, make_bucket):
    bucket = make_bucket()
    open_storage(bucket.url, options=bucket.options).upload(_copy(small_file), "small.pth.tar")
    output = import_published_checkpoint(f"{bucket.url}/small.pth.tar", f"{bucket.url}/imported", bucket.options)
    folder = open_storage(output, options=bucket.options)
    assert_same_bank(small_file, folder, 8)
    with pytest.raises(CheckpointError, match="a checkpoint is here already"):
        import_published_checkpoint(str(small_file), output, bucket.options)
    written = export_weights(output, f"{bucket.url}/out/weights.safetensors", bucket.options)
    assert_same_weights(load_pretrained(small_file), load_pretrained(written, options=bucket.options))
    assert_same_weights(load_pretrained(small_file), load_pretrained(output, options=bucket.options))


def _copy(path):
    copy = path.with_name("copy.pth.tar")
    copy.write_bytes(path.read_bytes())
    return copy
