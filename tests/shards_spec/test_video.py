import av
import numpy as np
import pytest

from avid_pipeline.shards_spec.errors import DecodeError
from avid_pipeline.shards_spec.video import decode_frames


@pytest.fixture(scope="module")
def grey_ramp(tmp_path_factory):
    """Frame i of 40 is grey level 6 i; key frames every 8."""
    path = tmp_path_factory.mktemp("video") / "ramp.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=16, options={"g": "8", "bf": "0", "crf": "10"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(40):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 6 * number, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path.read_bytes()


@pytest.mark.parametrize("first", [0, 1, 7, 8, 9, 20, 32])
def test_consecutive_frames(grey_ramp, first):
    frames = decode_frames(grey_ramp, first, 8, 16, "here")
    assert frames.shape == (8, 48, 64, 3)
    levels = frames.mean(axis=(1, 2, 3))
    assert np.abs(levels - 6 * np.arange(first, first + 8)).max() < 2.5


def test_the_end_is_shorter(grey_ramp):
    assert len(decode_frames(grey_ramp, 36, 8, 16, "here")) == 4


def test_another_frame_grid(grey_ramp):
    levels = decode_frames(grey_ramp, 2, 5, 8, "here").mean(axis=(1, 2, 3))
    assert np.abs(levels - 6 * np.arange(4, 14, 2)).max() < 2.5


def test_damaged_data_is_a_decode_error(grey_ramp):
    for data in (b"", b"no video at all", grey_ramp[:200]):
        with pytest.raises(DecodeError, match="sample-7"):
            decode_frames(data, 0, 8, 16, "sample-7")
