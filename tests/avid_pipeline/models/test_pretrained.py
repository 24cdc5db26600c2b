import os
import pickle
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from avid_pipeline.errors import CheckpointError
from avid_pipeline.models import AVModel, load_pretrained
from avid_pipeline.models.pretrained import import_published, read_checkpoint_bytes

STEP = "checkpoints/step-00000100"


@pytest.fixture(scope="session")
def model():
    return AVModel(10, projection=(64, 16), generator=torch.Generator().manual_seed(0)).eval()


@pytest.fixture(scope="session")
def run_folder(model, tmp_path_factory):
    """A run folder with one checkpoint, as the trainer leaves it."""
    folder = tmp_path_factory.mktemp("run")
    (folder / STEP).mkdir(parents=True)
    save_file(model.state_dict(), folder / STEP / "model.safetensors")
    (folder / "latest").write_text(f"{STEP}\n")
    return folder


@pytest.fixture(scope="session")
def published_content(model):
    """What a published checkpoint holds, with numbers as training scripts save them."""
    random = torch.Generator().manual_seed(1)
    return {
        "epoch": np.int64(200),
        "model": {f"module.{name}": tensor for name, tensor in model.state_dict().items()},
        "optimizer": {"state": {0: {"step": 5}}, "param_groups": [{"lr": np.float64(2e-4), "params": [0]}]},
        "train_criterion": {
            "nce_average.view1_mem": torch.randn(20, 16, generator=random),
            "nce_average.view2_mem": torch.randn(20, 16, generator=random),
            "criterion.avg_exp_score": torch.tensor(3.25),
        },
    }


@pytest.fixture
def published(published_content, tmp_path):
    """Write a published checkpoint with some of its entries replaced, or dropped where None."""

    def write(**replaced):
        content = {key: value for key, value in {**published_content, **replaced}.items() if value is not None}
        torch.save(content, tmp_path / "checkpoint.pth.tar")
        return tmp_path / "checkpoint.pth.tar"

    return write


@pytest.fixture
def serve():
    """Serve folders over HTTP: folder -> URL."""
    servers = []

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    def start(folder):
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=os.fspath(folder)))
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        servers.append((server, thread))
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    for server, thread in servers:
        server.shutdown()
        server.server_close()
        thread.join(60)


def assert_same_model(loaded, expected):
    assert not loaded.training
    assert loaded.video_depth == expected.video_depth
    assert loaded.projection == expected.projection
    state = expected.state_dict()
    assert list(loaded.state_dict()) == list(state)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_published_names_and_weights_of_depth_18(golden_state, golden_inputs, golden, assert_golden, tmp_path):
    path = tmp_path / "AVID.pth.tar"
    torch.save({"epoch": 1, "model": {f"module.{k}": v for k, v in golden_state.items()}}, path)
    loaded = load_pretrained(path)
    with torch.no_grad():
        video_emb, audio_emb = loaded(*golden_inputs)
    assert_golden(video_emb, golden["video_emb_eval"])
    assert_golden(audio_emb, golden["audio_emb_eval"])


def test_published_file(published, model):
    path = published()
    assert_same_model(load_pretrained(path), model)
    assert_same_model(load_pretrained(str(path)), model)
    assert_same_model(load_pretrained(f"file://{path}"), model)


def test_published_file_of_before_zip_archives(published_content, model, tmp_path):
    path = tmp_path / "old.pth.tar"
    torch.save(published_content, path, _use_new_zipfile_serialization=False)
    assert_same_model(load_pretrained(path), model)
    assert import_published(path).epoch == 200


def test_published_file_with_tensors_saved_on_a_gpu(published, model, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        path = published()
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match=r"deserialize object on a CUDA device"):
            torch.load(path, weights_only=False)
    assert_same_model(load_pretrained(path), model)
    assert import_published(path).video_memory.device.type == "cpu"


def test_checkpoint_folder_file_and_run_folder(run_folder, model):
    for place in (run_folder / STEP / "model.safetensors", run_folder / STEP, run_folder):
        assert_same_model(load_pretrained(place), model)


