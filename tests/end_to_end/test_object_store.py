"""Training and evaluation on data in object storage give what they give on disk, to the bit."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from avid_pipeline.evaluate.cli import main as evaluate
from avid_pipeline.evaluate.results import read_results
from avid_pipeline.shards_spec.storage import open_storage
from avid_pipeline.train.cli import main as train
from avid_pipeline.train.run_log import read_metrics

CONFIG = """
epochs: 1
model: {video_depth: 10, projection: [16, 8]}
clip: {crop_size: 16, video_seconds: 0.25, audio_seconds: 0.3}
data: {batch_size: 5, workers: 2}
loss: {num_negatives: 8}
optimizer: {learning_rate: 1e-3}
log_every: 1
"""


@pytest.fixture
def bucket(small_dataset, make_bucket):
    found = make_bucket()
    storage = open_storage(found.url, options=found.options)
    for path in small_dataset.glob("*.*"):
        storage.write(f"shards/{path.name}", path.read_bytes())
    return found


def run(command, *arguments):
    result = CliRunner().invoke(command, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result


def losses(folder: Path):
    return [entry["loss/total"] for entry in read_metrics(folder)]


def test_train_and_evaluate_from_s3(small_dataset, bucket, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # logs of a run in an object store go to the current folder
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG)
    root = f"{bucket.url}/shards"
    run(train, config, "--data", small_dataset, "--output", tmp_path / "local")
    run(train, config, "--data", root, "--output", tmp_path / "remote", *bucket.arguments)
    cached = (f"data.cache_folder={tmp_path / 'cache'}", "data.cache_gigabytes=1", "data.connections=2")
    settings = [part for value in cached for part in ("--set", value)]
    run(train, config, "--data", root, "--output", tmp_path / "cached", *settings, *bucket.arguments)
    assert len(losses(tmp_path / "local")) == 2
    assert losses(tmp_path / "remote") == losses(tmp_path / "cached") == losses(tmp_path / "local")
    assert any(path.is_file() for path in (tmp_path / "cache").rglob("*"))
    results = []
    for name, data, options in (("on-disk", small_dataset, []), ("in-s3", root, bucket.arguments)):
        out = tmp_path / name
        run(evaluate, "retrieval", tmp_path / "local", "--data", data, "--output", out, "--clips", 2, *options)
        results.append(read_results(open_storage(out)).tables)
    assert results[0] == results[1]
    # A run in an object store, and results that go there.
    run(train, config, "--data", root, "--output", f"{bucket.url}/run", *bucket.arguments)
    out = f"{bucket.url}/results"
    run(evaluate, "retrieval", f"{bucket.url}/run", "--data", root, "--output", out, "--clips", 2, *bucket.arguments)
    storage = open_storage(out, options=bucket.options)
    assert read_results(storage).tables == results[0]
    assert b"</html>" in storage.read("report.html")


def test_a_root_that_is_not_there_is_one_clear_error(make_bucket, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG)
    bucket = make_bucket()
    arguments = [str(config), "--data", f"{bucket.url}/nothing", "--output", str(tmp_path / "run"), *bucket.arguments]
    result = CliRunner().invoke(train, arguments)
    assert result.exit_code == 1
    assert "nothing/manifest.json: does not exist" in result.output
    assert "Traceback" not in result.output
