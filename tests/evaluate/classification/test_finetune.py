"""What fine-tuning does: it learns, in two stages, with dropout; on real clips too."""

import pytest
import safetensors.torch
import torch

from avid_pipeline.errors import ConfigError
from avid_pipeline.evaluate.checkpoint import open_checkpoint
from avid_pipeline.evaluate.classification.data import Task
from avid_pipeline.evaluate.classification.finetune import NETWORK, Finetuning, run_finetune
from avid_pipeline.evaluate.classification.networks import dropout_mask
from avid_pipeline.evaluate.classification.progress import MODEL_NAME, PROGRESS_NAME
from avid_pipeline.evaluate.data import open_data, open_fold
from avid_pipeline.evaluate.results import REPORT_NAME, RESULTS_NAME, read_results
from avid_pipeline.models import AVModel
from avid_pipeline.preprocess.executors.local import LocalExecutor
from avid_pipeline.preprocess.job import run_job
from avid_pipeline.preprocess.sources.hmdb51 import list_hmdb51
from avid_pipeline.preprocess.sources.ucf101 import list_ucf101
from avid_pipeline.shards_spec.manifest import Parameters, VideoParameters
from avid_pipeline.shards_spec.storage import open_storage
from tests.evaluate.classification.labelled import (
    StoppedError,
    alone,
    fine_tune,
    finetune_config,
    quiet,
    same_state,
    stop_after,
    storage,
)
from tests.evaluate.saved_models import save_weights


def accuracy(results):
    return results.tables[0].rows[NETWORK]


def test_it_learns_and_says_so(undisturbed):
    output, results = undisturbed
    # Three classes: by chance a third.
    assert accuracy(results)["Video@1"] > 0.7
    assert accuracy(results)["Clip@5"] == 1.0
    assert read_results(open_storage(output)) == results
    assert [(data.role, data.subset, data.instances) for data in results.data] == [
        ("train", "fold1-train", 14),
        ("test", "fold1-test", 7),
    ]
    assert list(results.tables[1].rows) == ["1 (classifier)", "2 (network)", "3 (network)"]
    assert results.settings["epochs"] == 2
    assert sorted(path.name for path in output.iterdir()) == [MODEL_NAME, REPORT_NAME, RESULTS_NAME]
    page = (output / REPORT_NAME).read_text()
    assert "Confusion matrix" in page
    assert "Accuracy after each epoch" in page


def test_the_written_weights_are_those_of_the_network(undisturbed, evaluated):
    weights = safetensors.torch.load_file(undisturbed[0] / MODEL_NAME)
    assert weights["classifier.weight"].shape == (3, 512)
    network = {name.removeprefix("network."): tensor for name, tensor in weights.items() if "network." in name}
    before = evaluated.model.video_model.state_dict()
    assert network.keys() == before.keys()
    assert not torch.equal(network["conv1.0.weight"], before["conv1.0.weight"])


def make_learner(evaluated, folds, config=None):
    config = config or finetune_config()
    task = Task(*open_fold(str(folds), 1), "video", config, None, quiet)
    return config, task, Finetuning(config, evaluated.model.video_model, 3, task.plan(0).num_batches, alone())