def test_the_newest_checkpoint_is_followed_as_latest_changes(run_folder, tmp_path):
    other = AVModel(34, projection=(8,), generator=torch.Generator().manual_seed(9)).eval()
    (tmp_path / "b").mkdir()
    save_file(other.state_dict(), tmp_path / "b" / "model.safetensors")
    (tmp_path / "a").symlink_to(run_folder / STEP)
    (tmp_path / "latest").write_text("a")
    assert load_pretrained(tmp_path).video_depth == 10
    (tmp_path / "latest").write_text("b")
    assert_same_model(load_pretrained(tmp_path), other)


def test_over_http(run_folder, published, model, serve):
    run_url = serve(run_folder)
    for url in (run_url, f"{run_url}/{STEP}/", f"{run_url}/{STEP}/model.safetensors"):
        assert_same_model(load_pretrained(url), model)
    path = published()
    url = f"{serve(path.parent)}/{path.name}"
    assert_same_model(load_pretrained(url), model)
    assert import_published(url).partition_function == 3.25
    with pytest.raises(CheckpointError, match=r"other\.pth: does not exist"):
        load_pretrained(f"{run_url}/other.pth")
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors"):
        load_pretrained(f"{run_url}/checkpoints")


def test_loading_leaves_the_global_generator_alone(run_folder):
    before = torch.get_rng_state()
    load_pretrained(run_folder)
    assert torch.equal(torch.get_rng_state(), before)


def test_map_location_places_the_model(run_folder):
    assert load_pretrained(run_folder, "meta").video_model.conv1[0].weight.device.type == "meta"


def test_half_precision_files_give_float32(model, tmp_path):
    halves = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    save_file(halves, tmp_path / "model.safetensors")
    loaded = load_pretrained(tmp_path)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}


def test_read_checkpoint_bytes(run_folder):
    assert read_checkpoint_bytes(str(run_folder), "latest") == f"{STEP}\n".encode()
    with pytest.raises(CheckpointError, match=r"nothing: does not exist"):
        read_checkpoint_bytes(str(run_folder), "nothing")


def test_import_published(published, published_content, model):
    path = published()
    imported = import_published(path)
    path.unlink()
    criterion = published_content["train_criterion"]
    assert torch.equal(imported.video_memory, criterion["nce_average.view1_mem"])
    assert torch.equal(imported.audio_memory, criterion["nce_average.view2_mem"])
    assert imported.partition_function == 3.25
    assert imported.epoch == 200
    assert imported.model.keys() == model.state_dict().keys()
    AVModel(10, projection=(64, 16)).load_state_dict(imported.model)


@pytest.mark.parametrize("score", [np.float32(3.25), 3.25, torch.tensor([3.25]), np.float64(3.25)])
def test_import_published_partition_function_of_any_kind(score, published, published_content):
    criterion = {**published_content["train_criterion"], "criterion.avg_exp_score": score}
    assert import_published(published(train_criterion=criterion)).partition_function == 3.25


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("criterion.avg_exp_score", torch.tensor(-1.0), r"is -1\.0, expected a positive number"),
        ("criterion.avg_exp_score", torch.tensor(float("nan")), r"is nan, expected a finite number"),
        ("criterion.avg_exp_score", torch.ones(3), r"expected one number"),
        ("nce_average.view1_mem", torch.zeros(20), r"view1_mem` is \[20\], expected a tensor \[instances"),
        ("nce_average.view2_mem", "memory", r"view2_mem` is str, expected a tensor"),
        ("nce_average.view2_mem", torch.zeros(19, 16), r"\[20, 16\] and the audio memory \[19, 16\]"),
    ],
)
def test_import_published_refuses_other_entries(key, value, message, published, published_content):
    path = published(train_criterion={**published_content["train_criterion"], key: value})
    with pytest.raises(CheckpointError, match=message):
        import_published(path)


def test_import_published_names_missing_entries(published, run_folder):
    with pytest.raises(CheckpointError, match=r"key `train_criterion` is missing \(found epoch, model, optim"):
        import_published(published(train_criterion=None))
    with pytest.raises(CheckpointError, match=r"key `nce_average\.view1_mem` is missing \(found nothing\)"):
        import_published(published(train_criterion={}))
    with pytest.raises(CheckpointError, match=r"`train_criterion` is a list"):
        import_published(published(train_criterion=[]))
    with pytest.raises(CheckpointError, match=r"use load_pretrained"):
        import_published(run_folder)


