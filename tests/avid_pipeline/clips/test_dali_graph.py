import subprocess
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from nvidia.dali import fn
from nvidia.dali.backend import GetSchema
from nvidia.dali.pipeline import Pipeline

from avid_pipeline.clips.augmentation import IMAGENET_MEAN, IMAGENET_STD, Augmentation, CropBox, colour_matrix
from avid_pipeline.clips.dali_graph import GraphSettings, build_graph, choose_decoder, frame_numbers, pack
from avid_pipeline.clips.reading import HostClip
from avid_pipeline.clips.settings import ClipSettings
from avid_pipeline.preprocess.ffmpeg import find_ffmpeg
from avid_pipeline.shards_spec.video import decode_frames

SIZE = 56
MEAN, STD = (255 * np.array(values)[:, None, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))


def graph_settings(modalities=None, batch_size=1, mean=0.0, std=1.0, **changes):
    clip = ClipSettings(crop_size=SIZE, modalities=modalities)
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
    settings = settings or graph_settings(batch_size=len(clips))
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


OPERATORS = {
    ("video", "audio"): {"decoders__Video", "Resize", "CoordTransform", "Transpose", "reductions__Max", "ExpandDims"},
    ("video",): {"decoders__Video", "Resize", "CoordTransform", "Transpose"},
    ("audio",): {"reductions__Max", "ExpandDims"},
}


def operators_of(outputs):
    """Every operator that the outputs depend on, by name."""
    found, open_nodes = {}, list(outputs)
    while open_nodes:
        operator = open_nodes.pop().source
        if operator.name not in found:
            found[operator.name] = operator
            open_nodes += operator.inputs
    return found


def described(operator):
    """An operator as DALI holds it: its schema's name, and its arguments and theirs."""
    head, _, arguments = str(operator.spec).partition("  Arguments:\n")
    pairs = (line.strip().partition(":") for line in arguments.splitlines() if line.startswith("    "))
    return head.split("\n")[0].removeprefix("OpSpec for ").rstrip(":"), {
        name: value.strip() for name, _, value in pairs
    }


def recorded_graph(monkeypatch, settings):
    """The outputs of a graph that is made, but not built: DALI needs the device only for that."""
    outputs, set_outputs = [], Pipeline.set_outputs

    def recorded(pipeline, *nodes):
        outputs.extend(nodes)
        set_outputs(pipeline, *nodes)

    monkeypatch.setattr(Pipeline, "set_outputs", recorded)
    monkeypatch.setattr(Pipeline, "build", lambda pipeline: None)
    build_graph(lambda: (), settings)
    return outputs


@pytest.mark.parametrize("modalities", OPERATORS)
def test_every_operator_of_the_gpu_graph_is_what_its_schema_allows(monkeypatch, modalities):
    settings = graph_settings(modalities, batch_size=2, device_id=0, decoder=choose_decoder(0))
    outputs = recorded_graph(monkeypatch, settings)
    assert [output.device for output in outputs] == ["gpu"] * len(modalities)
    names = set()
    for operator in operators_of(outputs).values():
        name, arguments = described(operator)
        names.add(name)
        # Arithmetic has no public schema; every device takes it.
        if name == "_ArithmeticGenericOp":
            assert arguments["device"] == "gpu"
            continue
        schema = GetSchema(name)
        assert arguments["device"] in schema.GetSupportedBackends(), name
        # DALI's own notes about an operator are no arguments of it.
        given = {argument for argument in arguments if not argument.startswith("_")} - {"device", "preserve_name"}
        assert not [argument for argument in given if not schema.HasArgument(argument)], name
        assert not [argument for argument in given if schema.IsDeprecatedArg(argument)], name
        inputs = [node.device for node in operator.inputs]
        regular = inputs[: schema.MaxNumInput()] if name != "ExternalSource" else []
        # Decoding takes files in host memory; all after it stays on the GPU but for arguments, which are the host's.
        assert set(regular) <= ({"cpu"} if arguments["device"] == "mixed" else {"gpu", "cpu"}), name
        if arguments["device"] == "gpu" and regular and name != "Copy":
            assert inputs[0] == "gpu", name
    assert (
        names - {"ExternalSource", "Constant", "_ArithmeticGenericOp", "Copy", "MakeContiguous"}
        == OPERATORS[modalities]
    )


