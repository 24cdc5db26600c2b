import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nvidia.dali.backend import GetSchema
from nvidia.dali.pipeline import Pipeline

from avid_pipeline.clips.augmentation import IMAGENET_MEAN, IMAGENET_STD, Augmentation, CropBox, colour_matrix
from avid_pipeline.clips.dali_graph import GraphSettings, build_graph, pack
from avid_pipeline.clips.reading import HostClip
from avid_pipeline.clips.settings import ClipSettings

SIZE = 56
MEAN, STD = (255 * np.array(values)[:, None, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))


def graph_settings(batch_size=1, mean=0.0, std=1.0, **changes):
    clip = ClipSettings(crop_size=SIZE)
    return GraphSettings(
        clip, np.full(257, mean, np.float32), np.full(257, std, np.float32), batch_size=batch_size, **changes
    )


def smooth_picture(generator, height=120, width=160, frames=3):
    """Pictures without fine detail, so that kernels of different widths agree: uint8 [T, H, W, 3]."""
    coarse = torch.tensor(generator.uniform(0, 255, (frames, 3, 5, 7)))
    fine = F.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=True).clamp(0, 255)
    return fine.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def host_clip(picture=None, sound=None, crop=None, colour=None, volume_db=0.0):
    picture = np.zeros((3, 60, 80, 3), np.uint8) if picture is None else picture
    sound = np.zeros((200, 257), np.float32) if sound is None else sound
    crop = CropBox(0, 0, *picture.shape[1:3]) if crop is None else crop
    return HostClip(
        0, 0, picture, 0, sound, Augmentation(crop, colour_matrix() if colour is None else colour, volume_db)
    )


def run(clips, settings=None):
    settings = settings or graph_settings(len(clips))
    inputs = iter([pack(clips, settings)])
    video, audio = build_graph(lambda: next(inputs), settings).run()
    return [np.array(clip) for clip in video], [np.array(clip) for clip in audio]


def grey_levels(video):
    return video * STD + MEAN


