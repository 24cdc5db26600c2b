"""Linear probes of both networks, and what becomes of samples without label, with several, or without picture."""

import json
import shutil

import pytest
import safetensors.torch
import torch

from avid_pipeline.errors import ConfigError
from avid_pipeline.evaluate.classification.commands import linear
from avid_pipeline.evaluate.classification.data import Task, open_parts
from avid_pipeline.evaluate.classification.linear import LinearProbes, run_linear
from avid_pipeline.evaluate.classification.networks import LinearHeads
from avid_pipeline.evaluate.classification.progress import MODEL_NAME, PROGRESS_NAME
from avid_pipeline.evaluate.classification.testing import classify_clips
from avid_pipeline.evaluate.layers import compute_features
from avid_pipeline.evaluate.results import REPORT_NAME, read_results
from avid_pipeline.shards_spec.storage import open_storage
from tests.evaluate.classification.labelled import (
    SMALL,
    StoppedError,
    alone,
    invoke,
    linear_config,
    probe,
    quiet,
    rewritten,
    same_state,
    small_evaluated,
    stop_after,
    storage,
    with_labels,
    without_picture,
    write_config,
)


@pytest.mark.parametrize("modality", ["video", "audio"])
def test_every_layer_learns(splits, evaluated, tmp_path, modality):
    before = {name: tensor.clone() for name, tensor in evaluated.model.state_dict().items()}
    config = linear_config(modality=modality, epochs=6, optimizer={"learning_rate": 1e-3})
    results = probe(config, evaluated, splits, tmp_path)
    rows = results.tables[0].rows
    assert list(rows) == ["conv2x", "conv5x"]
    # Three classes: by chance a third.
    assert min(row["Video@1"] for row in rows.values()) > 0.7
    assert [table.title for table in results.tables] == ["Accuracy", "Epochs: conv2x", "Epochs: conv5x"]
    assert list(results.tables[1].rows) == [f"{number} (heads)" for number in range(1, 7)]
    assert "Accuracy of test instances" in (tmp_path / REPORT_NAME).read_text()
    weights = safetensors.torch.load_file(tmp_path / MODEL_NAME)
    assert weights["heads.conv2x.classifier.weight"].shape == (3, 9216)
    assert weights["heads.conv5x.norm.running_mean"].shape == (8192,)
    assert same_state(evaluated.model.state_dict(), before)


def test_heads_are_batch_norm_and_a_linear_layer():
    heads = LinearHeads({"conv5x": 6}, 3, seed=0)
    theirs = torch.nn.Sequential(torch.nn.BatchNorm1d(6), torch.nn.Linear(6, 3))
    theirs[1].load_state_dict(heads.heads["conv5x"].classifier.state_dict())
    features = torch.randn(5, 6, generator=torch.Generator().manual_seed(0)) * 3 + 1
    for _ in range(2):
        assert torch.allclose(heads({"conv5x": features})["conv5x"], theirs(features), atol=1e-6)
    assert torch.allclose(heads.eval()({"conv5x": features})["conv5x"], theirs.eval()(features), atol=1e-6)
    assert torch.allclose(heads.heads["conv5x"].norm.running_var, theirs[0].running_var)


def test_first_weights_depend_on_seed_and_layer_alone():
    def weights(seed, *layers):
        return LinearHeads(dict.fromkeys(layers, 8), 3, seed).state_dict()

    assert same_state(weights(0, "conv2x", "conv3x"), weights(0, "conv2x", "conv3x"))
    both = weights(0, "conv2x", "conv3x")
    assert not torch.equal(both["heads.conv2x.classifier.weight"], both["heads.conv3x.classifier.weight"])
    assert not same_state(weights(0, "conv2x"), weights(1, "conv2x"))


def test_layers_are_trained_as_if_each_were_alone(splits, evaluated, tmp_path):
    # Their losses add up, and no layer sees another's.
    alone_results = probe(linear_config(layers=("conv2x",)), evaluated, splits, tmp_path / "one")
    both = probe(linear_config(), evaluated, splits, tmp_path / "two")
    assert both.tables[0].rows["conv2x"] == alone_results.tables[0].rows["conv2x"]


def test_the_network_stays_in_evaluation_mode(splits, evaluated, tmp_path):
    config = linear_config()
    task = Task(*open_parts(*map(str, splits), None), "video", config, None, quiet)
    probes = LinearProbes(config, evaluated.model, 3, 4)
    batch = next(task.training_batches(0, 0, alone()))
    stage = probes.stages[0]
    probes.module.train()
    probes.logits(stage, stage.module, batch.inputs, 0)
    assert not evaluated.model.video_model.training
    found = probes._features(batch.inputs)["conv5x"]
    assert torch.equal(found, compute_features(evaluated.model, ("video.conv5x",), batch.inputs)["video.conv5x"])
    assert not found.requires_grad


