"""The engine around DALI's graph: on the CPU here; the tests marked ``gpu`` need one."""

import gc
import shutil
import subprocess
import threading
import time
from concurrent.futures import Future
from dataclasses import replace

import numpy as np
import pytest
import torch

from avid_pipeline.clips import dali_engine
from avid_pipeline.clips.augmentation import evaluation_augmentation
from avid_pipeline.clips.dali_engine import DaliEngine, prepare_encoded
from avid_pipeline.clips.failures import FailurePolicy
from avid_pipeline.clips.loader import ClipLoader, evaluation_batches
from avid_pipeline.clips.reading import EvaluationChoice, HostClip, TrainingChoice
from avid_pipeline.clips.settings import AugmentationSettings, ClipSettings
from avid_pipeline.errors import ConfigError, DecodeError, ShardError
from avid_pipeline.preprocess.executors.local import LocalExecutor
from avid_pipeline.preprocess.ffmpeg import find_ffmpeg
from avid_pipeline.preprocess.job import run_job
from avid_pipeline.preprocess.sources.kinetics import list_kinetics
from avid_pipeline.shards_spec.manifest import Parameters, VideoParameters
from avid_pipeline.shards_spec.reader import ShardReader, open_dataset
from avid_pipeline.shards_spec.sample import Sample

CLIP = ClipSettings(crop_size=32)
TRAINING = TrainingChoice(seed=0, epoch=0, augmentation=AugmentationSettings())
GREY_LEVEL = 1 / (255 * 0.226)

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")


@pytest.fixture(scope="module")
def vp9_dataset(kinetics_tree, tmp_path_factory):
    """The same ten samples, in a codec that DALI decodes without a GPU."""
    root = tmp_path_factory.mktemp("vp9")
    parameters = Parameters(video=VideoParameters(codec="vp9", short_side=48), samples_per_shard=4)
    run_job(list_kinetics(kinetics_tree), parameters, str(root), LocalExecutor(1))
    return root


@pytest.fixture
def decode_inside(monkeypatch):
    """Loaders with ``operators="dali"`` decode inside of DALI's graph, on the CPU."""
    monkeypatch.setattr(dali_engine, "choose_decoder", lambda device_id: "dali-cpu")


def load(root, clip=CLIP, choice=TRAINING, *, batches=None, **options):
    options = {"operators": "dali", "workers": 2} | options
    reader = root if isinstance(root, ShardReader) else open_dataset(root)
    return ClipLoader(reader, evaluation_batches(10, 1, 4) if batches is None else batches, clip, choice, **options)


def assert_close(found, expected, grey_levels):
    """Batches of the same clips whose pictures differ little on average, and whose sound is the same."""
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        assert one["labels"] == other["labels"]
        for name in ("index", "visit", "label"):
            assert torch.equal(one[name], other[name])
        if "video" in one:
            assert one["video"].shape == other["video"].shape
            assert (one["video"].cpu() - other["video"]).abs().mean() < grey_levels * GREY_LEVEL
        if "audio" in one:
            assert torch.allclose(one["audio"].cpu(), other["audio"], atol=1e-3)


def test_batches_are_those_of_the_fast_path(small_dataset):
    found = list(load(small_dataset))
    assert [len(batch["index"]) for batch in found] == [4, 4, 2]
    assert_close(found, list(load(small_dataset, operators="opencv")), grey_levels=6)


@pytest.mark.parametrize("modality", ["video", "audio"])
def test_one_modality_is_that_of_both(small_dataset, modality):
    clip = CLIP.model_copy(update={"modalities": (modality,)})
    other = "audio" if modality == "video" else "video"
    choice = EvaluationChoice(1)
    for one, both in zip(load(small_dataset, clip, choice), load(small_dataset, choice=choice), strict=True):
        assert torch.equal(one[modality], both[modality])
        assert other not in one


def test_a_damaged_shard_is_our_error(small_dataset, tmp_path):
    root = shutil.copytree(small_dataset, tmp_path / "copy")
    data = bytearray((root / "shard-000001.tar").read_bytes())
    data[3000] ^= 1
    (root / "shard-000001.tar").write_bytes(bytes(data))
    with pytest.raises(ShardError, match="shard-000001"):
        list(load(root))


