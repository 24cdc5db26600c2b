"""The memory bank in one process; test_sharded.py divides it over ranks."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from avid_pipeline.errors import ConfigError
from avid_pipeline.train import memory_bank
from avid_pipeline.train.memory_bank import MODALITIES, MemoryBank, Modality

GOLDEN = Path(__file__).parents[1] / "golden" / "criteria.npz"


def unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_initial_rows_are_random_unit_vectors() -> None:
    video, audio = MemoryBank(5000, 16, seed=4).full()
    for memory in (video, audio):
        torch.testing.assert_close(memory.norm(dim=1), torch.ones(5000))
        # The mean of 5000 random unit vectors is about 1/sqrt(5000) long.
        assert memory.mean(dim=0).norm() < 3 / 5000**0.5
        assert np.unique(memory.numpy(), axis=0).shape[0] == 5000
    assert (video * audio).sum(dim=1).mean().abs() < 0.02


def test_initial_rows_depend_on_the_seed_alone() -> None:
    video, audio = MemoryBank(50, 8, seed=4).full()
    again_video, again_audio = MemoryBank(50, 8, seed=4).full()
    assert torch.equal(video, again_video)
    assert torch.equal(audio, again_audio)
    assert not torch.isclose(video, MemoryBank(50, 8, seed=5).full()[0]).any(dim=1).all()
    assert not torch.allclose(video, audio)


def test_initial_rows_of_any_range_are_a_part_of_the_whole() -> None:
    whole = MemoryBank(10_000, 4, seed=1).full()[0]
    for rows in (range(0, 10), range(4095, 4097), range(4096, 8192), range(100, 9999), range(10_000, 10_000)):
        part = memory_bank._initial_rows(rows, 4, 1, "video", torch.float32)
        assert torch.equal(part, whole[rows.start : rows.stop])


def test_load_takes_rows_as_they_are_and_full_is_a_copy() -> None:
    with np.load(GOLDEN) as golden:
        video, audio = golden["cma_video_memory"], golden["cma_audio_memory"]
    bank = MemoryBank(600, 32)
    bank.load(torch.from_numpy(video), torch.from_numpy(audio))
    loaded = bank.full()
    np.testing.assert_array_equal(loaded[0].numpy(), video)
    np.testing.assert_array_equal(loaded[1].numpy(), audio)
    loaded[0].zero_()
    np.testing.assert_array_equal(bank.full()[0].numpy(), video)


def test_local_rows_load_again() -> None:
    bank, other = MemoryBank(30, 8, seed=1), MemoryBank(30, 8, seed=2)
    other.load_local(*bank.local())
    assert torch.equal(other.full()[0], bank.full()[0])
    assert torch.equal(other.full()[1], bank.full()[1])
    assert bank.rows == range(30)


def test_loading_what_requires_gradients_keeps_rows_out_of_autograd() -> None:
    bank = MemoryBank(10, 4)
    bank.load(*torch.ones(2, 10, 4, requires_grad=True))
    assert not any(rows.requires_grad for rows in bank.local())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_update_is_a_normalised_moving_average(dtype: torch.dtype) -> None:
    bank = MemoryBank(20, 8, momentum=0.7, dtype=dtype)
    before = [memory.clone() for memory in bank.full()]
    index, embeddings = torch.tensor([3, 19, 0]), unit(3, 2, 8)
    bank.update(index, embeddings)
    assert bank.dtype == dtype
    untouched = [i for i in range(20) if i not in index.tolist()]
    for place, (memory, old) in enumerate(zip(bank.full(), before, strict=True)):
        expected = F.normalize(0.7 * old[index] + 0.3 * embeddings[:, place], dim=1)
        # Arithmetic is float32 whatever is stored: one rounding to it at the end.
        rounding = torch.finfo(dtype).eps / 2
        torch.testing.assert_close(memory[index], expected, rtol=rounding + 1e-6, atol=1e-6)
        assert torch.equal(memory[untouched], old[untouched])


@given(index=st.lists(st.integers(0, 5), min_size=1, max_size=20))
def test_last_occurrence_of_an_instance_updates_its_row(index: list[int]) -> None:
    bank, expected = MemoryBank(6, 4), MemoryBank(6, 4)
    embeddings = unit(len(index), 2, 4)
    last = sorted({instance: place for place, instance in enumerate(index)}.values())
    bank.update(torch.tensor(index), embeddings)
    expected.update(torch.tensor(index)[last], embeddings[last])
    assert torch.equal(bank.full()[0], expected.full()[0])
    assert torch.equal(bank.full()[1], expected.full()[1])


def test_drift_is_the_mean_turn_of_updated_rows() -> None:
    bank = MemoryBank(20, 8, momentum=0.6)
    assert all(math.isnan(drift) for drift in bank.take_drift().values())
    turns: dict[Modality, list[Tensor]] = {"video": [], "audio": []}
    for step, index in enumerate(([3, 19, 0], [5, 3, 5])):  # Row 5 is updated once, by its last occurrence.
        before = bank.full()
        bank.update(torch.tensor(index), unit(3, 2, 8, seed=step))
        rows = sorted(set(index))
        for modality, old, new in zip(MODALITIES, before, bank.full(), strict=True):
            turns[modality].append(1 - (old[rows] * new[rows]).sum(dim=1))
    expected = {modality: torch.cat(values).mean().item() for modality, values in turns.items()}
    assert len(torch.cat(turns["video"])) == 5
    assert bank.take_drift() == pytest.approx(expected, rel=1e-4)
    assert 0.01 < expected["video"] != expected["audio"]
    assert all(math.isnan(drift) for drift in bank.take_drift().values())
    memories = torch.stack(bank.full(), dim=1)
    bank.update(torch.arange(20), memories)
    assert bank.take_drift() == pytest.approx({"video": 0, "audio": 0}, abs=1e-6)
    bank.update(torch.arange(20), -memories[:, :, [1, 0, 3, 2, 5, 4, 7, 6]])
    assert bank.take_drift()["video"] > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block_bytes", [1, 400, 1 << 22])
def test_blocks_hold_the_candidates_rows(dtype: torch.dtype, block_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_bank, "_BLOCK_BYTES", {"cpu": block_bytes})
    bank = MemoryBank(40, 8, dtype=dtype)
    candidates = torch.randint(0, 40, (7, 5), generator=torch.Generator().manual_seed(0))
    read = torch.zeros(7, 5, 8)
    for queries, block, columns in bank.blocks("audio", bank.find_owned(candidates)):
        assert columns is None
        assert block.dtype == torch.float32
        read[queries] = block
    assert torch.equal(read, bank.full()[1][candidates])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_instances": 1}, "num_instances >= 2"),
        ({"dim": 0}, "dim >= 1"),
        ({"momentum": 1.5}, r"momentum must lie in \[0, 1\], not 1.5"),
        ({"seed": -1}, "seed must not be negative"),
        ({"dtype": torch.float64}, "dtype must be float32, bfloat16 or float16, not torch.float64"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MemoryBank(**({"num_instances": 10, "dim": 4} | arguments))  # type: ignore[arg-type]


def test_loading_a_memory_of_another_dataset() -> None:
    bank = MemoryBank(10, 4)
    before = bank.full()[0]
    with pytest.raises(ConfigError, match=r"audio memory to load has shape \[11, 4\].*holds \[10, 4\]"):
        bank.load(torch.zeros(10, 4), torch.zeros(11, 4))
    assert torch.equal(bank.full()[0], before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_moving_to_a_gpu_keeps_rows() -> None:
    bank = MemoryBank(10, 4)
    before = bank.full()[0]
    assert bank.to("cuda").device.type == "cuda"
    assert torch.equal(bank.full()[0].cpu(), before)
