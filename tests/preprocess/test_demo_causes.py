"""The two halves of a demo video follow the same causes, and the folder is guarded."""

import colorsys
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from avid_pipeline.preprocess.demo.causes import (
    CLASS_NAMES,
    MOTIONS,
    SHAPES,
    HiddenCauses,
    keyed_generator,
    sample_causes,
)
from avid_pipeline.preprocess.demo.picture import FRAMES_PER_SECOND, render_frames
from avid_pipeline.preprocess.demo.sound import SAMPLES_PER_SECOND, synthesize
from avid_pipeline.preprocess.demo.write import demo_names, write_demo
from avid_pipeline.preprocess.errors import PreprocessError

MIDDLE = HiddenCauses("circle", "bouncing", 0.5, 0.5, 0.5, 0.5, 0.5, 0.25)
STEPS = (0.1, 0.4, 0.7, 1.0)


def picture(causes, seconds=0.5):
    return render_frames(causes, seconds, keyed_generator(0, 0, "picture")).astype(float)


def sound(causes, seconds=2.0):
    return synthesize(causes, seconds, keyed_generator(0, 0, "sound")).astype(float)


def spectrum(waveform):
    frequencies = np.fft.rfftfreq(len(waveform), 1 / SAMPLES_PER_SECOND)
    return frequencies, np.abs(np.fft.rfft(waveform * np.hanning(len(waveform)))) ** 2


def shape_mask(frames_THWC):
    """Pixels brighter than the background ever is: the shapes."""
    return frames_THWC.max(axis=-1) > 150


def rises(values):
    return all(before < after for before, after in pairwise(values))


def hue(color_C):
    return colorsys.rgb_to_hsv(*(color_C / 255))[0]


def test_colour_is_the_hue_of_the_shapes_and_the_pitch():
    hues, pitches = [], []
    for colour in STEPS:
        causes = replace(MIDDLE, colour=colour)
        frames = picture(causes)
        hues.append(hue(frames[shape_mask(frames)].mean(axis=0)))
        frequencies, power = spectrum(sound(causes))
        pitches.append(frequencies[power.argmax()])
    assert rises(hues)
    assert rises(pitches)
    assert pitches[-1] == pytest.approx(1600, rel=0.01)


def test_backdrop_is_the_hue_behind_and_the_frequency_of_the_hiss():
    hues, centres = [], []
    for backdrop in STEPS:
        causes = replace(MIDDLE, backdrop=backdrop, colour=0.0)
        frames = picture(causes)
        hues.append(hue(frames[~shape_mask(frames)].mean(axis=0)))
        frequencies, power = spectrum(sound(causes))
        hiss = frequencies > 700  # above the tone, whose pitch is the lowest here
        centres.append(np.average(frequencies[hiss], weights=power[hiss]))
    assert rises(hues)
    assert rises(centres)


@pytest.mark.parametrize("shape", SHAPES)
def test_size_is_area_and_loudness(shape):
    variants = [replace(MIDDLE, shape=shape, size=size) for size in STEPS]
    assert rises([shape_mask(picture(causes)).mean() for causes in variants])
    assert rises([sound(causes).std() for causes in variants])


