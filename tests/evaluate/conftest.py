"""A short run to evaluate, which several files share."""

from pathlib import Path

import pytest

from avid_pipeline.train.trainer import train
from tests.train.runs import settings


@pytest.fixture(scope="session")
def trained_run(small_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of R(2+1)D-10 on the small data set; one epoch of two steps."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    train(settings(epochs=1), str(small_dataset), str(folder))
    return folder
