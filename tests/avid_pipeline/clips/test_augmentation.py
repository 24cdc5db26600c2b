import numpy as np
import pytest
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


@pytest.mark.parametrize(
    ("brightness", "contrast", "saturation", "hue"),
    [(1.0, 1.0, 1.0, 0.0), (1.3, 1, 1, 0), (1, 0.6, 1, 0), (1, 1, 1.4, 0), (1, 1, 1, 0.2), (0.8, 1.2, 0.7, -0.1)],
)
def test_colour_matrix_is_dalis_colour_twist(brightness, contrast, saturation, hue):
    picture = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    pipeline = Pipeline(batch_size=1, num_threads=1, device_id=None)
    with pipeline:
        source = fn.external_source(name="picture", layout="HWC")
        arguments = {"brightness": brightness, "contrast": contrast, "saturation": saturation, "hue": 360 * hue}
        pipeline.set_outputs(fn.color_twist(source, dtype=types.FLOAT, **arguments))
    pipeline.build()
    pipeline.feed_input("picture", [picture])
    expected = np.array(pipeline.run()[0][0])
    computed = apply(colour_matrix(brightness, contrast, saturation, hue), picture.astype(float))
    assert np.abs(computed - expected).max() < 1e-2


def test_crops_follow_random_resized_crop():
    settings, height, width = AugmentationSettings(), 256, 340
    drawn = [draw_augmentation(settings, height, width, clip_generator(0, 0, i, 0)) for i in range(3000)]
    boxes = np.array([[d.crop.top, d.crop.left, d.crop.height, d.crop.width] for d in drawn])
    top, left, box_height, box_width = boxes.T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + box_height <= height).all()
    assert (left + box_width <= width).all()
    share, ratio = box_height * box_width / (height * width), box_width / box_height
    assert share.min() == pytest.approx(0.08, abs=0.01)
    assert share.max() > 0.85
    assert ratio.min() > 0.73
    assert ratio.max() < 1.36
    assert np.mean([d.crop.flip for d in drawn]) == pytest.approx(0.5, abs=0.03)
    # Small crops always fit, so their share is uniform, their ratio log-uniform, and their place uniform.
    small = share < 0.4
    assert np.mean(share[small] < 0.24) == pytest.approx(0.5, abs=0.05)
    assert np.mean(np.log(ratio[small])) == pytest.approx(0, abs=0.01)
    assert np.mean(left[small] / (width - box_width[small])) == pytest.approx(0.5, abs=0.03)
    assert np.mean(top[small] / (height - box_height[small])) == pytest.approx(0.5, abs=0.03)


def test_volume_is_an_offset_of_ten_percent():
    offsets = [
        draw_augmentation(AugmentationSettings(), 48, 64, clip_generator(0, 0, i, 0)).volume_db for i in range(500)
    ]
    assert min(offsets) == pytest.approx(20 * np.log10(0.9), abs=0.02)
    assert max(offsets) == pytest.approx(20 * np.log10(1.1), abs=0.02)


def test_key_decides():
    def draw(*key):
        return draw_augmentation(AugmentationSettings(), 48, 64, clip_generator(*key))

    assert np.array_equal(draw(0, 1, 2, 3).colour, draw(0, 1, 2, 3).colour)
    for other in ((1, 1, 2, 3), (0, 0, 2, 3), (0, 1, 0, 3), (0, 1, 2, 0)):
        assert not np.array_equal(draw(0, 1, 2, 3).colour, draw(*other).colour)


def test_evaluation_is_the_centre():
    crop = evaluation_augmentation(256, 340).crop
    assert (crop.height, crop.width, crop.top, crop.left) == (224, 224, 16, 58)


def reference_boxes(count, height, width, area, ratio, seed):
    """RandomResizedCrop written down once more, with another generator: [count, (share, ratio)]."""
    generator = np.random.default_rng(seed)
    boxes = []
    for _ in range(count):
        attempts = np.exp(generator.uniform(np.log(ratio[0]), np.log(ratio[1]), 10))
        areas = generator.uniform(*area, 10) * height * width
        widths, heights = np.round(np.sqrt(areas * attempts)), np.round(np.sqrt(areas / attempts))
        fits = np.flatnonzero((widths <= width) & (heights <= height))
        if len(fits):
            boxes.append((heights[fits[0]], widths[fits[0]]))
        else:
            wanted = np.clip(width / height, *ratio)
            boxes.append((min(height, round(width / wanted)), min(width, round(height * wanted))))
    heights, widths = np.array(boxes).T
    return heights * widths / (height * width), widths / heights


@pytest.mark.parametrize("size", [(256, 340), (256, 256), (340, 256), (64, 500)], ids=str)
def test_crops_have_the_distribution_of_an_independent_random_resized_crop(size):
    settings, count = AugmentationSettings(area=(0.2, 1.0)), 4000
    crops = [draw_augmentation(settings, *size, clip_generator(5, 0, i, 0)).crop for i in range(count)]
    boxes = np.array([[crop.height, crop.width] for crop in crops])
    share, ratio = boxes.prod(axis=1) / np.prod(size), boxes[:, 1] / boxes[:, 0]
    for found, expected in zip(
        (share, ratio), reference_boxes(count, *size, (0.2, 1.0), (3 / 4, 4 / 3), 99), strict=True
    ):
        grid = np.sort(expected)
        distance = np.abs(
            np.searchsorted(np.sort(found), grid, side="right") - np.searchsorted(grid, grid, side="right")
        )
        # Kolmogorov and Smirnov: one in a million pairs of samples of one distribution is further apart.
        assert distance.max() / count < 2.7 * np.sqrt(2 / count)


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


def test_factors_are_uniform_over_their_range():
    # Of a brightness jitter alone, the matrix scales by the factor.
    settings = AugmentationSettings(brightness=0.4, contrast=0, saturation=0, hue=0)
    drawn = [draw_augmentation(settings, 64, 64, clip_generator(1, 0, i, 0)).colour[0, 0] for i in range(2000)]
    factors = np.array(drawn) / colour_matrix()[0, 0]
    counts, _ = np.histogram(factors, bins=4, range=(0.6, 1.4))
    assert counts.sum() == 2000
    assert counts.min() > 430


@pytest.mark.parametrize("size", [(256, 340), (340, 256), (51, 66)], ids=str)
def test_evaluation_keeps_the_centre_and_the_ratio(size):
    crop = evaluation_augmentation(*size).crop
    assert crop.height == crop.width == pytest.approx(min(size) * 224 / 256)
    assert crop.top + crop.height / 2 == pytest.approx(size[0] / 2)
    assert crop.left + crop.width / 2 == pytest.approx(size[1] / 2)
    assert not crop.flip
