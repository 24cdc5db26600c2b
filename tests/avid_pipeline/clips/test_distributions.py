"""What is drawn, against the documented formulas of torchvision's transforms, and what it is keyed by."""

import sys
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from avid_pipeline.clips.augmentation import IMAGENET_STD, clip_generator, draw_augmentation
from avid_pipeline.clips.settings import AugmentationSettings
from tests.processes import run

# Kolmogorov and Smirnov: one in a million pairs of samples of one distribution is further apart (times sqrt(1/n)).
FAR_APART = 2.7
MANY = 20_000
# NTSC's luminance and chrominance axes as DALI documents its hue and saturation.
YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]])


def assert_same_distribution(found, expected, what):
    """The two samples' distribution functions are nowhere further apart than chance allows."""
    grid = np.sort(np.concatenate([found, expected]))
    shares = [np.searchsorted(np.sort(values), grid, side="right") / len(values) for values in (found, expected)]
    distance = np.abs(shares[0] - shares[1]).max()
    assert distance < FAR_APART * np.sqrt(1 / len(found) + 1 / len(expected)), f"{what}: {distance:.4f}"


def assert_uniform(found, low, high, what):
    places = (np.sort(found) - low) / (high - low)
    assert places[0] >= 0, what
    assert places[-1] <= 1, what
    steps = np.arange(len(places) + 1) / len(places)
    distance = max(np.abs(places - steps[:-1]).max(), np.abs(places - steps[1:]).max())
    assert distance < FAR_APART / np.sqrt(len(found)), f"{what}: {distance:.4f}"


def assert_unrelated(first, second, what):
    """No correlation of values or of their distances from the middle: one in a million beyond."""
    for change in (lambda x: x, lambda x: np.abs(x - np.median(x))):
        correlation = np.corrcoef(change(first), change(second))[0, 1]
        assert abs(correlation) < 4.9 / np.sqrt(len(first)), f"{what}: {correlation:.4f}"


def draw(settings, size, count, seed=0):
    return [draw_augmentation(settings, *size, clip_generator(seed, 0, number, 0)) for number in range(count)]


def boxes_of(drawn):
    """[count, (top, left, height, width)]."""
    return np.array([[each.crop.top, each.crop.left, each.crop.height, each.crop.width] for each in drawn])