@pytest.mark.parametrize("motion", MOTIONS)
def test_movement_and_tone_repeat_with_the_beat(motion):
    causes = replace(MIDDLE, motion=motion, colour=0.0, size=1.0)
    period = 1 / np.diff(causes.cycles(np.array([0.0, 1.0])))[0]
    envelope = np.convolve(np.abs(sound(causes)), np.ones(2205) / 2205, "valid")
    half = round(period / 2 * SAMPLES_PER_SECOND)
    envelope = envelope - envelope.mean()

    def likeness(lag):
        return np.corrcoef(envelope[:-lag], envelope[lag:])[0, 1]

    # A swing is heard twice a cycle (it passes the middle twice) and the others once.
    assert likeness(2 * half) > 0.6
    assert motion == "swinging" or likeness(half) < 0

    frames = shape_mask(picture(causes, 1.0)).astype(float)
    lag = round(period * FRAMES_PER_SECOND)
    apart = [np.abs(frames[step:] - frames[:-step]).mean() for step in (lag, lag // 2)]
    assert apart[0] < 0.7 * apart[1]


def test_shapes_sound_mellow_hollow_and_bright():
    louder = {}
    for shape in SHAPES:
        frequencies, power = spectrum(sound(replace(MIDDLE, shape=shape, motion="pulsing", colour=0.2)))
        pitch = 160 * 10**0.2
        harmonics = [power[abs(frequencies - n * pitch) < 20].sum() for n in (1, 2, 3)]
        louder[shape] = [harmonic / harmonics[0] > 0.1 for harmonic in harmonics[1:]]
    assert louder == {"circle": [False, False], "square": [False, True], "star": [True, True]}


def test_a_landing_strikes_a_pulse_swells_and_a_swing_holds():
    attack = {}
    for motion in MOTIONS:
        waveform = np.abs(sound(replace(MIDDLE, motion=motion, size=1.0)))
        loudness = waveform[: len(waveform) // 882 * 882].reshape(-1, 882).mean(axis=1)
        attack[motion] = np.diff(loudness).max() / loudness.max()
    assert attack["bouncing"] > 2 * attack["pulsing"] > 2 * attack["swinging"]


def test_shapes_and_motions_look_different():
    variants = [replace(MIDDLE, shape=shape, motion=motion) for motion in MOTIONS for shape in SHAPES]
    frames = [picture(causes) for causes in variants]
    for first in range(len(variants)):
        for second in range(first):
            assert np.abs(frames[first] - frames[second]).mean() > 0.5


@given(seed=st.integers(0, 2**64), instance=st.integers(0, 10**9))
def test_causes_depend_on_seed_and_instance_only(seed, instance):
    causes = sample_causes(seed, instance)
    assert causes == sample_causes(seed, instance)
    assert causes != sample_causes(seed + 1, instance)
    assert causes.class_name == CLASS_NAMES[instance % len(CLASS_NAMES)]
    for value in (causes.colour, causes.backdrop, causes.tempo, causes.size, causes.grain, causes.phase):
        assert 0 <= value < 1


@given(instances=st.integers(2, 60), val_fraction=st.floats(0.01, 0.9), seed=st.integers(0, 1000))
def test_names_are_unique_without_dots_and_split_as_asked(instances, val_fraction, seed):
    held_out = max(1, round(instances * val_fraction))
    if held_out >= instances:
        with pytest.raises(PreprocessError, match="without a video"):
            demo_names(instances, seed, val_fraction)
        return
    names = demo_names(instances, seed, val_fraction)
    stems = [name.rsplit("/", 1)[1].removesuffix(".mp4") for name in names]
    assert len(set(stems)) == instances
    assert not any("." in stem for stem in stems)
    assert sum(name.startswith("val/") for name in names) == held_out


@pytest.mark.parametrize(("instances", "seed", "val_fraction"), [(1, 0, 0.3), (9, -1, 0.3), (9, 0, 0.0), (9, 0, 1.0)])
def test_numbers_out_of_range_are_refused_before_anything_is_made(tmp_path, instances, seed, val_fraction):
    with pytest.raises(PreprocessError, match="demo: "):
        write_demo(tmp_path / "demo", instances, seed, workers=1, val_fraction=val_fraction)
    assert not (tmp_path / "demo").exists()


def test_a_folder_with_other_things_or_a_damaged_marker_is_refused(tmp_path):
    mine = tmp_path / "holiday.txt"
    mine.write_text("keep me")
    with pytest.raises(PreprocessError, match=r"no demo\.json.*another folder"):
        write_demo(tmp_path, 2, workers=1)
    assert list(tmp_path.iterdir()) == [mine]
    (tmp_path / "demo.json").write_text("{")
    with pytest.raises(PreprocessError, match="not JSON"):
        write_demo(tmp_path, 2, workers=1)
