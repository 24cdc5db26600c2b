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