def test_the_check_of_arguments_finds_wrong_ones():
    with Pipeline(batch_size=1, num_threads=1, device_id=0):
        encoded = fn.external_source(source=lambda: [], batch=True)
        with pytest.raises(KeyError, match="frame_numbers"):
            fn.decoders.video(encoded, device="mixed", frame_numbers=[0])
        with pytest.raises(RuntimeError, match="incompatible device"):
            fn.decoders.video(encoded, device="gpu")


def test_only_a_gpu_decodes_inside_of_the_graph():
    assert choose_decoder(None) is None
    assert choose_decoder(0) == "nvdec"


@given(first=st.integers(0, 50), count=st.integers(1, 20), stride=st.integers(1, 4), stored=st.integers(1, 100))
def test_stored_frames_of_a_clip(first, count, stride, stored):
    found = frame_numbers(first, count, stride, stored).tolist()
    grid = list(range(0, stored, stride))
    assert found == [grid[min(first + number, len(grid) - 1)] for number in range(count)]


@pytest.mark.parametrize("codec", ["libvpx-vp9", "mjpeg"])
def test_decoding_inside_of_the_graph_takes_the_frames_it_is_told(tmp_path, codec):
    """On the CPU with codecs that DALI reads there; NVDEC gets the same arguments from the same function."""
    clips, numbers = [], [[1, 3, 5, 5], [0, 1, 2, 3], [6, 6, 6, 6]]
    sizes = ["96x80", "64x48", "80x96"]
    for index, size in enumerate(sizes):
        path = tmp_path / f"{index}.mp4"
        source = f"color=size={size}:rate=16,geq=lum=20+25*N+X/2:cb=128:cr=128"
        command = [find_ffmpeg(), "-v", "error", "-f", "lavfi", "-i", source, "-frames:v", "7", "-pix_fmt", "yuv420p"]
        subprocess.run([*command, "-c:v", codec, "-q:v", "3", "-b:v", "2M", "-g", "4", path], check=True, timeout=120)
        width, height = (int(side) for side in size.split("x"))
        encoded = np.frombuffer(path.read_bytes(), np.uint8)
        clips.append(host_clip(encoded, crop=CropBox(0, 0, height, width)))
    settings = graph_settings(batch_size=3, decoder="dali-cpu")
    inputs = iter([pack(clips, settings, [np.array(chosen, np.int32) for chosen in numbers])])
    video = build_graph(lambda: next(inputs), settings).run()[0]
    for index, chosen in enumerate(numbers):
        stored = decode_frames(clips[index].picture.tobytes(), 0, 7, 16, "test")
        decoded = host_clip(stored, crop=clips[index].augmentation.crop)
        (expected,), _ = run([decoded])
        found = np.array(video[index])
        nearest = [
            int(np.argmin([np.abs(found[:, place] - expected[:, frame]).mean() for frame in range(7)]))
            for place in range(4)
        ]
        assert nearest == chosen
        assert np.abs(found - expected[:, chosen]).mean() < 0.06, "about three grey levels"


@pytest.mark.parametrize("modality", ["video", "audio"])
def test_one_modality_alone_is_that_of_both(modality):
    generator = np.random.default_rng(5)
    sound = generator.uniform(-100, 50, (200, 257)).astype(np.float32)
    clip = host_clip(smooth_picture(generator), sound, CropBox(3, 4, 50, 60), volume_db=0.5)
    both = run([clip])[0 if modality == "video" else 1]
    alone = replace(clip, sound=None) if modality == "video" else replace(clip, picture=None)
    settings = graph_settings((modality,))
    inputs = iter([pack([alone], settings)])
    (output,) = build_graph(lambda: next(inputs), settings).run()
    assert np.array_equal(np.array(output[0]), both[0])


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
