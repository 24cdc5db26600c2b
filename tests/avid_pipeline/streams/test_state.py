import json

import pytest

from avid_pipeline.errors import CheckpointError
from avid_pipeline.streams.state import ORDER_VERSION, StreamState

STATE = StreamState(manifest_fingerprint="sha256:ab", seed=3, epoch=2, step=25)


def test_there_and_back():
    content = STATE.to_dict()
    assert sorted(content) == ["epoch", "manifest_fingerprint", "seed", "step", "version"]
    assert StreamState.from_dict(json.loads(json.dumps(content))) == STATE


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": -1}, "step: expected at least 0, found -1"),
        ({"epoch": "2"}, "epoch: expected .*int.*, found '2'"),
        ({"seed": True}, "seed: expected"),
        ({"manifest_fingerprint": 1}, "manifest_fingerprint: expected"),
        ({"worker": 1}, "found epoch, manifest_fingerprint, seed, step, version, worker"),
    ],
)
def test_damaged(changes, message):
    with pytest.raises(CheckpointError, match=message):
        StreamState.from_dict(STATE.to_dict() | changes)


@pytest.mark.parametrize("content", [None, [], {}, {"seed": 1}])
def test_incomplete(content):
    with pytest.raises(CheckpointError, match="expected the fields"):
        StreamState.from_dict(content)


def test_only_the_run_it_belongs_to_goes_on():
    STATE.check("sha256:ab", 3)
    with pytest.raises(CheckpointError, match="began with data sha256:ab, the data given are sha256:cd"):
        STATE.check("sha256:cd", 3)
    with pytest.raises(CheckpointError, match="seed: the run began with 3, found 4"):
        STATE.check("sha256:ab", 4)
    other = StreamState("sha256:ab", 3, 2, 25, version=ORDER_VERSION + 1)
    with pytest.raises(CheckpointError, match=f"began with order {ORDER_VERSION + 1}"):
        other.check("sha256:ab", 3)


def test_step_of_epoch():
    assert STATE.step_of_epoch(10) == 5
    assert STATE.step_of_epoch(12) == 1
    for batches in (8, 13):
        with pytest.raises(CheckpointError, match="step 25 is not within epoch 2"):
            STATE.step_of_epoch(batches)
