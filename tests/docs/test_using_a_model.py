"""Every snippet of the guide runs, in order, where the files that it names exist."""

import re
import shlex
import shutil
from pathlib import Path

import av
import boto3
import numpy as np
import pytest
import torch
from click.testing import CliRunner

from avid_pipeline.evaluate.cli import main as evaluate
from avid_pipeline.preprocess.executors.local import LocalExecutor
from avid_pipeline.preprocess.job import run_job
from avid_pipeline.preprocess.single_file import read_media
from avid_pipeline.preprocess.sources.folder import list_folder
from avid_pipeline.shards_spec.manifest import Parameters, VideoParameters
from avid_pipeline.shards_spec.reader import open_dataset
from tests.conftest import REPOSITORY, make_video
from tests.evaluate.saved_models import save_published, save_run, save_weights, small_model

GUIDE = REPOSITORY / "docs" / "using-a-model.md"
CREDENTIALS = {"aws_access_key_id": "anyone", "aws_secret_access_key": "anything"}
TONES = {"bark": 300, "violin": 900, "rain": 4000}


def snippets():
    """Line of the guide, language and text of every block of code."""
    text = GUIDE.read_text(encoding="utf-8")
    found = []
    for block in re.finditer(r"^( *)```(\w+)\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE):
        line = text.count("\n", 0, block.start(3)) + 1
        found.append((line, block[2], re.sub(rf"^{block[1]}", "", block[3], flags=re.MULTILINE)))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with all that the guide names, but for what is in the bucket."""
    folder = tmp_path_factory.mktemp("guide")
    make_video(folder / "dog.mp4", tone=TONES["bark"])
    for number, (name, tone) in enumerate(TONES.items()):
        make_sound(folder / f"{name}.wav", tone)
        make_video(folder / "files" / f"{name}.mp4", tone=tone, begin=number)
    parameters = Parameters(video=VideoParameters(short_side=48))
    for split in ("train", "val"):
        listing = list_folder(folder / "files", split=split)
        run_job(listing, parameters, str(folder / "shards" / split), LocalExecutor(1))
    model = small_model(dim=128)
    save_run(
        folder / "runs" / "kinetics", model, open_dataset(folder / "shards" / "train").manifest.spectrogram_statistics
    )
    save_weights(folder / "model.safetensors", model)
    save_published(folder / "AVID_Kinetics.pth.tar", model)
    return folder


def make_sound(path, tone):
    """A sound file that is no mp4."""
    samples = 0.3 * np.sin(2 * np.pi * tone * np.arange(24_000 * 2) / 24_000)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=24_000, layout="mono")
        frame = av.AudioFrame.from_ndarray((samples * 32767).astype("<i2")[None], format="s16", layout="mono")
        frame.sample_rate = 24_000
        container.mux([*stream.encode(frame), *stream.encode(None)])


@pytest.fixture
def bucket(folder, s3_endpoint, monkeypatch):
    """The bucket of the guide, found as users have it: by the environment."""
    client = boto3.client("s3", endpoint_url=s3_endpoint, region_name="us-east-1", **CREDENTIALS)
    client.create_bucket(Bucket="my-bucket")
    for path in (folder / "runs").rglob("*"):
        if path.name in ("latest", "checkpoint.json", "model.safetensors"):
            client.upload_file(str(path), "my-bucket", str(path.relative_to(folder)))
    environment = {"aws_endpoint_url": s3_endpoint, "aws_region": "us-east-1", **CREDENTIALS}
    for name, value in environment.items():
        monkeypatch.setenv(name.upper(), value)


def run(line, language, text, namespace):
    if language == "python":
        # The line numbers of a traceback are those of the guide.
        exec(compile("\n" * (line - 1) + text, str(GUIDE), "exec"), namespace)
        return
    assert language == "sh"
    for command in text.splitlines():
        program, *arguments = shlex.split(command, comments=True)
        assert program == "avid-evaluate", command
        done = CliRunner().invoke(evaluate, arguments)
        assert done.exit_code == 0, f"{GUIDE}:{line}: {command}\n{done.output}"


@pytest.mark.usefixtures("bucket")
def test_every_snippet(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    found = snippets()
    assert sum(language == "python" for _, language, _ in found) == GUIDE.read_text().count("```python") >= 8
    guide = {}
    for line, language, text in found:
        run(line, language, text, guide)
    check(guide, capsys.readouterr().out)


def check(guide, printed):
    """What the guide says of its snippets' results."""
    embedder, dog = guide["embedder"], guide["dog"]
    for name in ("picture", "sound", "bark"):
        assert guide[name].shape == (128,)
        torch.testing.assert_close(guide[name].norm(), torch.tensor(1.0))
    assert guide["pictures"].shape == (2, 128)
    assert guide["part"].record.duration == pytest.approx(1, abs=0.1)
    for name in ("published", "remote", "weights"):
        assert guide[name].statistics is not None
        assert guide[name].model.projection == (16, 128)
    assert guide["remote"].clip == embedder.clip
    assert torch.equal(guide["remote"].sound(dog), guide["sound"])
    assert guide["sounds"].shape == (3, 128)
    torch.testing.assert_close(guide["similarity"], guide["sounds"] @ guide["picture"])
    assert guide["best"] == guide["names"][int((guide["picture"] @ guide["sounds"].T).argmax())]
    assert guide["one_clip"].shape == guide["vectors"].shape == (3, 128)
    check_search(guide, printed)
    assert guide["video_vectors"].shape == guide["audio_vectors"].shape == (2, 128)
    assert list(guide["video_layers"]) == ["conv1", "conv2x", "conv3x", "conv4x", "conv5x", "pool"]
    assert guide["video_layers"]["conv4x"].shape == (2, 256, 2, 14, 14)
    assert guide["audio_layers"]["conv4x"].shape == (2, 256, 13, 17)
    assert guide["video_layers"]["pool"].shape == (2, 512, 1, 1, 1)


def check_search(guide, printed):
    """The stored vectors are those that the embedder gives for the files."""
    validation, embedder = guide["validation"], guide["embedder"]
    sources = [validation.read(index).record.source for index in range(3)]
    samples = [read_media(Path("files") / source, guide["parameters"]) for source in sources]
    torch.testing.assert_close(embedder.sound(samples), guide["vectors"], rtol=0, atol=1e-5)
    assert printed.splitlines()[0] == sources[guide["instance"]]
    assert guide["found"].all()
    assert guide["sample"] == read_media("dog.mp4", validation.manifest.parameters)
    assert guide["sample"].record.video.height == 48 < guide["dog"].record.video.height


def test_the_other_names_of_the_guide_exist():
    """Links, and the tools that are named in passing."""
    text = GUIDE.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("https://") or (GUIDE.parent / target).exists(), target
    for program in set(re.findall(r"\b(avid-\w+)", text)) - {"avid-cma"}:
        assert shutil.which(program) or f"{program} =" in (REPOSITORY / "setup.cfg").read_text(), program
