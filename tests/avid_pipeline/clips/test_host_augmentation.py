"""The fast CPU path beside DALI's graph, which is the reference, on real frames."""

import subprocess
from pathlib import Path

import cv2
import numpy as np
import pytest

from avid_pipeline.clips.augmentation import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Augmentation,
    CropBox,
    clip_generator,
    colour_matrix,
    draw_augmentation,
    evaluation_augmentation,
)
from avid_pipeline.clips.dali_graph import GraphSettings, build_graph, pack
from avid_pipeline.clips.host_augmentation import augment_picture, single_threaded_opencv
from avid_pipeline.clips.reading import HostClip
from avid_pipeline.clips.settings import AugmentationSettings, ClipSettings
from avid_pipeline.clips.sound import augment_sound
from avid_pipeline.preprocess.ffmpeg import find_ffmpeg
from avid_pipeline.shards_spec.video import decode_frames, select_frames

MEAN, STD = (255 * np.array(values)[:, None, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))


@pytest.fixture(scope="module")
def made_video(tmp_path_factory):
    """Fine detail, soft colours and movement."""
    path = tmp_path_factory.mktemp("host") / "made.mp4"
    source = "mandelbrot=size=340x256:rate=16:start_scale=0.2,gblur=sigma=1.5,noise=alls=4"
    command = [find_ffmpeg(), "-v", "error", "-f", "lavfi", "-i", source, "-t", "2", "-pix_fmt", "yuv420p"]
    subprocess.run([*command, "-c:v", "libx264", "-preset", "ultrafast", "-g", "8", path], check=True, timeout=120)
    return path.read_bytes()


@pytest.fixture(scope="module", params=["made", "real"])
def video_and_tolerance(request, made_video):
    """A video, and how many grey levels the paths may differ on average.

    FFmpeg's conversion to RGB, which the reference uses, is up to two levels too dark and takes the nearest
    chrominance: that shows where colours change from pixel to pixel, as in the made video.
    """
    if request.param == "made":
        return made_video, 3.0
    clips = sorted((request.getfixturevalue("real_clips") / "kinetics400").rglob("*.mp4"))
    return clips[0].read_bytes(), 2.0


def by_dali(frames_THWC, augmentation, size):
    clip = ClipSettings(crop_size=size, video_seconds=len(frames_THWC) / 16)
    settings = GraphSettings(clip, np.zeros(257, np.float32), np.ones(257, np.float32), batch_size=1)
    host = HostClip(0, 0, frames_THWC, 0, np.zeros((20, 257), np.float32), augmentation)
    inputs = iter([pack([host], settings)])
    return np.array(build_graph(lambda: next(inputs), settings).run()[0][0])


def by_host(frames, augmentation, size):
    out = np.full((3, len(frames), size, size), np.nan, dtype=np.float32)
    augment_picture(frames, augmentation, out)
    return out


def both(data, augmentation, size, first=3, count=8):
    frames = select_frames(data, first, count, 16, "test")
    return by_host(frames, augmentation, size), by_dali(
        decode_frames(data, first, count, 16, "test"), augmentation, size
    )


@pytest.mark.parametrize("size", [224, 112, 56])
def test_training_clips_agree_with_dali(video_and_tolerance, size):
    video, tolerance = video_and_tolerance
    differences = []
    for visit in range(6):
        frame = select_frames(video, 0, 1, 16, "test")[0]
        generator = clip_generator(0, 0, 1, visit)
        augmentation = draw_augmentation(AugmentationSettings(), frame.height, frame.width, generator)
        fast, reference = both(video, augmentation, size)
        assert fast.shape == reference.shape == (3, 8, size, size)
        differences.append(np.abs((fast - reference) * STD).mean())
        mirrored = np.abs((fast[..., ::-1] - reference) * STD).mean()
        assert mirrored > 2 * differences[-1]
    assert np.mean(differences) < tolerance
    assert max(differences) < 1.75 * tolerance


