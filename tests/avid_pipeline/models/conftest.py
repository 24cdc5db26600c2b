"""Golden numbers of the model, and the weights and inputs they were computed with."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from avid_pipeline.models import AVModel

GOLDEN = Path(__file__).parents[2] / "golden"


@pytest.fixture(scope="session")
def assert_golden() -> Callable[[Tensor, np.ndarray], None]:
    """Equal to 1e-4 of the tensor's largest value: processors add in different orders, and small values that are
    differences of large ones cannot agree better than that."""

    def check(found: Tensor, expected: np.ndarray) -> None:
        assert tuple(found.shape) == expected.shape
        assert np.abs(found.detach().numpy() - expected).max() < 1e-4 * np.abs(expected).max()

    return check


@pytest.fixture(scope="session")
def published_shapes() -> dict[str, list[int]]:
    shapes: dict[str, list[int]] = json.loads((GOLDEN / "checkpoint_tensors.json").read_text())["r2plus1d_18"]
    return shapes


@pytest.fixture(scope="session")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "av_model_r2plus1d18.npz") as numbers:
        return dict(numbers)


@pytest.fixture(scope="session")
def golden_state(published_shapes: dict[str, list[int]], golden: dict[str, np.ndarray]) -> dict[str, Tensor]:
    seed = int(golden["seed"])
    return {
        name: _golden_tensor(name, published_shapes[name], np.random.RandomState((seed * 100003 + i) % 2**32))
        for i, name in enumerate(sorted(published_shapes))
    }


def _golden_tensor(name: str, shape: list[int], random: np.random.RandomState) -> Tensor:
    if name.endswith("num_batches_tracked"):
        return torch.tensor(0)
    if name.endswith("running_var"):
        values = 0.5 + random.rand(*shape)
    elif len(shape) == 1:
        values = ("weight" in name) + 0.1 * random.randn(*shape)
    else:
        values = random.randn(*shape) * np.sqrt(2 / np.prod(shape[1:]))
    return torch.tensor(values, dtype=torch.float32)


@pytest.fixture(scope="session")
def golden_inputs(golden: dict[str, np.ndarray]) -> tuple[Tensor, Tensor]:
    random = np.random.RandomState(int(golden["seed"]) + 7)
    video = torch.tensor(random.randn(2, 3, 8, 112, 112), dtype=torch.float32)
    return video, torch.tensor(random.randn(2, 1, 200, 257), dtype=torch.float32)


@pytest.fixture
def golden_model(golden_state: dict[str, Tensor]) -> AVModel:
    model = AVModel()
    model.load_state_dict(golden_state)
    return model.eval()
