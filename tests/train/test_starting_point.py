"""Runs, checkpoint folders and published files to start from."""

import shutil
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

from avid_pipeline.errors import CheckpointError
from avid_pipeline.models import AVModel
from avid_pipeline.models.pretrained import import_published
from avid_pipeline.shards_spec.storage import open_storage
from avid_pipeline.streams.state import StreamState
from avid_pipeline.train.checkpoint import BANK_NAME, save_checkpoint
from avid_pipeline.train.memory_bank import MemoryBank
from avid_pipeline.train.published import export_weights, import_published_checkpoint
from avid_pipeline.train.starting_point import open_starting_point


def load_sibling(name):
    spec = spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


worker, published = load_sibling("checkpoint_worker"), load_sibling("test_published")
NUM_INSTANCES, DIM = 50, 8


def new_model(seed=0, depth=10, projection=(16, DIM)):
    return AVModel(depth, projection, torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    save_checkpoint(
        open_storage(folder),
        stream=StreamState("sha256:of the data", seed=3, epoch=2, step=70),
        config=worker.CONFIG,
        statistics=worker.STATISTICS,
        model=new_model(),
        trainer_state={"criterion": {"step": 70, "partition_function": 2.5}},
        bank=MemoryBank(NUM_INSTANCES, DIM, seed=5),
    )
    return folder


@pytest.fixture(scope="module")
def published_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("published") / "AVID.pth.tar"
    return published.write_published(path, new_model().state_dict(), DIM)


@pytest.fixture(scope="module")
def imported(published_file, tmp_path_factory):
    return import_published_checkpoint(str(published_file), str(tmp_path_factory.mktemp("imported") / "folder"))


def assert_starts(start, video, audio):
    model, bank = new_model(seed=1), MemoryBank(NUM_INSTANCES, DIM, seed=9)
    start.load_model(model)
    start.load_bank(bank)
    for name, tensor in new_model().state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    assert torch.equal(bank.full()[0], video)
    assert torch.equal(bank.full()[1], audio)


@pytest.mark.parametrize("place", ["", "checkpoints/step-00000070"])
def test_a_run_and_its_checkpoint(run, place):
    start = open_starting_point(str(run / place))
    assert start.source == str(run / "checkpoints" / "step-00000070") or start.source == str(run / place)
    assert start.fingerprint == "sha256:of the data"
    assert (start.seed, start.epoch, start.step) == (3, 2, 70)
    assert (start.num_instances, start.dim, start.partition_function) == (NUM_INSTANCES, DIM, 2.5)
    assert_starts(start, *MemoryBank(NUM_INSTANCES, DIM, seed=5).full())


@pytest.mark.parametrize("kind", ["published_file", "imported"])
def test_published(kind, request, published_file):
    content = import_published(published_file)
    start = open_starting_point(str(request.getfixturevalue(kind)))
    assert start.fingerprint is None
    assert (start.seed, start.step) == (None, None)
    assert start.epoch == (200 if kind == "published_file" else None)
    assert (start.num_instances, start.dim, start.partition_function) == (NUM_INSTANCES, DIM, 3.25)
    assert_starts(start, content.video_memory, content.audio_memory)


def test_on_an_object_store(published_file, make_bucket):
    bucket = make_bucket()
    content = import_published(published_file)
    root = open_storage(bucket.url, options=bucket.options)
    root.write("AVID.pth.tar", published_file.read_bytes())
    folder = import_published_checkpoint(str(published_file), f"{bucket.url}/imported", bucket.options)
    for place in (folder, f"{bucket.url}/AVID.pth.tar"):
        assert_starts(open_starting_point(place, bucket.options), content.video_memory, content.audio_memory)


@pytest.mark.parametrize("kind", ["published_file", "run"])
def test_a_bank_of_other_data_or_size(kind, request):
    start = open_starting_point(str(request.getfixturevalue(kind)))
    for instances, dim in [(NUM_INSTANCES + 1, DIM), (NUM_INSTANCES, DIM + 1)]:
        bank = MemoryBank(instances, dim)
        before = bank.full()[0]
        with pytest.raises(
            CheckpointError, match=rf"50 instances of 8 .* {instances} of {dim}; .*memory\.init=forward"
        ):
            start.load_bank(bank)
        assert torch.equal(bank.full()[0], before)


@pytest.mark.parametrize("kind", ["published_file", "run"])
def test_another_model(kind, request):
    start = open_starting_point(str(request.getfixturevalue(kind)))
    with pytest.raises(
        CheckpointError, match=r"video_proj\.projection\.0\.weight has shape \[16, 512\], in the model \[8, 512\]; set "
        r"model\.video_depth and model\.projection",
    ):  # fmt: skip
        start.load_model(new_model(projection=(8,)))
    with pytest.raises(CheckpointError, match=r"has no tensor video_model\.conv2x\.1\.\S+ \[.*model\.video_depth"):
        start.load_model(new_model(depth=18))
    with pytest.raises(CheckpointError, match=r"has a tensor \S*projection\.2\.bias \[8\], which the model does not"):
        start.load_model(new_model(projection=(16,)))


@pytest.mark.parametrize(
    ("file", "action"),
    [
        ("checkpoint.json", lambda start: None),
        ("trainer.pt", lambda start: None),
        (f"{BANK_NAME}/video/zarr.json", lambda start: None),
        ("model.safetensors", lambda start: start.load_model(new_model())),
        (f"{BANK_NAME}/video/c/0/0", lambda start: start.load_bank(MemoryBank(NUM_INSTANCES, DIM))),
    ],
)
def test_a_damaged_newest_checkpoint_is_named(run, tmp_path, file, action):
    folder = shutil.copytree(run, tmp_path / "run")
    path = folder / "checkpoints" / "step-00000070" / file
    path.write_bytes(path.read_bytes()[:30])
    with pytest.raises(CheckpointError, match=rf"step-00000070/{file}"):
        action(open_starting_point(str(folder)))


def test_wrong_kinds(run, imported, tmp_path):
    weights = export_weights(str(run), str(tmp_path / "weights.safetensors"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("no checkpoint")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "latest").write_text("checkpoints/step-00000001")
    for place, message in [
        (weights, r"weights\.safetensors: holds only a model"),
        (tmp_path / "empty", r"empty/checkpoint\.json: does not exist, nor does latest"),
        (tmp_path / "broken", r"step-00000001/checkpoint\.json: does not exist"),
        (tmp_path / "notes.txt", r"notes\.txt: not a readable PyTorch file"),
        (tmp_path / "nothing", r"nothing: no such checkpoint"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            open_starting_point(str(place))


def test_a_run_without_a_loss_is_none_of_avid(tmp_path):
    worker.save(open_storage(tmp_path), 1)
    with pytest.raises(CheckpointError, match=r"trainer\.pt: has no criterion\.partition_function"):
        open_starting_point(str(tmp_path))