def random_resized_crops(size, count, area=(0.08, 1.0), ratio=(3 / 4, 4 / 3), seed=7, uniform_ratio=False):
    """RandomResizedCrop as torchvision documents it, with another generator.

    Returns:
        Boxes [count, (top, left, height, width)], and whether none of ten attempts fitted, bool [count].
    """
    (height, width), generator = size, np.random.default_rng(seed)
    targets = height * width * generator.uniform(*area, (count, 10))
    aspects = np.exp(generator.uniform(*np.log(ratio), (count, 10)))
    if uniform_ratio:
        aspects = generator.uniform(*ratio, (count, 10))
    widths, heights = np.rint(np.sqrt(targets * aspects)), np.rint(np.sqrt(targets / aspects))
    fit = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    rows, first = np.arange(count), fit.argmax(axis=1)
    w, h = widths[rows, first], heights[rows, first]
    top = generator.integers(0, height - np.minimum(h, height), endpoint=True)
    left = generator.integers(0, width - np.minimum(w, width), endpoint=True)
    failed = ~fit.any(axis=1)
    if width / height < ratio[0]:
        whole = (round(width / ratio[0]), width)
    elif width / height > ratio[1]:
        whole = (height, round(height * ratio[1]))
    else:
        whole = (height, width)
    centre = ((height - whole[0]) // 2, (width - whole[1]) // 2, *whole)
    boxes = np.stack([top, left, h, w], axis=1)
    boxes[failed] = centre
    return boxes, failed


PROJECTIONS = {
    "top": (1, 0, 0, 0),
    "left": (0, 1, 0, 0),
    "height": (0, 0, 1, 0),
    "width": (0, 0, 0, 1),
    "bottom": (1, 0, 1, 0),
    "right": (0, 1, 0, 1),
    "difference of sides": (0, 0, 1, -1),
    "diagonal": (1, 1, 0.5, 0.5),
}


@pytest.mark.parametrize("area", [(0.08, 1.0), (0.2, 1.0)], ids=str)
@pytest.mark.parametrize("size", [(256, 340), (340, 256), (97, 61), (51, 66), (64, 300)], ids=str)
def test_multi_scale_crops_are_random_resized_crops(size, area):
    expected, _ = random_resized_crops(size, MANY, area)
    found = boxes_of(draw(AugmentationSettings(area=area), size, MANY))
    for name, direction in PROJECTIONS.items():
        assert_same_distribution(found @ np.array(direction), expected @ np.array(direction), name)
    for name, function in {
        "area": lambda box: box[:, 2] * box[:, 3],
        "ratio": lambda box: box[:, 3] / box[:, 2],
        "place across": lambda box: (box[:, 1] + 0.5) / (size[1] - box[:, 3] + 1),
        "place down": lambda box: (box[:, 0] + 0.5) / (size[0] - box[:, 2] + 1),
    }.items():
        assert_same_distribution(function(found), function(expected), name)


def test_the_comparison_sees_a_ratio_that_is_not_log_uniform():
    right, wrong = (random_resized_crops((256, 340), MANY, uniform_ratio=wrong)[0] for wrong in (False, True))
    with pytest.raises(AssertionError, match="ratio"):
        assert_same_distribution(right[:, 3] / right[:, 2], wrong[:, 3] / wrong[:, 2], "ratio")


def test_another_range_of_ratios():
    size, area, ratio = (120, 160), (0.1, 0.4), (0.5, 3.0)
    expected, _ = random_resized_crops(size, MANY, area, ratio)
    found = boxes_of(draw(AugmentationSettings(area=area, ratio=ratio), size, MANY))
    assert_same_distribution(found[:, 3] / found[:, 2], expected[:, 3] / expected[:, 2], "ratio")
    assert_same_distribution(found[:, 3] * found[:, 2], expected[:, 3] * expected[:, 2], "area")


@pytest.mark.parametrize("size", [(50, 1000), (1000, 50), (100, 110), (48, 62), (51, 69), (333, 250)], ids=str)
@pytest.mark.parametrize("area", [(0.9, 1.0), (0.2, 1.0)], ids=str)
def test_after_ten_attempts_it_is_the_documented_fallback(size, area):
    count = 3000
    expected, failed = random_resized_crops(size, count, area)
    found = boxes_of(draw(AugmentationSettings(area=area), size, count))
    if not failed.any():
        assert area == (0.2, 1.0)
        return
    fallback = expected[failed][0]
    shares = [(boxes == fallback).all(axis=1).mean() for boxes in (found, expected)]
    # As often as chance allows; a box that was drawn can be the same one.
    assert shares[1] >= failed.mean()
    assert abs(shares[0] - shares[1]) < 4.9 * np.sqrt(0.5 / count)
    assert shares[0] > 0


@pytest.mark.parametrize("size", [(256, 340), (340, 256), (256, 256), (255, 341)], ids=str)
def test_resized_crops_are_squares_at_any_place(size):
    """Resize to 256, then RandomCrop(224): whole pixels from 0 to 256 - 224, all equally likely."""
    count = 6000
    top, left, height, width = boxes_of(draw(AugmentationSettings(crop="resize"), size, count)).T
    side = min(size) * 224 / 256
    assert (height == side).all()
    assert (width == side).all()
    generator = np.random.default_rng(3)
    for name, found, room in (("top", top, size[0] - side), ("left", left, size[1] - side)):
        assert (found.min(), found.max()) == (0, int(room)), name
        expected = generator.integers(0, int(room), size=count, endpoint=True)
        assert_same_distribution(found, expected, name)
    assert_unrelated(top, left, "top and left")


@pytest.mark.parametrize("crop", ["multi_scale", "resize"])
@pytest.mark.parametrize("flip", [0.0, 0.3, 0.5, 1.0])
def test_flips_have_their_probability_whatever_the_crop(flip, crop):
    drawn = draw(AugmentationSettings(flip=flip, crop=crop), (256, 340), 5000)
    flipped = np.array([each.crop.flip for each in drawn])
    assert abs(flipped.mean() - flip) <= 4.9 * np.sqrt(flip * (1 - flip) / 5000)
    if 0 < flip < 1:
        boxes = boxes_of(drawn)
        assert_same_distribution(boxes[flipped, 1], boxes[~flipped, 1], "left of flipped and others")


def factors_of(drawn):
    """Brightness, contrast, saturation and hue, worked out from the matrices: float [count, 4]."""
    matrices = np.array([each.colour for each in drawn], dtype=float)
    std, mean = 255 * np.array(IMAGENET_STD), 255 * np.array([0.485, 0.456, 0.406])
    linear = YIQ @ (matrices[:, :, :3] * std[:, None]) @ np.linalg.inv(YIQ)
    gain = linear[:, 0, 0]
    offset = (matrices[:, :, 3] * std + mean).mean(axis=1)
    brightness = gain + offset / 128
    cosine, sine = linear[:, 1, 1] / gain, linear[:, 1, 2] / gain
    return np.stack([brightness, gain / brightness, np.hypot(cosine, sine), np.arctan2(sine, cosine) / (2 * np.pi)], 1)


def test_colour_factors_have_the_ranges_of_colour_jitter():
    settings = AugmentationSettings(brightness=0.4, contrast=0.3, saturation=0.2, hue=0.1)
    drawn = draw(settings, (64, 64), 8000)
    factors = factors_of(drawn)
    slack = 1e-5
    for column, (name, low, high) in enumerate(
        [("brightness", 0.6, 1.4), ("contrast", 0.7, 1.3), ("saturation", 0.8, 1.2), ("hue", -0.1, 0.1)]
    ):
        assert_uniform(factors[:, column], low - slack, high + slack, name)
    gains = 10 ** (np.array([each.volume_db for each in drawn]) / 20)
    assert_uniform(gains, 0.9 - slack, 1.1 + slack, "volume")
    everything = np.column_stack([factors, gains, boxes_of(drawn)[:, 2]])
    for first, second in product(range(6), repeat=2):
        if first < second:
            assert_unrelated(everything[:, first], everything[:, second], f"columns {first} and {second}")


def test_strong_factors_do_not_become_negative():
    drawn = draw(AugmentationSettings(brightness=0.2, contrast=0.0, saturation=1.5, hue=0.0), (64, 64), 4000)
    assert_uniform(factors_of(drawn)[:, 2], -1e-5, 2.5 + 1e-5, "saturation is drawn from [max(0, 1 - 1.5), 1 + 1.5]")


def test_colour_volume_and_flip_do_not_depend_on_the_picture():
    large, small, silent = (
        draw(settings, size, 20)
        for settings, size in (
            (AugmentationSettings(), (256, 340)),
            (AugmentationSettings(crop="resize"), (64, 300)),
            (AugmentationSettings(), (0, 0)),
        )
    )
    for one, two, three in zip(large, small, silent, strict=True):
        assert np.array_equal(one.colour, two.colour)
        assert np.array_equal(one.colour, three.colour)
        assert one.volume_db == two.volume_db == three.volume_db
        assert one.crop.flip == two.crop.flip


KEYS = [(0, 0, 0, 0), (1, 2, 3, 4), (0, 0, 2**31, 7), (2**40, 5, 1_999_999, 0), (3, 10**6, 0, 2**20)]


def fingerprint_of(keys):
    lines = []
    for key in keys:
        drawn = draw_augmentation(AugmentationSettings(), 256, 340, clip_generator(*key))
        lines.append(f"{drawn.crop} {drawn.volume_db!r} {drawn.colour.tobytes().hex()}")
    return lines


def test_another_process_draws_the_same_in_any_order():
    here = fingerprint_of(KEYS)
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); from test_distributions import KEYS, fingerprint_of\n"
        "print('\\n'.join(reversed(fingerprint_of(list(reversed(KEYS))))))"
    )
    there = run(sys.executable, "-c", program, __file__.rsplit("/", 1)[0]).stdout.splitlines()
    assert there == here
    assert len(set(here)) == len(KEYS)


