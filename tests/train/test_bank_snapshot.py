"""Checkpoints of several ranks: real processes on gloo; see checkpoint_worker.py."""

from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from avid_pipeline.errors import CheckpointError
from avid_pipeline.shards_spec.storage import open_storage
from avid_pipeline.train.bank_snapshot import BankLayout, has_positives, read_rows, snapshot_shape, write_rows
from tests.ranks import run_ranks

WORKER = Path(__file__).with_name("checkpoint_worker.py")
RANKS = 4


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "runs").mkdir()
    results = run_ranks(WORKER, RANKS, folder, str(folder / "runs"), weights_only=False)
    return results | {"folder": folder / "runs"}


def test_every_world_size_loads_what_every_other_saved(results):
    # Two sizes of bank, four world sizes that saved, and this rank is in 4, 3, 2 or 1 of those that load.
    assert results["loaded"] == [2 * 4 * in_groups for in_groups in (4, 3, 2, 1)]


def test_every_rank_wrote_chunks_of_its_own(results):
    bank = results["folder"] / "damaged" / "checkpoints" / "step-00000001" / "memory_bank.zarr"
    group = zarr.open_group(bank, mode="r")
    assert {name: (array.shape, array.chunks[0], str(array.dtype)) for name, array in group.arrays()} == {
        "video": ((61, 4), 16, "float32"),
        "audio": ((61, 4), 16, "float32"),
        "positives": ((61, 3), 16, "int64"),
    }
    assert results["owned"] == [16, 16, 16, 13]
    assert sorted(path.parent.name for path in bank.glob("video/c/*/0")) == ["0", "1", "2", "3"]


def test_a_write_that_fails_on_one_rank_is_an_error_on_all(results):
    errors = [error for error, _ in results["failing"]]
    assert len(set(errors)) == 1
    kind, message = errors[0]
    assert kind == "StorageError"
    assert message.startswith("rank 2: ")
    assert "memory_bank.zarr/audio/c/2/0: cannot write: No space left" in message
    assert [resumed for _, resumed in results["failing"]] == [("checkpoints/step-00000001", [])] * RANKS


def test_damage_that_one_rank_sees_makes_all_fall_back(results):
    first = [resumed for resumed, _ in results["damaged"]]
    assert [name for name, _ in first] == ["checkpoints/step-00000001"] * RANKS
    assert [len(warnings) for _, warnings in first] == [1, 0, 0, 0]
    (warning,) = first[0][1]
    assert warning.startswith("rank 3: ")
    assert "step-00000002/memory_bank.zarr/video/c/3/0: is damaged" in warning
    assert warning.endswith("falling back to checkpoints/step-00000001")
    # It is set aside: the next resumption has nothing to fall back from.
    assert [resumed for _, resumed in results["damaged"]] == [("checkpoints/step-00000001", [])] * RANKS


def test_other_errors_end_on_every_rank(results):
    assert results["refused"] == [("ConfigError", "rank 1: epochs was 1 and is now 2")] * RANKS
    told = ("AvidPipelineError", "rank 1: ZeroDivisionError: division by zero")
    assert results["bug"] == [told, ("ZeroDivisionError", "division by zero"), told, told]
    assert {kind for kind, _ in results["unequal"]} == {"ConfigError"}
    assert "step of the checkpoint must be the same on all ranks but is [5, 5, 5, 6]" in results["unequal"][0][1]
    assert {kind for kind, _ in results["other run"]} == {"CheckpointError"}
    assert "another run" in results["other run"][3][1]
    assert "seed: the run began with 0, found 4" in results["other run"][3][1]


def test_without_checkpoints_there_is_nothing_to_resume(results):
    assert results["empty"] == [(None, [])] * RANKS


@pytest.fixture
def snapshot(tmp_path):
    """A snapshot of ten rows in chunks of four, and its rows."""
    layout, root = BankLayout(10, 3, 4), open_storage(tmp_path)
    rows = torch.randn(2, 10, 3, generator=torch.Generator().manual_seed(0))
    layout.write_metadata(root, "bank")
    for name, of_modality in zip(("video", "audio"), rows, strict=True):
        write_rows(root, "bank", layout, name, 0, of_modality)
    return root, rows


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(first=st.integers(0, 10), length=st.integers(0, 10))
def test_any_range_of_rows(snapshot, first, length):
    root, rows = snapshot
    part = range(first, min(first + length, 10))
    assert np.array_equal(read_rows(root, "bank", "audio", part, 10, 3), rows[1].numpy()[part.start : part.stop])


def test_what_a_snapshot_says(snapshot):
    root, rows = snapshot
    assert snapshot_shape(root, "bank") == (10, 3)
    assert not has_positives(root, "bank")
    opened = zarr.open_group(root.local_root / "bank", mode="r")
    assert np.array_equal(np.asarray(opened["video"]), rows[0].numpy())


def damaged(snapshot, file, damage):
    root, _ = snapshot
    path = root.local_root / "bank" / file
    data = damage(path.read_bytes())
    path.unlink() if data is None else path.write_bytes(data)
    return root


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: None, r"bank/video/c/1/0: is missing"),
        (lambda data: data[:20], r"bank/video/c/1/0: holds 20 bytes instead of 52, for it was cut"),
        (lambda data: b"", r"bank/video/c/1/0: holds 0 bytes instead of 52"),
        (lambda data: data[:9] + bytes([data[9] ^ 2]) + data[10:], r"bank/video/c/1/0: is damaged"),
        (lambda data: data + b"\0", r"bank/video/c/1/0: is damaged"),
    ],
)
def test_a_damaged_chunk_is_named(snapshot, damage, message):
    root = damaged(snapshot, "video/c/1/0", damage)
    with pytest.raises(CheckpointError, match=message):
        read_rows(root, "bank", "video", range(3, 5), 10, 3)
    # Rows of other chunks are as good as ever.
    read_rows(root, "bank", "video", range(8, 10), 10, 3)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.parametrize("file", ["zarr.json", "video/zarr.json"])
def test_damaged_metadata_never_gives_other_rows(snapshot, file, data):
    root, rows = snapshot
    path = root.local_root / "bank" / file
    original = path.read_bytes()
    content = bytearray(original)
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    try:
        found = read_rows(root, "bank", "video", range(0, 10), 10, 3)
    except CheckpointError as error:
        found, message = None, str(error)
    finally:
        path.write_bytes(original)
    # Some changes change nothing, such as one of a space.
    assert np.array_equal(found, rows[0].numpy()) if found is not None else str(root.local_root / "bank") in message