def test_delivered_batches_are_not_overwritten(small_dataset):
    kept = list(load(small_dataset))
    for first, again in zip(kept, load(small_dataset), strict=True):
        assert torch.equal(first["video"], again["video"])
        assert torch.equal(first["audio"], again["audio"])


def test_leaving_early_leaves_no_threads(small_dataset):
    before = threading.active_count()
    iterator = iter(load(small_dataset))
    next(iterator)
    iterator.close()
    assert threading.active_count() <= before


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_epochs_shorter_than_dalis_queue(small_dataset, count):
    batches = evaluation_batches(10, 1, 3)[:count]
    found = list(load(small_dataset, batches=batches))
    assert [batch["index"].tolist() for batch in found] == [batch.instances.tolist() for batch in batches]


@pytest.mark.parametrize("fps", [16, 8])
def test_decoding_inside_takes_the_frames_of_the_fast_path(vp9_dataset, decode_inside, fps):
    # 1.6 s are 26 stored frames; a clip of 2 s is longer than its video and ends with frames that stand still.
    for seconds in (0.5, 2.0):
        clip = ClipSettings(crop_size=48, fps=fps, video_seconds=seconds)
        for choice in (TRAINING, EvaluationChoice(1)):
            inside = list(load(vp9_dataset, clip, choice))
            assert_close(inside, list(load(vp9_dataset, clip, choice, operators="opencv")), grey_levels=5)
            if seconds == 2.0:
                still = inside[0]["video"][:, :, -1] - inside[0]["video"][:, :, -2]
                assert still.abs().max() == 0


@pytest.mark.parametrize("fps", [10, 32])
def test_decoding_inside_needs_a_rate_that_divides_the_stored_one(vp9_dataset, decode_inside, fps):
    with pytest.raises(ConfigError, match=r"clip\.fps"):
        load(vp9_dataset, ClipSettings(fps=fps))
    clip = ClipSettings(fps=fps, modalities=("audio",))
    assert list(load(vp9_dataset, clip)), "sound alone needs no frames"


def damaged(root, instance, video):
    """A reader that gives another video for an instance."""
    reader = open_dataset(root)
    samples = {index: reader.read(index) for index in range(reader.manifest.num_samples)}
    samples[instance] = replace(samples[instance], video=video)

    class Reader(type(reader)):
        def read(self, index: int) -> Sample:
            return samples[index]

    class Fetcher:
        def __init__(self, _reader):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def request(self, index):
            future: Future[Sample] = Future()
            future.set_result(samples[index])
            return future

    return Reader(reader.storage, reader.manifest), Fetcher


def test_a_file_that_is_no_video_is_replaced_before_dali_sees_it(vp9_dataset, decode_inside):
    reader, fetcher = damaged(vp9_dataset, 5, b"no video" * 100)
    with pytest.raises(DecodeError, match="cannot be opened"):
        list(load(reader, fetcher=fetcher))
    policy = FailurePolicy(substitute=lambda number, instance, visit, attempt: 0)
    found = [int(index) for batch in load(reader, fetcher=fetcher, failures=policy) for index in batch["index"]]
    assert found == [0, 1, 2, 3, 4, 0, 6, 7, 8, 9]
    assert policy.failures == 1


def test_what_dali_cannot_decode_is_our_error_and_names_the_batch(small_dataset, vp9_dataset, decode_inside):
    # DALI's CPU decoder has no H.264: the file can be opened, and fails inside of the graph.
    reader, fetcher = damaged(vp9_dataset, 5, open_dataset(small_dataset).read(5).video)
    with pytest.raises(DecodeError, match=r"batch 1: DALI cannot make it: .*one of the instances 4, 5, 6, 7") as caught:
        list(load(reader, fetcher=fetcher))
    assert "traceback" not in str(caught.value)


def encoded_clip(tmp_path, *extra, first=0, size="64x48", frames=10):
    path = tmp_path / "one.mp4"
    source = f"color=size={size}:rate=16:color=red"
    command = [find_ffmpeg(), "-v", "error", "-y", "-f", "lavfi", "-i", source, "-frames:v", str(frames)]
    subprocess.run([*command, "-pix_fmt", "yuv420p", *extra, "-c:v", "libx264", path], check=True, timeout=120)
    picture = np.frombuffer(path.read_bytes(), np.uint8)
    return HostClip(0, 0, picture, first, None, evaluation_augmentation(48, 64))