@given(key=st.tuples(*[st.integers(0, 2**40)] * 4), other=st.tuples(*[st.integers(0, 3)] * 4), draws=st.integers(0, 40))
def test_only_the_key_decides(key, other, draws):
    expected = clip_generator(*key).random(30)
    # What else was drawn meanwhile does not matter, nor the global state.
    between = clip_generator(*other)
    again = clip_generator(*key)
    between.random(draws)
    np.random.random(draws)
    assert np.array_equal(again.random(30), expected)
    if key != other:
        assert not np.array_equal(clip_generator(*other).random(30), expected)


@pytest.mark.parametrize("name", ["seed", "epoch", "instance", "visit"])
@pytest.mark.parametrize("base", [0, 123_456])
def test_neighbouring_clips_are_independent(name, base):
    place = ["seed", "epoch", "instance", "visit"].index(name)
    keys = np.tile([3, 1, 4, 1], (4000, 1))
    keys[:, place] = base + np.arange(4000)
    draws = np.array([clip_generator(*map(int, key)).random(4) for key in keys])
    for number in range(4):
        assert_uniform(draws[:, number], 0, 1, f"draw {number}")
        assert_unrelated(draws[:-1, number], draws[1:, number], f"draw {number} of neighbours")
    for first, second in pairwise(range(4)):
        assert_unrelated(draws[:, first], draws[:, second], "draws of one clip")
        assert_unrelated(draws[:-1, second], draws[1:, first], "draws of neighbours, one apart")


def test_no_two_keys_share_a_generator():
    keys = product(range(4), range(5), range(60), range(10))
    # Two numbers of 53 bits: equal ones are no chance.
    draws = {tuple(clip_generator(*key).random(2)) for key in keys}
    assert len(draws) == 4 * 5 * 60 * 10