def test_evaluation_clips_agree_with_dali(video_and_tolerance):
    video, tolerance = video_and_tolerance
    frame = select_frames(video, 0, 1, 16, "test")[0]
    fast, reference = both(video, evaluation_augmentation(frame.height, frame.width), 224)
    assert np.abs((fast - reference) * STD).mean() < tolerance


@pytest.mark.parametrize("flip", [False, True])
def test_places_are_exact(flip):
    """A ramp keeps its slope and its place at any crop, to a fraction of a pixel."""
    import av

    ramp = np.tile(np.arange(20, 220, dtype=np.uint8), (120, 1))
    picture = np.concatenate([ramp, np.full((60, 200), 128, np.uint8)])
    frame = av.VideoFrame.from_ndarray(picture, format="yuv420p")
    box = CropBox(top=10, left=30.5, height=80, width=101, flip=flip)
    found = by_host([frame], Augmentation(box, colour_matrix(), 0.0), 64)
    centres = box.left + (np.arange(64) + 0.5) * box.width / 64 - 0.5
    expected = (20 + (centres[::-1] if flip else centres) - 16) * 255 / 219
    for channel in range(3):
        levels = found[channel, 0, 32] * STD[channel].item() + MEAN[channel].item()
        assert np.abs(levels - expected).max() < 1


@pytest.mark.parametrize(
    ("pixel_format", "extra"),
    [("yuvj420p", []), ("yuv444p", []), ("yuv420p10le", []), ("yuv420p", ["-colorspace", "bt709"])],
)
def test_other_codings_give_the_same_colours(tmp_path: Path, pixel_format, extra):
    path = tmp_path / "coded.mp4"
    source = "gradients=size=160x120:rate=16:duration=1:seed=3:speed=0.02"
    command = [find_ffmpeg(), "-v", "error", "-f", "lavfi", "-i", source]
    subprocess.run(
        [*command, "-pix_fmt", pixel_format, *extra, "-c:v", "libx264", "-qp", "4", "-preset", "ultrafast", path],
        check=True,
        timeout=120,
    )
    augmentation = Augmentation(CropBox(0, 0, 120, 160), colour_matrix(), 0.0)
    fast, reference = both(path.read_bytes(), augmentation, 112, count=2)
    assert np.abs((fast - reference) * STD).mean() < 2.5


def test_repeated_frames_are_scaled_once_and_stay(made_video):
    frames = select_frames(made_video, 0, 2, 16, "test")
    augmentation = evaluation_augmentation(frames[0].height, frames[0].width)
    once = by_host(frames, augmentation, 32)
    twice = by_host([frames[0], frames[0], frames[1], frames[1]], augmentation, 32)
    assert np.array_equal(twice, once[:, [0, 0, 1, 1]])


def test_sound_is_that_of_dali():
    generator = np.random.default_rng(0)
    sound = generator.uniform(-100, 40, (200, 257)).astype(np.float32)
    mean, std = generator.uniform(-60, 0, 257).astype(np.float32), generator.uniform(5, 20, 257).astype(np.float32)
    settings = GraphSettings(ClipSettings(crop_size=16), mean, std, batch_size=1)
    augmentation = Augmentation(CropBox(0, 0, 16, 16), colour_matrix(), volume_db=-0.7)
    inputs = iter([pack([HostClip(0, 0, np.zeros((8, 16, 16, 3), np.uint8), 0, sound, augmentation)], settings)])
    reference = np.array(build_graph(lambda: next(inputs), settings).run()[1][0])
    before = sound.copy()
    found = augment_sound(sound, -0.7, mean, std)
    assert found.shape == reference.shape == (1, 200, 257)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, reference, rtol=1e-5, atol=1e-5)
    assert np.array_equal(sound, before)


def test_opencv_gets_its_threads_back():
    before = cv2.getNumThreads()
    with single_threaded_opencv():
        assert cv2.getNumThreads() == 1
    assert cv2.getNumThreads() == before