def test_frames_are_those_that_the_file_has(tmp_path):
    clip = encoded_clip(tmp_path, first=3)
    assert prepare_encoded(clip, 4, 2, "x").frames.tolist() == [6, 8, 8, 8]
    with pytest.raises(DecodeError, match="x: expected frames from number 12 on, found 10"):
        prepare_encoded(replace(clip, first_frame=6), 4, 2, "x")


@pytest.mark.parametrize("inside", [False, True])
def test_a_picture_smaller_than_its_record_says_is_an_error(small_dataset, vp9_dataset, tmp_path, monkeypatch, inside):
    # DALI would read the crop from beyond the picture, and crash.
    if inside:
        monkeypatch.setattr(dali_engine, "choose_decoder", lambda device_id: "dali-cpu")
    small = encoded_clip(tmp_path, size="16x16", frames=64).picture.tobytes()
    reader, fetcher = damaged(vp9_dataset if inside else small_dataset, 5, small)
    with pytest.raises(DecodeError, match="as its record has it, found 16x16"):
        list(load(reader, choice=EvaluationChoice(1), fetcher=fetcher))


@pytest.mark.parametrize("colourspace", ["smpte170m", "bt709"])
def test_colours_of_another_colour_space_are_mended(tmp_path, colourspace):
    """What DALI decodes as BT.601, whatever it is, becomes what it is."""
    clip = encoded_clip(tmp_path, "-colorspace", colourspace)
    red, blue = (0.2126, 0.0722) if colourspace == "bt709" else (0.299, 0.114)
    for rgb in np.eye(3) * 200 + 25:
        luminance = red * rgb[0] + (1 - red - blue) * rgb[1] + blue * rgb[2]
        chroma_blue, chroma_red = (rgb[2] - luminance) / (2 - 2 * blue), (rgb[0] - luminance) / (2 - 2 * red)
        as_bt601 = [
            luminance + 1.402 * chroma_red,
            luminance - 0.344136 * chroma_blue - 0.714136 * chroma_red,
            luminance + 1.772 * chroma_blue,
        ]
        mended = prepare_encoded(clip, 1, 1, "x").clip.augmentation.colour @ [*as_bt601, 1]
        assert np.allclose(mended, clip.augmentation.colour @ [*rgb, 1], atol=0.01)


class Waiting:
    """Something that was started and is ready when told."""

    def __init__(self, clips):
        self.futures = [Future() for _ in clips]
        self.clips = clips

    def finish(self):
        for future, clip in zip(self.futures, self.clips, strict=True):
            future.set_result(dali_engine._Prepared(clip))


@pytest.mark.timeout(60)
def test_a_batch_that_is_not_read_yet_does_not_hold_up_one_that_is_made(small_dataset):
    reader = open_dataset(small_dataset)
    clip = CLIP.model_copy(update={"modalities": ("audio",)})
    recipe = load(reader, clip)._engine._recipe
    engine = DaliEngine(recipe, reader.manifest, 1, 1, None)
    clips = [recipe.read(reader.read(index), index, 0, "rgb") for index in range(4)]
    waiting = [Waiting([one]) for one in clips]
    started = iter([dali_engine._Started(one.futures, torch.zeros(1, dtype=torch.int64)) for one in waiting])
    waiting[0].finish()
    waiting[1].finish()
    batches = engine.finish(started, 4)
    # Nobody finishes the third batch: if DALI waited for it, the second would never come.
    assert [next(batches)["index"].item() for _ in range(2)] == [0, 1]
    waiting[2].finish()
    waiting[3].finish()
    assert [batch["index"].item() for batch in batches] == [2, 3]


