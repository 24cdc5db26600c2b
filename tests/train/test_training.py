import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from avid_pipeline.clips.loader import ClipLoader
from avid_pipeline.errors import ConfigError
from avid_pipeline.models import load_pretrained
from avid_pipeline.shards_spec.reader import open_dataset
from avid_pipeline.shards_spec.storage import open_storage
from avid_pipeline.streams.plan import plan
from avid_pipeline.train.checkpoint import latest_checkpoint, restore_bank
from avid_pipeline.train.cli import main
from avid_pipeline.train.memory_bank import MemoryBank
from avid_pipeline.train.run_log import read_metrics
from avid_pipeline.train.trainer import train
from tests.train.runs import SMALL, losses, settings

DEMO = Path(__file__).resolve().parents[2] / "configs" / "demo.yaml"


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
    with pytest.raises(ConfigError, match="fingerprint"):
        train(settings(), str(data), str(folder), resume=True)


def test_memories_of_the_instances_seen_and_no_others_change(small_dataset, tmp_path):
    # Batches of 4 leave two of ten instances out; their memories must be as they began.
    data = {"batch_size": 4, "workers": 1}
    state = train(settings(epochs=1, data=data), str(small_dataset), str(tmp_path))
    manifest = open_dataset(small_dataset).manifest
    epoch = plan(manifest, seed=0, epoch=0, clips_per_instance=1, global_batch_size=4)
    seen = {int(i) for step in range(epoch.num_batches) for i in epoch.global_batch(step).instances}
    assert len(seen) == 8
    for before, after in zip(MemoryBank(10, 8).full(), state.criterion.bank.full(), strict=True):
        changed = (before != after).any(dim=1).nonzero().flatten().tolist()
        assert set(changed) == seen
        assert torch.allclose(after.norm(dim=1), torch.ones(10), atol=1e-5)
    restored = MemoryBank(10, 8, seed=9)
    restore_bank(open_storage(tmp_path), latest_checkpoint(open_storage(tmp_path)), restored)
    for ours, theirs in zip(restored.full(), state.criterion.bank.full(), strict=True):
        assert torch.equal(ours, theirs)


def test_every_epoch_has_its_own_clips_also_when_resumed(small_dataset, tmp_path, monkeypatch):
    loaded = []

    class RecordingLoader(ClipLoader):
        def __init__(self, reader, batches, clip, choice, **options):
            visits = [batch.instances.tolist() for batch in batches]
            loaded.append((choice.seed, choice.epoch, choice.augmentation, visits))
            super().__init__(reader, batches, clip, choice, **options)

    monkeypatch.setattr("avid_pipeline.train.data.ClipLoader", RecordingLoader)
    config = settings(seed=6, augmentation={"flip": 0.25})
    train(settings(seed=6, augmentation={"flip": 0.25}, epochs=1), str(small_dataset), str(tmp_path))
    train(config, str(small_dataset), str(tmp_path), resume=True)
    assert [(seed, epoch) for seed, epoch, *_ in loaded] == [(6, 0), (6, 1)]
    assert all(augmentation.flip == 0.25 for *_, augmentation, _ in loaded)
    assert loaded[0][3] != loaded[1][3], "another order"
    for *_, visits in loaded:
        assert sorted(instance for batch in visits for instance in batch) == list(range(10))


def test_resumed_with_other_workers_equals_undisturbed(small_dataset, undisturbed, tmp_path):
    folder, _ = undisturbed
    train(settings(epochs=1), str(small_dataset), str(tmp_path))
    train(settings(data=SMALL["data"] | {"workers": 3}), str(small_dataset), str(tmp_path), resume=True)
    assert losses(tmp_path) == losses(folder)


def test_a_finished_run_is_left_as_it_is(small_dataset, undisturbed, tmp_path):
    folder = shutil.copytree(undisturbed[0], tmp_path / "run")
    latest = folder / latest_checkpoint(open_storage(folder))
    before = {path: path.read_bytes() for path in latest.rglob("*") if path.is_file()}
    state = train(settings(), str(small_dataset), str(folder), resume=True)
    assert state.step == 4
    assert {path: path.read_bytes() for path in latest.rglob("*") if path.is_file()} == before
    assert losses(folder) == losses(undisturbed[0])


def test_a_loss_that_is_no_number_stops_the_run(small_dataset, tmp_path):
    with pytest.raises(ConfigError, match=r"loss became (nan|inf).*optimizer\.learning_rate"):
        train(settings(optimizer={"learning_rate": 1e30}), str(small_dataset), str(tmp_path))
    assert latest_checkpoint(open_storage(tmp_path)) is None


def test_a_damaged_shard_is_one_clear_error(small_dataset, tmp_path):
    data = shutil.copytree(small_dataset, tmp_path / "data")
    content = bytearray((data / "shard-000000.tar").read_bytes())
    content[5000] ^= 1
    (data / "shard-000000.tar").write_bytes(content)
    sets = ("data.batch_size=10", "clip.crop_size=16", "loss.num_negatives=4", "model.projection=[8]")
    words = [word for setting in sets for word in ("--set", setting)]
    assert_clear_error(invoke("--data", data, "--output", tmp_path / "new", *words), "shard-000000.tar")


def test_checkpoints_at_every_so_many_steps_also_at_epoch_ends(small_dataset, tmp_path):
    changes = {"epochs": 3, "checkpoint": {"every_epochs": 100, "every_steps": 2}}
    train(settings(**changes), str(small_dataset), str(tmp_path))
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000002", "step-00000004", "step-00000006"]


def test_weights_that_are_not_finite_are_never_saved(small_dataset, tmp_path):
    optimizer = {"name": "sgd", "learning_rate": 3e38}
    with pytest.raises(ConfigError, match=r"after step 1: not saved"):
        train(settings(optimizer=optimizer, checkpoint={"every_steps": 1}), str(small_dataset), str(tmp_path))
    assert latest_checkpoint(open_storage(tmp_path)) is None
