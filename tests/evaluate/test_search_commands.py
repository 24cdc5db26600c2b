"""``avid-evaluate features | retrieval | knn`` as a user gives them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr
from click.testing import CliRunner

from avid_pipeline.evaluate.cli import main
from avid_pipeline.evaluate.feature_store import open_store
from avid_pipeline.evaluate.results import read_results
from avid_pipeline.preprocess.executors.local import LocalExecutor
from avid_pipeline.preprocess.job import run_job
from avid_pipeline.preprocess.sources.esc50 import list_esc50
from avid_pipeline.preprocess.sources.ucf101 import list_ucf101
from avid_pipeline.shards_spec.manifest import MANIFEST_NAME, Parameters, VideoParameters, index_ranges
from avid_pipeline.shards_spec.storage import open_storage
from tests.conftest import make_video


def run(*arguments, code=0):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.output


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def folds(small_dataset, tmp_path_factory):
    """The small data set with two folds: the first and the last five instances."""
    root = tmp_path_factory.mktemp("folds")
    for path in small_dataset.iterdir():
        if path.is_file():
            os.link(path, root / path.name)
    content = json.loads((root / MANIFEST_NAME).read_text())
    parts = {"fold1-train": range(5), "fold1-test": range(5, 10), "fold2-train": range(5, 10), "fold2-test": range(5)}
    content["subsets"] = {name: [list(pair) for pair in index_ranges(part)] for name, part in parts.items()}
    (root / MANIFEST_NAME).unlink()
    (root / MANIFEST_NAME).write_text(json.dumps(content))
    return root


def test_retrieval_within_and_across(trained_run, small_dataset, tmp_path):
    output = run("retrieval", trained_run, "--data", small_dataset, "--clips", 2, "--output", tmp_path)
    assert "retrieval by instance" in output
    assert "retrieval by class" in output
    by_instance, by_class = read_results(open_storage(tmp_path)).tables
    assert list(by_instance.rows) == ["video to audio", "audio to video", "video to video", "audio to audio", "chance"]
    assert by_instance.rows["chance"]["R@5"] == 0.5
    for row in by_instance.rows.values():
        assert 0 <= row["R@1"] <= row["R@5"] <= row["R@10"] == row["R@20"] == 1
    assert list(by_class.rows) == list(by_instance.rows)
    # Classes of 4, 3 and 3: with the own left out, 3 of 9 are alike for four queries and 2 of 9 for six.
    assert by_class.rows["chance"]["R@1"] == pytest.approx((4 * 3 / 9 + 6 * 2 / 9) / 10)
    assert all(row["R@20"] == 1 for row in by_class.rows.values())
    report = (tmp_path / "report.html").read_text()
    assert report.count("data:image/png") >= 4
    for direction in ("video to audio", "audio to video", "video to video", "audio to audio"):
        assert f"neighbours: {direction}" in report


def test_the_same_command_again_uses_what_is_there(trained_run, small_dataset, tmp_path):
    arguments = ("retrieval", trained_run, "--data", small_dataset, "--clips", 2, "--output", tmp_path)
    run(*arguments)
    before = files(tmp_path / "features")
    (tmp_path / "results.json").unlink()
    assert "2 of 2 parts of the features are there already" in run(*arguments)
    assert files(tmp_path / "features") == before
    assert read_results(open_storage(tmp_path)).command == "retrieval"
    refused = run(*arguments[:5], 3, "--output", tmp_path, code=1)
    assert "clips was 2 and is now 3" in refused
    (tmp_path / "mine.txt").write_text("stays")
    run(*arguments[:5], 3, "--output", tmp_path, "--overwrite")
    assert (tmp_path / "mine.txt").read_text() == "stays"


def test_overwriting_removes_nothing_of_others(trained_run, small_dataset, tmp_path):
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "train.csv").write_text("mine")
    arguments = ("features", trained_run, "--data", small_dataset, "--clips", 1, "--features", "audio", "--overwrite")
    run(*arguments, "--output", tmp_path)
    assert (tmp_path / "labels" / "train.csv").read_text() == "mine"
    zarr.create_array(str(tmp_path / "theirs"), name="labels", data=np.arange(3))
    assert "holds a zarr group that is not ours" in run(*arguments, "--output", tmp_path / "theirs", code=1)
    assert zarr.open_array(str(tmp_path / "theirs" / "labels"), mode="r")[2] == 2


def test_what_needs_no_features_is_refused_before_they_are_computed(trained_run, small_dataset, tmp_path):
    content = json.loads((small_dataset / MANIFEST_NAME).read_text()) | {"classes": []}
    other = tmp_path / "other"
    other.mkdir()
    for path in small_dataset.iterdir():
        if path.is_file() and path.name != MANIFEST_NAME:
            os.link(path, other / path.name)
    (other / MANIFEST_NAME).write_text(json.dumps(content))
    assert "has no classes" in run("knn", trained_run, "--data", other, "--output", tmp_path / "out", code=1)
    assert not (tmp_path / "out").exists()


def test_one_modality_and_one_clip_leave_classes(trained_run, small_dataset, tmp_path):
    arguments = ("retrieval", trained_run, "--data", small_dataset, "--clips", 1, "--features", "video")
    run(*arguments, "--output", tmp_path)
    assert [table.title for table in read_results(open_storage(tmp_path)).tables] == ["retrieval by class"]


def test_the_same_weights_elsewhere_are_the_same(trained_run, small_dataset, tmp_path):
    arguments = ("--data", small_dataset, "--clips", 1, "--features", "video", "--output", tmp_path / "out")
    for options in ((), ("--random-weights", 1, "--overwrite")):
        run("knn", trained_run, *arguments, *options)
        moved = Path(shutil.copytree(trained_run, tmp_path / f"moved{len(options)}"))
        assert "1 of 1 parts of the features are there already" in run("knn", moved, *arguments, *options[:2])
    assert "random weights, seed 1" in run("knn", moved, *arguments, "--random-weights", 2, code=1)


def test_results_go_below_the_run_unless_told_otherwise(trained_run, small_dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("knn", trained_run, "--data", small_dataset, "--clips", 1)
    assert (trained_run / "evaluation" / "step-00000002" / "knn-kinetics-train" / "results.json").is_file()
    run("knn", trained_run, "--data", small_dataset, "--gallery", small_dataset, "--clips", 1)
    assert (trained_run / "evaluation" / "step-00000002" / "knn-kinetics-train-from-train").is_dir()
    run("knn", trained_run, "--data", small_dataset, "--clips", 1, "--random-weights", 3)
    assert (trained_run / "evaluation" / "random-3" / "knn-kinetics-train" / "results.json").is_file()
    weights = next(trained_run.glob("checkpoints/*/model.safetensors"))
    (tmp_path / "alone.safetensors").write_bytes(weights.read_bytes())
    run("knn", "alone.safetensors", "--data", small_dataset, "--clips", 1, "--features", "video")
    assert (tmp_path / "evaluation" / "alone-safetensors" / "knn-kinetics-train" / "report.html").is_file()


def test_every_name_of_a_checkpoint_gives_the_same_numbers(trained_run, small_dataset, tmp_path):
    # A weights file lies in a folder that says how it was trained; reading it at 224 pixels would be another result.
    folder = trained_run / (trained_run / "latest").read_text().strip()
    found = []
    for number, checkpoint in enumerate((trained_run, folder, folder / "model.safetensors")):
        output = tmp_path / str(number)
        run("retrieval", checkpoint, "--data", small_dataset, "--clips", 1, "--output", output)
        found.append(read_results(open_storage(output)))
    assert found[0].tables == found[1].tables == found[2].tables
    assert found[0].checkpoint == found[1].checkpoint == found[2].checkpoint
    assert found[0].checkpoint.step == 2


def test_knn_with_a_gallery_a_fold_and_neither(trained_run, small_dataset, folds, tmp_path):
    alone = run("knn", trained_run, "--data", small_dataset, "--clips", 1, "--output", tmp_path / "alone")
    assert "video.pool" in alone
    (table,) = read_results(open_storage(tmp_path / "alone")).tables
    assert list(table.rows) == ["video.pool", "audio.pool", "video", "audio", "the most frequent classes"]
    assert list(table.rows["video"]) == [f"top-{top}, k={k}" for k in (1, 5, 20) for top in (1, 5)]
    assert table.rows["the most frequent classes"]["top-1, k=1"] == 0.4
    # In a gallery that holds the queries themselves, each finds itself.
    arguments = ("knn", trained_run, "--data", small_dataset, "--clips", 1)
    run(*arguments, "--gallery", small_dataset, "--k", 1, "--output", tmp_path / "own")
    (table,) = read_results(open_storage(tmp_path / "own")).tables
    assert table.rows["audio.pool"] == {"top-1, k=1": 1, "top-5, k=1": 1}
    assert "confusion" in (tmp_path / "own" / "report.html").read_text().lower()
    run("knn", trained_run, "--data", folds, "--fold", 2, "--clips", 1, "--output", tmp_path / "fold")
    results = read_results(open_storage(tmp_path / "fold"))
    assert [(each.role, each.subset, each.instances) for each in results.data] == [
        ("queries", "fold2-test", 5),
        ("gallery", "fold2-train", 5),
    ]


def test_retrieval_of_a_fold_s_training_part(trained_run, folds, tmp_path):
    run("retrieval", trained_run, "--data", folds, "--fold", 1, "--clips", 1, "--output", tmp_path)
    results = read_results(open_storage(tmp_path))
    (table,) = results.tables
    assert list(table.rows) == ["video.pool", "audio.pool", "chance"]
    assert "neighbours: video.pool" in (tmp_path / "report.html").read_text()


def test_features_hold_what_was_asked_for(trained_run, small_dataset, tmp_path):
    names = "video.conv4x,audio"
    arguments = ("features", trained_run, "--data", small_dataset, "--clips", 2, "--output", tmp_path / "f")
    output = run(*arguments, "--features", names, "--dtype", "float16")
    assert "video.conv4x, audio of 2 clips of 10 instances" in output
    store = open_store(open_storage(tmp_path / "f"))
    assert store.features("video.conv4x", 1).shape == (10, 9216)
    assert store.features("audio", 0).dtype == np.float16
    refused = run(*arguments, "--features", "video.conv1", code=1)
    assert "expected some of video, audio, video.conv2x" in refused
    assert "holds features of something else" in run(*arguments, "--features", "audio", code=1)
    run(*arguments, "--features", "audio", "--overwrite")
    assert open_store(open_storage(tmp_path / "f")).names == ("audio",)
    assert not [path for path in (tmp_path / "f" / "features" / "video.conv4x").rglob("*") if path.is_file()]


@pytest.mark.slow
def test_any_number_of_ranks_gives_the_same_bytes(trained_run, small_dataset, tmp_path):
    # Three clips are three chunks, which do not divide by two.
    arguments = ["retrieval", str(trained_run), "--data", str(small_dataset), "--clips", "3", "--workers", "1"]
    run(*arguments, "--output", tmp_path / "one")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "avid_pipeline.evaluate", *arguments, "--output", str(tmp_path / "two")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=180, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("retrieval by instance") == 1
    one, two = files(tmp_path / "one" / "features"), files(tmp_path / "two" / "features")
    assert one.keys() == two.keys()
    assert {name for name in one if one[name] != two[name]} == set()
    assert read_results(open_storage(tmp_path / "one")) == read_results(open_storage(tmp_path / "two"))


def test_pictures_without_sound_and_sound_without_pictures(trained_run, tmp_path):
    parameters = Parameters(video=VideoParameters(short_side=48), samples_per_shard=4)
    for name in ("a", "b"):
        for number in range(2):
            make_video(tmp_path / "ucf" / name / f"v_{name}_g0{number}_c01.avi", seconds=0.8, tone=None)
            make_video(tmp_path / "esc" / "audio" / f"{name}{number}.wav", seconds=0.8, picture=False)
    rows = [f"{name}{number}.wav,{1 + number},{'ab'.index(name)},{name}" for name in "ab" for number in range(2)]
    (tmp_path / "esc" / "meta").mkdir()
    (tmp_path / "esc" / "meta" / "esc50.csv").write_text("\n".join(["filename,fold,target,category", *rows]) + "\n")
    run_job(list_ucf101(str(tmp_path / "ucf")), parameters, str(tmp_path / "video"), LocalExecutor(1))
    run_job(list_esc50(str(tmp_path / "esc")), parameters, str(tmp_path / "audio"), LocalExecutor(1))
    for modality in ("video", "audio"):
        root, out = tmp_path / modality, tmp_path / f"{modality}-out"
        run("retrieval", trained_run, "--data", root, "--clips", 2, "--output", out)
        assert list(read_results(open_storage(out)).tables[0].rows) == [f"{modality} to {modality}", "chance"]
        other = "audio" if modality == "video" else "video"
        refused = run("knn", trained_run, "--data", root, "--features", other, "--output", tmp_path / "none", code=1)
        assert f"this evaluation needs {other}" in refused
    run("knn", trained_run, "--data", tmp_path / "audio", "--fold", 1, "--clips", 1, "--output", tmp_path / "esc-out")
    assert "there is no fold 9 in this data set: it has 1, 2" in run(
        "knn", trained_run, "--data", tmp_path / "audio", "--fold", 9, code=1
    )
    assert "there is no fold 1 in this data set: it has none" in run(
        "knn", trained_run, "--data", tmp_path / "video", "--fold", 1, code=1
    )


def test_mistakes_are_clear_errors(trained_run, small_dataset, tmp_path):
    (tmp_path / "weights.pth.tar").write_bytes(b"no weights")
    for checkpoint, data, message in (
        (tmp_path / "none", small_dataset, "no such checkpoint"),
        (tmp_path / "weights.pth.tar", small_dataset, "weights.pth.tar"),
        (tmp_path, small_dataset, str(tmp_path)),
        (trained_run, tmp_path / "none", "does not exist"),
    ):
        assert message in run("retrieval", checkpoint, "--data", data, code=1)
    once = run("retrieval", trained_run, "--data", small_dataset, "--fold", 1, "--gallery", small_dataset, code=1)
    assert "give it alone" in once
    assert "has no such subset" in run("knn", trained_run, "--data", small_dataset, "--subset", "mine", code=1)


def test_a_damaged_weights_file_is_named(trained_run, small_dataset, tmp_path):
    folder = Path(shutil.copytree(trained_run, tmp_path / "run"))
    weights = next(folder.glob("checkpoints/*/model.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(bytes(data))
    assert "does not have the checksum" in run("knn", folder, "--data", small_dataset, code=1)


def test_galleries_of_other_classes_are_refused(trained_run, small_dataset, folds, tmp_path):
    content = json.loads((folds / MANIFEST_NAME).read_text())
    content["classes"][1] = "juggling"
    other = tmp_path / "other"
    other.mkdir()
    for path in folds.iterdir():
        os.link(path, other / path.name)
    (other / MANIFEST_NAME).unlink()
    (other / MANIFEST_NAME).write_text(json.dumps(content))
    refused = run("knn", trained_run, "--data", small_dataset, "--gallery", other, code=1)
    assert "class 1 is 'class 1' there and 'juggling' here" in refused
