from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avid_pipeline.shards_spec.errors import ManifestError
from avid_pipeline.shards_spec.spectrogram import (
    clip_range,
    decode_spectrogram,
    encode_spectrogram,
    log_power_spectrogram,
    spectrogram_blocks,
)

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "log_spectrogram.npz") as arrays:
        return dict(arrays)


@pytest.mark.parametrize(("waveform", "expected"), [("waveform", "log_power_db"), ("waveform_10s", "log_power_db_10s")])
def test_golden_numbers(golden, waveform, expected):
    computed = log_power_spectrogram(golden[waveform])
    assert computed.dtype == np.float32
    assert np.abs(clip_range(computed) - golden[expected][0]).max() < 1e-3
    stored = decode_spectrogram(encode_spectrogram(computed))
    assert np.abs(clip_range(stored) - golden[expected][0]).max() < 0.32


def test_published_normalisation(golden):
    with np.load(GOLDEN / "spectrogram_norm_stats_24k_257bins.npz") as statistics:
        clipped = clip_range(log_power_spectrogram(golden["waveform"]))
        normalised = (clipped - statistics["mean"]) / (statistics["std"] + 1e-5)
    assert np.abs(normalised - golden["normalized"][0]).max() < 1e-4


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 6000), st.lists(st.integers(1, 2500), max_size=8))
def test_pieces_give_the_frames_of_the_whole(length, cuts):
    waveform = np.random.default_rng(length).standard_normal(length).astype(np.float32)
    pieces = np.split(waveform, sorted({min(cut, length) for cut in cuts}))
    joined = np.concatenate(list(spectrogram_blocks(pieces)))
    assert joined.shape == (length // 240, 257)
    assert np.array_equal(joined, log_power_spectrogram(waveform))


@given(st.lists(st.floats(-100, 60, width=32), min_size=1, max_size=300))
def test_uint8_error_bound(values):
    spectrogram = np.array(values, dtype=np.float32)
    assert np.abs(decode_spectrogram(encode_spectrogram(spectrogram)) - spectrogram).max() <= 160 / 255 / 2 + 1e-4


def test_errors_say_what_to_do():
    with pytest.raises(ManifestError, match=r"mono.*found shape \(2, 5\)"):
        log_power_spectrogram(np.zeros((2, 5), np.float32))
    with pytest.raises(ManifestError, match="22222"):
        log_power_spectrogram(np.zeros(5, np.float32), sample_rate=22222)
    with pytest.raises(ManifestError, match="found int16"):
        decode_spectrogram(np.zeros((2, 257), np.int16))