@pytest.fixture(scope="module")
def gpu_dataset(tmp_path_factory):
    """Twelve H.264 videos of real size and of different shapes."""
    tree, root = tmp_path_factory.mktemp("gpu_videos"), tmp_path_factory.mktemp("gpu_shards")
    for number in range(12):
        size = ("340x256", "256x340", "456x256")[number % 3]
        path = tree / f"class {number % 3}" / f"video{number:06d}.mp4"
        path.parent.mkdir(exist_ok=True)
        picture = f"mandelbrot=size={size}:rate=16:start_scale={0.2 + 0.05 * number},gblur=sigma=1.5"
        sound = f"sine=frequency={300 + 50 * number}:sample_rate=44100"
        command = [find_ffmpeg(), "-v", "error", "-f", "lavfi", "-i", picture, "-f", "lavfi", "-i", sound, "-t", "4"]
        colours = ["-colorspace", "bt709"] if number % 2 else []
        subprocess.run(
            [*command, "-pix_fmt", "yuv420p", *colours, "-c:v", "libx264", "-c:a", "aac", path], check=True, timeout=120
        )
    run_job(list_kinetics(tree), Parameters(samples_per_shard=4), str(root), LocalExecutor(1))
    return root


def load_gpu(root, clip, choice=TRAINING, epochs=1, batch_size=4, **options):
    batches = evaluation_batches(12, 1, batch_size) * epochs
    return load(root, clip, choice, batches=batches, **{"operators": "opencv", **options})


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("modalities", [("video", "audio"), ("video",), ("audio",)])
@pytest.mark.parametrize(("fps", "seconds"), [(16, 0.5), (8, 1.0), (16, 5.0)])
def test_gpu_clips_are_those_of_the_cpu(gpu_dataset, modalities, fps, seconds):
    clip = ClipSettings(fps=fps, video_seconds=seconds, modalities=modalities)
    for choice in (TRAINING, EvaluationChoice(1)):
        on_gpu = list(load_gpu(gpu_dataset, clip, choice, device="gpu"))
        assert {batch[name].device.type for batch in on_gpu for name in modalities} == {"cuda"}
        assert_close(on_gpu, list(load_gpu(gpu_dataset, clip, choice)), grey_levels=4)


@pytest.mark.gpu
@needs_gpu
def test_gpu_batches_stay_and_repeat(gpu_dataset):
    loader_on_gpu = load_gpu(gpu_dataset, ClipSettings(), device="gpu")
    first, second = list(loader_on_gpu), list(loader_on_gpu)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one["video"], other["video"])
        assert torch.equal(one["audio"], other["audio"])


@pytest.mark.gpu
@needs_gpu
def test_gpu_batches_wait_for_the_stream_that_asks(gpu_dataset):
    expected = list(load_gpu(gpu_dataset, ClipSettings(), device="gpu"))
    with torch.cuda.stream(torch.cuda.Stream()):
        found = [batch["video"].clone() for batch in load_gpu(gpu_dataset, ClipSettings(), device="gpu")]
    torch.cuda.synchronize()
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other["video"])


@pytest.mark.gpu
@needs_gpu
def test_gpu_memory_does_not_grow(gpu_dataset):
    def used_after_an_epoch():
        for batch in load_gpu(gpu_dataset, ClipSettings(), epochs=4, device="gpu"):
            batch["video"].to(torch.bfloat16).sum().item()
        gc.collect()
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        return total - free

    used = [used_after_an_epoch() for _ in range(6)]
    # DALI keeps what the first epochs needed.
    assert used[-1] <= used[2] + (32 << 20), used


@pytest.mark.gpu
@needs_gpu
def test_what_nvdec_cannot_decode_is_our_error(gpu_dataset, tmp_path):
    # It has no H.264 of full colour resolution.
    video = encoded_clip(tmp_path, "-pix_fmt", "yuv444p", size="456x256", frames=64).picture.tobytes()
    reader, fetcher = damaged(gpu_dataset, 5, video)
    with pytest.raises(DecodeError, match=r"batch 1: DALI cannot make it: .*one of the instances 4, 5, 6, 7"):
        list(load_gpu(reader, ClipSettings(), device="gpu", fetcher=fetcher))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_gpu_throughput_is_reported(gpu_dataset, device, capsys):
    batches = load_gpu(gpu_dataset, ClipSettings(), epochs=40, batch_size=12, device=device)
    began, clips = None, 0
    for number, batch in enumerate(batches):
        batch["video"].to(torch.bfloat16).sum().item()
        if number == 5:
            began = time.perf_counter()
        elif number > 5:
            clips += len(batch["index"])
    assert clips == 12 * 34
    with capsys.disabled():
        print(f"\nclips from {device}: {clips / (time.perf_counter() - began):.0f} a second")