def expected_crop(picture, crop):
    """The same crop with torch: [3, T, SIZE, SIZE] in grey levels."""
    box = picture[:, int(crop.top) : int(crop.top + crop.height), int(crop.left) : int(crop.left + crop.width)]
    channels_first = torch.tensor(box).permute(0, 3, 1, 2).float()
    scaled = F.interpolate(channels_first, size=(SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False)
    video = scaled.permute(1, 0, 2, 3).numpy()
    return video[..., ::-1] if crop.flip else video


def test_crops_are_those_of_an_independent_interpolation():
    generator = np.random.default_rng(0)
    clips, crops = [], []
    for number in range(12):
        picture = smooth_picture(generator)
        height, width = int(generator.integers(20, 121)), int(generator.integers(20, 161))
        top, left = int(generator.integers(0, 121 - height)), int(generator.integers(0, 161 - width))
        crops.append(CropBox(top, left, height, width, flip=number % 2 == 1))
        clips.append(host_clip(picture, crop=crops[-1]))
    videos, _ = run(clips)
    for clip, crop, video in zip(clips, crops, videos, strict=True):
        assert video.shape == (3, 3, SIZE, SIZE)
        difference = np.abs(grey_levels(video) - expected_crop(clip.picture, crop))
        # At its edges a crop may look at pixels just outside of it.
        assert difference[..., 2:-2, 2:-2].max() < 3
        assert difference.max() < 12
        assert difference.mean() < 1
        mirrored = CropBox(crop.top, crop.left, crop.height, crop.width, not crop.flip)
        assert np.abs(grey_levels(video) - expected_crop(clip.picture, mirrored)).mean() > 5


def test_fine_detail_is_averaged_when_it_is_scaled_down():
    # Every eighth column is white and eight columns become one; looking only at neighbours would miss the white.
    picture = np.zeros((1, 8 * SIZE, 8 * SIZE, 3), np.uint8)
    picture[:, :, ::8] = 255
    (video,), _ = run([host_clip(picture)])
    assert np.abs(grey_levels(video) - 255 / 8)[..., 2:-2].max() < 6


def test_boxes_between_pixels():
    # The evaluation crop is not whole pixels: a ramp must come out shifted by exactly that part of a pixel.
    picture = np.zeros((1, 100, 100, 3), np.uint8)
    picture[..., :] = (2 * np.arange(100, dtype=np.uint8))[None, None, :, None]
    (video,), _ = run([host_clip(picture, crop=CropBox(10.25, 20.5, SIZE, SIZE))])
    expected = 2 * (20.5 + np.arange(SIZE))
    assert np.abs(grey_levels(video)[:, 0] - expected).max() < 1.01


def test_the_colour_matrix_is_applied_to_every_frame():
    picture = smooth_picture(np.random.default_rng(1), SIZE, SIZE)
    colour = colour_matrix(1.2, 0.7, 1.3, 0.1)
    (video,), _ = run([host_clip(picture, colour=colour)])
    expected = np.einsum("ij,thwj->ithw", colour[:, :3], picture.astype(np.float32)) + colour[:, 3][:, None, None, None]
    assert np.abs(video - expected).max() < 1e-4


def test_without_jitter_only_the_normalisation_of_imagenet_is_left():
    picture = smooth_picture(np.random.default_rng(2), SIZE, SIZE)
    (video,), _ = run([host_clip(picture)])
    expected = (picture / 255 - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
    assert np.abs(video - expected.transpose(3, 0, 1, 2)).max() < 1e-4


def test_volume_then_range_then_normalisation():
    sound = np.random.default_rng(3).uniform(-100, 55, (200, 257)).astype(np.float32)
    settings = graph_settings(mean=-20.0, std=12.0)
    _, (audio,) = run([host_clip(sound=sound, volume_db=0.8)], settings)
    louder = sound + 0.8
    clipped = np.maximum(louder, louder.max() - 100)
    assert (clipped > louder).mean() > 0.2, "the range of this sound is more than 100 dB"
    assert audio.shape == (1, 200, 257)
    assert np.abs(audio[0] - (clipped + 20) / (12 + 1e-5)).max() < 1e-4


def test_clips_of_a_batch_do_not_touch_each_other():
    generator = np.random.default_rng(4)
    sounds = [generator.uniform(-100, loudest, (200, 257)).astype(np.float32) for loudest in (50, 0)]
    clips = [
        host_clip(smooth_picture(generator, 60 + 20 * number, 80 - 10 * number), sounds[number], volume_db=number)
        for number in range(2)
    ]
    together, alone = run(clips), [run([clip]) for clip in clips]
    for number in range(2):
        assert np.array_equal(together[0][number], alone[number][0][0])
        assert np.array_equal(together[1][number], alone[number][1][0])


def test_the_gpu_graph_is_valid_without_a_gpu(monkeypatch):
    # DALI checks arguments and devices against its operators' schemas as the graph is made; only build needs a GPU.
    outputs, set_outputs = [], Pipeline.set_outputs

    def recorded(pipeline, *nodes):
        outputs.extend(nodes)
        set_outputs(pipeline, *nodes)

    monkeypatch.setattr(Pipeline, "set_outputs", recorded)
    monkeypatch.setattr(Pipeline, "build", lambda pipeline: None)
    settings = graph_settings(batch_size=2, device_id=0, frame_stride=2)
    encoded = HostClip(0, 0, np.zeros(100, np.uint8), 5, np.zeros((200, 257), np.float32), host_clip().augmentation)
    inputs = pack([encoded, encoded], settings)
    assert [int(first) for first in inputs[6]] == [10, 10], "stored frames, of which the clip takes every second"
    build_graph(lambda: inputs, settings)
    assert [output.device for output in outputs] == ["gpu", "gpu"]
    assert {"mixed", "gpu"} & set(GetSchema("decoders__Video").GetSupportedBackends())


def test_pack_runs_backwards_where_it_mirrors():
    crop = CropBox(1, 2, 30, 40)
    starts, ends = pack([host_clip(crop=crop)], graph_settings())[1:3]
    assert starts[0].tolist() == [1, 2]
    assert ends[0].tolist() == [31, 42]
    mirrored = CropBox(1, 2, 30, 40, flip=True)
    starts, ends = pack([host_clip(crop=mirrored)], graph_settings())[1:3]
    assert starts[0].tolist() == [1, 42]
    assert ends[0].tolist() == [31, 2]
    assert len(pack([host_clip()], graph_settings())) == 6


@pytest.mark.parametrize("loudness", [-100.0, 60.0])
def test_constant_sound_stays_as_it_is(loudness):
    _, (audio,) = run([host_clip(sound=np.full((200, 257), loudness, np.float32))])
    assert np.abs(audio - loudness).max() < 2e-3