@pytest.mark.parametrize("saves", [1, 3])
def test_an_interrupted_run_goes_on_bit_for_bit(splits, evaluated, tmp_path, monkeypatch, saves):
    config = linear_config(save_every_steps=1, modality="audio")
    calm = probe(config, evaluated, splits, tmp_path / "calm")
    with monkeypatch.context() as patch:
        stop_after(patch, saves)
        with pytest.raises(StoppedError):
            probe(config, evaluated, splits, tmp_path / "stopped")
    assert (tmp_path / "stopped" / PROGRESS_NAME).exists()
    assert probe(config, evaluated, splits, tmp_path / "stopped").tables == calm.tables


def test_random_weights_are_another_evaluation(splits, tmp_path):
    weights = small_evaluated(tmp_path).identity.path
    config = write_config(tmp_path / "config.yaml", linear_config(epochs=1))
    arguments = (config, weights, "--data", splits[0], "--test-data", splits[1], "--output", tmp_path / "output")
    done = invoke(linear, *arguments, "--random-weights", 3)
    assert done.exit_code == 0, done.output
    assert "conv5x" in done.output
    checkpoint = read_results(open_storage(tmp_path / "output")).checkpoint
    assert (checkpoint.kind, checkpoint.sha256) == ("random", None)
    for arguments_of_another in ((), ("--random-weights", 4), ("--random-weights", 3, "--cache-features")):
        refused = invoke(linear, *arguments, *arguments_of_another)
        assert refused.exit_code == 1
        assert "is of another evaluation" in refused.output


@pytest.mark.parametrize("cached", [False, True])
def test_several_labels_are_refused_where_they_are_met(splits, evaluated, tmp_path, cached):
    train, test = splits
    many = rewritten(train, tmp_path / "many", lambda i, sample: with_labels(sample, 0, 2) if i == 5 else sample)
    message = r"instance 5 has 2 labels" + ("" if cached else r" \(Blue, Red\)")
    with pytest.raises(ConfigError, match=message):
        probe(linear_config(), evaluated, (many, test), tmp_path / "train", cache_features=cached)
    brief = linear_config(epochs=1, data=SMALL["data"] | {"clips_per_instance": 1})
    with pytest.raises(ConfigError, match=message):
        probe(brief, evaluated, (train, many), tmp_path / "test", cache_features=cached)


@pytest.mark.parametrize("cached", [False, True])
def test_labels_that_are_missing(splits, evaluated, tmp_path, cached):
    train, test = splits
    none = rewritten(train, tmp_path / "none", lambda i, sample: with_labels(sample) if i == 5 else sample)
    with pytest.raises(ConfigError, match=r"instance 5 has (no label|0 labels)"):
        probe(linear_config(), evaluated, (none, test), tmp_path / "train", cache_features=cached)
    results = probe(linear_config(epochs=1), evaluated, (train, none), tmp_path / "test", cache_features=cached)
    assert "1 of them have no label" in results.tables[0].note


def test_samples_that_cannot_be_decoded_are_replaced_or_left_out(splits, evaluated, tmp_path):
    broken = [
        rewritten(root, tmp_path / root.name, lambda i, sample: without_picture(sample) if i == 2 else sample)
        for root in splits
    ]
    said = []
    config = linear_config(test=SMALL["test"] | {"clip_level_clips": 2, "video_level_clips": 3})
    parts = open_parts(*map(str, broken), None)
    results = run_linear(config, evaluated, *parts, storage(tmp_path / "output"), alone(), say=said.append)
    assert results.undecodable == 1
    assert "5 clips could not be decoded" in results.tables[0].note
    assert {line.split(": ")[1] for line in said if line.startswith("warning")} == {
        "replaced by another instance",
        "left out",
    }
    # The instance counts neither for nor against a classifier.
    task = Task(*parts, "video", config, None, quiet)

    def always_blue(inputs):
        return {"x": torch.tensor([[1.0, 0.0, 0.0]]).repeat(len(inputs["video"]), 1)}

    outcome = classify_clips(task, ("x",), always_blue, 2, alone())
    assert outcome.found.all(1).tolist() == [True, True, False, True, True, True, True]
    assert int(outcome.labels[2]) == -1
    assert outcome.video_accuracy("x").counted == 6
    assert int(outcome.confusion("x", 3).sum()) == 6


def test_statistics_of_sound_are_those_of_the_training(splits, evaluated, tmp_path):
    train, test = splits
    other = shutil.copytree(test, tmp_path / "other")
    content = json.loads((other / "manifest.json").read_text())
    content["spectrogram_statistics"]["mean"] = [0.0] * 257
    (other / "manifest.json").write_text(json.dumps(content))
    config = linear_config(modality="audio", epochs=1)
    ours = probe(config, evaluated, (train, test), tmp_path / "ours")
    theirs = probe(config, evaluated, (train, other), tmp_path / "theirs")
    assert theirs.tables == ours.tables


def test_data_without_sound_are_refused(folds, evaluated, tmp_path):
    with pytest.raises(ConfigError, match=r"needs audio: .* which is video, found also audio"):
        run_linear(
            linear_config(modality="audio"),
            evaluated,
            *open_parts(str(folds), None, 1),
            storage(tmp_path),
            alone(),
            say=quiet,
        )