def test_the_warm_up_moves_the_classifier_alone(folds, evaluated, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        # Behind the classifier's epoch, and before the network's.
        stop_after(patch, 1)
        with pytest.raises(StoppedError):
            fine_tune(finetune_config(), evaluated, folds, tmp_path)
    state = torch.load(tmp_path / PROGRESS_NAME, weights_only=True)["module"]
    before = evaluated.model.video_model.state_dict()
    network = {name.removeprefix("network."): tensor for name, tensor in state.items() if name.startswith("network.")}
    # Batch norm statistics and counts of batches are among them.
    assert same_state(network, before)
    _, _, learner = make_learner(evaluated, folds)
    assert not torch.equal(state["classifier.weight"], learner.module.state_dict()["classifier.weight"])


def test_learning_rates_of_the_two_stages(folds, evaluated):
    optimizer = {"learning_rate": 1e-2, "gamma": 0.3, "milestones": (1,)}
    _, task, learner = make_learner(evaluated, folds, finetune_config(optimizer=optimizer))
    assert task.plan(0).num_batches == 4
    classifier, network = learner.stages
    assert (classifier.name, network.name) == ("classifier", "network")
    assert [classifier.rate(step) for step in (0, 3, 4, 100)] == [1e-2] * 4
    assert [network.rate(step) for step in (0, 3)] == [1e-2] * 2
    assert network.rate(4) == pytest.approx(3e-3)


def test_dropout_scales_what_it_keeps_and_depends_on_seed_and_step_alone():
    mask = dropout_mask(0.5, 64, 512, seed=0, step=3)
    assert mask.dtype == torch.float32
    assert set(mask.unique().tolist()) == {0.0, 2.0}
    assert float(mask.mean()) == pytest.approx(1, abs=0.05)
    assert torch.equal(mask, dropout_mask(0.5, 64, 512, seed=0, step=3))
    assert not torch.equal(mask, dropout_mask(0.5, 64, 512, seed=0, step=4))
    assert not torch.equal(mask, dropout_mask(0.5, 64, 512, seed=1, step=3))
    assert torch.equal(dropout_mask(0.0, 2, 4, seed=0, step=0), torch.ones(2, 4))


def test_training_drops_features_and_tests_do_not(folds, evaluated):
    _, task, learner = make_learner(evaluated, folds)
    batch = next(task.training_batches(0, 0, alone()))
    stage = learner.stages[0]
    first, again, other = (learner.logits(stage, stage.module, batch.inputs, step)[NETWORK] for step in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(learner.classify(batch.inputs)[NETWORK], learner.classify(batch.inputs)[NETWORK])


def test_channels_last_and_bfloat16(folds, evaluated, tmp_path):
    config = finetune_config(
        epochs=1,
        compute={"precision": "bfloat16", "channels_last": True},
        optimizer={"learning_rate": 1e-3, "clip_gradients": 5.0},
    )
    assert 0 <= accuracy(fine_tune(config, evaluated, folds, tmp_path))["Video@1"] <= 1
    assert evaluated.model.video_model.conv1[0].weight.is_contiguous()


def test_a_lone_clip_that_shrinks_to_one_value_is_refused(folds, evaluated, tmp_path):
    with pytest.raises(ConfigError, match=r"data\.batch_size: 1 clip of 4 frames of 32 pixels is a single value"):
        fine_tune(finetune_config(data={"batch_size": 1}), evaluated, folds, tmp_path)


def test_a_loss_that_is_not_finite_ends_the_training(folds, evaluated, tmp_path):
    config = finetune_config(optimizer={"learning_rate": 1e30})
    with pytest.raises(ConfigError, match=r"lower optimizer\.learning_rate"):
        fine_tune(config, evaluated, folds, tmp_path)


@pytest.mark.parametrize(("name", "depth"), [("ucf101", 18), ("hmdb51", 10)])
def test_real_clips_stream_by_fold_and_fine_tune_a_step(real_clips, tmp_path, name, depth):
    lister = list_ucf101 if name == "ucf101" else list_hmdb51
    listing = lister(real_clips / name / "videos", real_clips / name / "splits")
    root = str(tmp_path / "shards")
    run_job(listing, Parameters(video=VideoParameters(short_side=96)), root, LocalExecutor(1))
    with pytest.raises(ConfigError, match="fold1-test has no instances"):
        open_fold(root, 1)
    # The one clip that is here is one to train on; it is tested on too.
    train, test = (open_data(root, subset="fold1-train", role=role) for role in ("train", "test"))
    model = AVModel(depth, (16, 8), torch.Generator().manual_seed(0))
    evaluated = open_checkpoint(str(save_weights(tmp_path / "weights.safetensors", model)))
    config = finetune_config(
        classifier_epochs=0,
        epochs=1,
        clip={"crop_size": 64},
        data={"batch_size": 1, "workers": 1},
        test={"clip_level_clips": 2, "video_level_clips": 1, "batch_size": 2},
    )
    results = run_finetune(config, evaluated, train, test, storage(tmp_path / "output"), alone(), say=quiet)
    assert results.tables[1].rows["1 (network)"]["loss"] >= 0
    assert [(data.dataset, data.instances) for data in results.data] == [(name, 1)] * 2
