"""``avid-evaluate finetune``: folds, errors, and everything in a bucket."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from avid_pipeline.errors import ConfigError
from avid_pipeline.evaluate.classification.commands import finetune, linear
from avid_pipeline.evaluate.classification.data import open_parts
from avid_pipeline.evaluate.classification.finetune import NETWORK, run_finetune
from avid_pipeline.evaluate.classification.progress import MODEL_NAME
from avid_pipeline.evaluate.results import REPORT_NAME, RESULTS_NAME, read_results
from avid_pipeline.shards_spec.storage import open_storage
from tests.evaluate.classification.labelled import (
    alone,
    fine_tune,
    finetune_config,
    invoke,
    linear_config,
    quiet,
    small_evaluated,
    storage,
    write_config,
)


def accuracy(results):
    return results.tables[0].rows[NETWORK]


def test_all_folds_have_a_mean(folds, tmp_path):
    evaluated_path = small_evaluated(tmp_path).identity.path
    config = write_config(tmp_path / "config.yaml", finetune_config(classifier_epochs=0, epochs=1))
    output = tmp_path / "output"
    arguments = (config, evaluated_path, "--data", folds, "--all-folds", "--output", output)
    done = invoke(finetune, *arguments)
    assert done.exit_code == 0, done.output
    assert "fold 2 of 1, 2" in done.output
    together, *of_folds = (
        read_results(open_storage(folder)) for folder in (output, output / "fold1", output / "fold2")
    )
    values = [accuracy(each)["Video@1"] for each in of_folds]
    assert accuracy(together)["Video@1"] == pytest.approx(sum(values) / 2)
    assert accuracy(together)["Video@1 ±"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    assert [data.subset for data in together.data] == ["fold1-train", "fold1-test", "fold2-train", "fold2-test"]
    assert [table.title for table in together.tables] == ["Mean over 2 folds", "Fold 1", "Fold 2"]
    assert together.settings["folds"] == [1, 2]
    # Again, it only shows them.
    again = invoke(finetune, *arguments)
    assert again.exit_code == 0, again.output
    assert "epoch" not in again.output
    assert "Mean over 2 folds" in again.output
    refused = invoke(finetune, config, evaluated_path, "--data", folds, "--fold", 1, "--output", output)
    assert refused.exit_code == 1
    assert "is of another evaluation" in refused.output
    of_one = (config, evaluated_path, "--data", folds, "--all-folds", "--output", output / "fold1")
    assert "is of one evaluation, not of several folds" in invoke(finetune, *of_one).output


def test_errors_on_the_command_line(folds, splits, tmp_path):
    weights = small_evaluated(tmp_path).identity.path
    config = write_config(tmp_path / "config.yaml", finetune_config())

    def refused(*arguments, checkpoint=weights):
        done = invoke(finetune, config, checkpoint, "--output", tmp_path / "output", *arguments)
        assert done.exit_code == 1, done.output
        assert "Traceback" not in done.output
        return " ".join(done.output.split())

    data, (train, test) = ("--data", folds), splits
    assert "there is no fold 7 in this data set: it has 1, 2" in refused(*data, "--fold", 7)
    assert "give one of --fold N, --all-folds" in refused(*data)
    assert "give one of" in refused(*data, "--fold", 1, "--all-folds")
    assert "there are no folds in this data set" in refused("--data", train, "--all-folds")
    assert "does not exist" in refused("--data", tmp_path / "none", "--fold", 1)
    assert "use at most 14" in refused(*data, "--fold", 1, "--set", "data.batch_size=15")
    assert "dropuot: unknown key; known here" in refused(*data, "--fold", 1, "--set", "dropuot=0.1")
    torch.save({"model": {"conv.weight": torch.zeros(1)}}, tmp_path / "other.pth")
    message = refused(*data, "--fold", 1, checkpoint=tmp_path / "other.pth")
    assert "no tensor of an AVModel" in message
    manifest = json.loads((test / "manifest.json").read_text())
    manifest["classes"][1] = "Yellow"
    others = shutil.copytree(test, tmp_path / "others")
    (others / "manifest.json").write_text(json.dumps(manifest))
    assert "class 1 is 'Green' there and 'Yellow' here" in refused("--data", train, "--test-data", others)
    manifest["classes"] = manifest["classes"][:2]
    manifest["classes"][1] = "Green"
    (others / "manifest.json").write_text(json.dumps(manifest))
    assert "class 2 is 'Red' there and no such class here" in refused("--data", train, "--test-data", others)


def test_data_without_picture_or_classes_are_refused(splits, evaluated, tmp_path):
    train, test = splits
    for change, message in (({"modalities": ["audio"]}, "needs video"), ({"classes": []}, "has no classes")):
        copies = []
        for root in (train, test):
            copy = shutil.copytree(root, tmp_path / message.replace(" ", "-") / root.name)
            content = json.loads((copy / "manifest.json").read_text()) | change
            (copy / "manifest.json").write_text(json.dumps(content))
            copies.append(str(copy))
        with pytest.raises(ConfigError, match=message):
            run_finetune(
                finetune_config(), evaluated, *open_parts(*copies, None), storage(tmp_path), alone(), say=quiet
            )


def test_data_checkpoint_and_output_in_a_bucket(folds, tmp_path, make_bucket):
    bucket = make_bucket()
    root = open_storage(bucket.url, options=bucket.options)
    weights = Path(small_evaluated(tmp_path).identity.path)
    root.write("weights.safetensors", weights.read_bytes())
    for path in folds.rglob("*"):
        if path.is_file():
            root.write(f"shards/{path.relative_to(folds)}", path.read_bytes())
    config = write_config(tmp_path / "config.yaml", finetune_config(classifier_epochs=0, epochs=1))
    done = invoke(
        finetune, config, f"{bucket.url}/weights.safetensors", "--data", f"{bucket.url}/shards", "--fold", 1,
        "--output", f"{bucket.url}/results", *bucket.arguments,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert sorted(root.names("results")) == [f"results/{name}" for name in (MODEL_NAME, REPORT_NAME, RESULTS_NAME)]
    output = open_storage(f"{bucket.url}/results", options=bucket.options)
    local = fine_tune(
        finetune_config(classifier_epochs=0, epochs=1), small_evaluated(tmp_path), folds, tmp_path / "local"
    )
    assert read_results(output).tables == local.tables


def test_cached_features_in_a_bucket(splits, tmp_path, make_bucket):
    bucket = make_bucket()
    weights = small_evaluated(tmp_path).identity.path
    config = write_config(tmp_path / "config.yaml", linear_config(epochs=1, layers=("conv5x",), modality="audio"))
    output = f"{bucket.url}/results"
    arguments = (config, weights, "--data", splits[0], "--test-data", splits[1], "--output", output, "--cache-features")

    def folders(*options):
        done = invoke(linear, *arguments, *bucket.arguments, *options)
        assert done.exit_code == 0, done.output
        names = open_storage(bucket.url, options=bucket.options).names("results")
        return {name.split("/")[1] for name in names if name.count("/") > 1}

    first = folders()
    assert {name.rpartition("-")[0] for name in first} == {"features-train", "features-test"}
    assert first & folders("--overwrite", "--set", "augmentation.volume=0.2") == {
        name for name in first if "test" in name
    }
