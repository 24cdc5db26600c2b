"""Labelled data and a model that several files share."""

from pathlib import Path

import pytest

from avid_pipeline.evaluate.checkpoint import EvaluatedModel
from avid_pipeline.evaluate.results import Results
from tests.evaluate.classification.labelled import (
    fine_tune,
    finetune_config,
    make_folds,
    make_splits,
    small_evaluated,
)


@pytest.fixture(scope="session")
def folds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Root of a data set of three colours with two folds, without sound: 14 to train on and 7 to test."""
    return make_folds(tmp_path_factory.mktemp("folds"))


@pytest.fixture(scope="session")
def splits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Roots of training and test data with picture and sound: 12 and 7 instances."""
    return make_splits(tmp_path_factory.mktemp("splits"))


@pytest.fixture(scope="session")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> EvaluatedModel:
    """The smallest model, with random weights."""
    return small_evaluated(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="session")
def undisturbed(
    folds: Path, evaluated: EvaluatedModel, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Results]:
    """Output and results of a fine-tuning on the first fold."""
    output = tmp_path_factory.mktemp("undisturbed")
    return output, fine_tune(finetune_config(save_every_steps=3), evaluated, folds, output)
