import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline

from avid_pipeline.clips.augmentation import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    clip_generator,
    colour_matrix,
    draw_augmentation,
    evaluation_augmentation,
)
from avid_pipeline.clips.settings import AugmentationSettings

MEAN, STD = 255 * np.array(IMAGENET_MEAN), 255 * np.array(IMAGENET_STD)


def apply(matrix, rgb):
    normalised = rgb @ matrix[:, :3].T.astype(float) + matrix[:, 3]
    return normalised * STD + MEAN


def by_dali(operator, pictures, **arguments):
    """Pictures [n, H, W, 3] through a DALI operator, each with its own arguments [n]."""
    pipeline = Pipeline(batch_size=len(pictures), num_threads=1, device_id=None)
    with pipeline:
        source = fn.external_source(name="picture", layout="HWC")
        values = {name: fn.external_source(name=name) for name in arguments}
        pipeline.set_outputs(operator(source, dtype=types.FLOAT, **values))
    pipeline.build()
    pipeline.feed_input("picture", list(pictures))
    for name, values in arguments.items():
        pipeline.feed_input(name, [np.array(value, np.float32) for value in values])
    return np.stack([np.array(picture) for picture in pipeline.run()[0]])


@pytest.fixture(scope="module")
def pictures():
    return np.random.default_rng(0).integers(0, 256, (40, 6, 8, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def factors():
    """Brightness, contrast, saturation and hue of 40 pictures, the extremes among them."""
    drawn = np.random.default_rng(1).uniform((0.6, 0.6, 0.0, -0.5), (1.4, 1.4, 2.0, 0.5), (40, 4))
    drawn[:4] = [(1, 1, 1, 0), (1.4, 1.4, 1.4, 0.2), (0.6, 0.6, 0.6, -0.2), (1, 1, 0, 0.5)]
    return drawn


def by_matrix(pictures, *columns):
    matrices = (colour_matrix(*map(float, each)) for each in zip(*columns, strict=True))
    return np.stack([apply(matrix, picture.astype(float)) for matrix, picture in zip(matrices, pictures, strict=True)])


def test_the_colour_matrix_is_dalis_colour_twist(pictures, factors):
    brightness, contrast, saturation, hue = factors.T
    expected = by_dali(
        fn.color_twist, pictures, brightness=brightness, contrast=contrast, saturation=saturation, hue=360 * hue
    )
    assert np.abs(by_matrix(pictures, brightness, contrast, saturation, hue) - expected).max() < 2e-3


def test_its_parts_are_dalis_other_colour_operators(pictures, factors):
    brightness, contrast, saturation, hue = factors.T
    ones, zeros = np.ones(40), np.zeros(40)
    expected = by_dali(fn.brightness_contrast, pictures, brightness=brightness, contrast=contrast)
    assert np.abs(by_matrix(pictures, brightness, contrast, ones, zeros) - expected).max() < 2e-3
    expected = by_dali(fn.hsv, pictures, saturation=saturation, hue=360 * hue)
    assert np.abs(by_matrix(pictures, ones, ones, saturation, hue) - expected).max() < 2e-3


def test_key_decides():
    def draw(*key):
        return draw_augmentation(AugmentationSettings(), 48, 64, clip_generator(*key))

    assert np.array_equal(draw(0, 1, 2, 3).colour, draw(0, 1, 2, 3).colour)
    for other in ((1, 1, 2, 3), (0, 0, 2, 3), (0, 1, 0, 3), (0, 1, 2, 0)):
        assert not np.array_equal(draw(0, 1, 2, 3).colour, draw(*other).colour)


def test_evaluation_is_the_centre():
    crop = evaluation_augmentation(256, 340).crop
    assert (crop.height, crop.width, crop.top, crop.left) == (224, 224, 16, 58)


@pytest.mark.parametrize(
    ("size", "expected"), [((50, 1000), (50, 67)), ((1000, 50), (67, 50)), ((100, 110), (100, 110))], ids=str
)
def test_where_no_box_fits_it_is_the_largest_in_the_centre(size, expected):
    # A share of 1 fits only a picture of an allowed ratio.
    settings = AugmentationSettings(area=(1.0, 1.0), ratio=(3 / 4, 4 / 3))
    for number in range(5):
        crop = draw_augmentation(settings, *size, clip_generator(0, 0, number, 0)).crop
        assert (crop.height, crop.width) == expected
        assert crop.top == (size[0] - crop.height) // 2
        assert crop.left == (size[1] - crop.width) // 2


def test_nothing_is_changed_where_nothing_is_asked():
    settings = AugmentationSettings(
        area=(1.0, 1.0), flip=0, brightness=0, contrast=0, saturation=0, hue=0, volume=0, ratio=(1.0, 1.0)
    )
    drawn = draw_augmentation(settings, 64, 64, clip_generator(0, 0, 0, 0))
    assert (drawn.crop.top, drawn.crop.left, drawn.crop.height, drawn.crop.width) == (0, 0, 64, 64)
    assert not drawn.crop.flip
    assert drawn.volume_db == 0
    assert np.abs(drawn.colour - colour_matrix()).max() < 1e-7
    pixels = np.random.default_rng(0).uniform(0, 255, (50, 3))
    assert np.abs(apply(colour_matrix(), pixels) - pixels).max() < 1e-4
    assert draw_augmentation(AugmentationSettings(flip=1), 64, 64, clip_generator(0, 0, 0, 0)).crop.flip


def test_grey_stays_grey_under_saturation_and_hue():
    grey = np.repeat(np.linspace(0, 255, 20)[:, None], 3, axis=1)
    # Within one level: DALI's digits, which these are, give grey a chrominance of a thousandth.
    assert np.abs(apply(colour_matrix(saturation=0.2, hue=0.3), grey) - grey).max() < 1


@pytest.mark.parametrize("size", [(256, 340), (340, 256), (51, 66)], ids=str)
def test_evaluation_keeps_the_centre_and_the_ratio(size):
    crop = evaluation_augmentation(*size).crop
    assert crop.height == crop.width == pytest.approx(min(size) * 224 / 256)
    assert crop.top + crop.height / 2 == pytest.approx(size[0] / 2)
    assert crop.left + crop.width / 2 == pytest.approx(size[1] / 2)
    assert not crop.flip


def test_without_a_picture_there_is_nothing_to_crop():
    drawn = draw_augmentation(AugmentationSettings(flip=1), 0, 0, clip_generator(0, 0, 0, 0))
    assert (drawn.crop.height, drawn.crop.width) == (0, 0)
    assert (evaluation_augmentation(0, 0).crop.height, evaluation_augmentation(0, 0).crop.width) == (0, 0)


@pytest.mark.parametrize("crop", ["multi_scale", "resize"])
@given(height=st.integers(2, 600), width=st.integers(2, 600), seed=st.integers(0, 1000))
def test_crops_lie_in_the_picture(crop, height, width, seed):
    settings = AugmentationSettings(crop=crop)
    box = draw_augmentation(settings, height, width, clip_generator(seed, 0, 0, 0)).crop
    assert 0 <= box.top < box.top + box.height <= height
    assert 0 <= box.left < box.left + box.width <= width