class Dangerous:
    """An object that would write a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (os.fspath(self.path),)


def test_objects_that_could_run_code_are_refused_and_named(published, tmp_path):
    path = published(args=Dangerous(tmp_path / "ran"))
    for load in (load_pretrained, import_published):
        with pytest.raises(CheckpointError, match=r"\(posix\.mkdir\) that could run code .*If you trust the file"):
            load(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("audio_model.conv1.1.bias"), r"1 missing: audio_model\.conv1\.1\.bias\."),
        (lambda s: s.update(extra=torch.zeros(1)), r"1 unexpected: extra\."),
        (
            lambda s: s.update({"video_model.conv1.1.bias": torch.zeros(7)}),
            r"1 of another shape: video_model\.conv1\.1\.bias \[7\] instead of \[64\]",
        ),
        (
            lambda s: [s.pop(name) for name in list(s) if name.startswith("audio_model.block4.")],
            r"12 missing: audio_model\.block4\.conv1\.weight, (\S+, ){1}\S+ and 9 more.*copy it again",
        ),
        (
            lambda s: [s.pop(name) for name in list(s) if name.startswith("video_model.conv5x.")],
            r"\(1, 1, 1, 0\) residual blocks .* \(1, 1, 1, 1\) is depth 10",
        ),
        (
            lambda s: [s.pop(name) for name in list(s) if name.startswith("video_model.")],
            r"no tensor of an AVModel inside .*found audio_model\.",
        ),
        (
            lambda s: [s.pop(name) for name in list(s) if name.startswith("video_proj.")],
            r"no video_proj\.projection\.\*\.weight inside",
        ),
        (
            lambda s: s.update({"video_proj.projection.0.weight": torch.zeros(4)}),
            r"video_proj\.projection\.0\.weight has shape \[4\], expected \[outputs, inputs\]",
        ),
    ],
)
def test_wrong_tensors_are_listed(change, message, model, tmp_path):
    state = dict(model.state_dict())
    change(state)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message) as raised:
        load_pretrained(tmp_path)
    assert str(tmp_path / "model.safetensors") in str(raised.value)


def test_missing_places(tmp_path):
    with pytest.raises(CheckpointError, match=r"nothing\.pth: no such checkpoint"):
        load_pretrained(tmp_path / "nothing.pth")
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors .* nor latest"):
        load_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"expected a local path or an s3://"):
        load_pretrained("nonsense://bucket/model.safetensors")


@pytest.mark.parametrize("latest", ["/etc", "../other", "", "a\0b"])
def test_latest_must_stay_inside_the_run_folder(latest, tmp_path):
    (tmp_path / "latest").write_text(latest)
    with pytest.raises(CheckpointError, match=r"expected a checkpoint folder relative to the run folder"):
        load_pretrained(tmp_path)


def test_latest_without_its_checkpoint(tmp_path):
    (tmp_path / "latest").write_text(STEP)
    with pytest.raises(CheckpointError, match=r"names checkpoints/step-00000100, which holds no model"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], r"holds a list, expected a dict with the key `model`"),
        ({"state_dict": {}}, r"key `model` is missing \(found state_dict\)"),
        ({"model": [torch.zeros(1)]}, r"`model` is no dict of names and tensors"),
        ({"model": {"module.a": 1}}, r"`model` is no dict of names and tensors"),
        ({"model": {}}, r"no tensor of an AVModel inside .*found nothing"),
    ],
)
def test_other_torch_files(content, message, tmp_path):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(tmp_path / "other.pth")


@pytest.mark.parametrize("data", [b"", b"<!DOCTYPE html>\n", pickle.dumps({"model": {}}, 2)[:-1]])
@pytest.mark.parametrize("name", ["model.pth", "model.safetensors"])
def test_files_of_another_kind(name, data, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=r"not a readable (PyTorch|safetensors) file"):
        load_pretrained(tmp_path / name)


@settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_files_are_checkpoint_errors(zipped, tmp_path, data):
    path = tmp_path / "small.pth"
    content = {"epoch": 1, "model": {"module.a": torch.arange(4.0)}}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    damaged = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged[: data.draw(st.integers(0, len(damaged)))])
    with pytest.raises(CheckpointError, match=r"small\.pth"):
        load_pretrained(path)
