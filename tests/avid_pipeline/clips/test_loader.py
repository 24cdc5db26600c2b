import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from nvidia.dali.backend import GetSchema

from avid_pipeline.clips.augmentation import Augmentation, CropBox, colour_matrix
from avid_pipeline.clips.dali_graph import GraphSettings, build_graph, pack
from avid_pipeline.clips.loader import ClipLoader, evaluation_batches
from avid_pipeline.clips.reading import EvaluationChoice, HostClip, TrainingChoice
from avid_pipeline.clips.settings import AugmentationSettings, ClipSettings
from avid_pipeline.errors import ConfigError, ShardError
from avid_pipeline.shards_spec.reader import open_dataset
from avid_pipeline.streams.plan import plan

GOLDEN = Path(__file__).parents[2] / "golden"
CLIP = ClipSettings(crop_size=32)
CHOICE = TrainingChoice(seed=0, epoch=0, augmentation=AugmentationSettings())


def load(root, batch_size=4, workers=2, choice=CHOICE, batches=None):
    reader = open_dataset(root)
    if batches is None:
        epoch = plan(reader.manifest, seed=0, epoch=0, clips_per_instance=2, global_batch_size=batch_size)
        batches = [epoch.rank_batch(step, 0, 1) for step in range(epoch.num_batches)]
    return ClipLoader(reader, batches, CLIP, choice, workers=workers)


def by_visit(loader):
    return {
        (int(index), int(visit)): (video, audio)
        for batch in loader
        for index, visit, video, audio in zip(
            batch["index"], batch["visit"], batch["video"], batch["audio"], strict=True
        )
    }


def test_shapes_types_and_labels(small_dataset):
    loader = load(small_dataset)
    batches = list(loader)
    assert len(batches) == len(loader) == 5
    reader = open_dataset(small_dataset)
    for batch in batches:
        assert batch["video"].shape == (4, 3, 8, 32, 32)
        assert batch["audio"].shape == (4, 1, 200, 257)
        assert {batch["video"].dtype, batch["audio"].dtype} == {torch.float32}
        assert {batch["index"].dtype, batch["label"].dtype} == {torch.int64}
        expected = [reader.read(int(index)).record.labels[0] for index in batch["index"]]
        assert batch["label"].tolist() == expected


def test_pixels_depend_on_neither_workers_nor_batches(small_dataset):
    first = by_visit(load(small_dataset, batch_size=4, workers=1))
    second = by_visit(load(small_dataset, batch_size=10, workers=3))
    common = first.keys() & second.keys()
    assert len(common) == 20
    for visit in common:
        assert torch.equal(first[visit][0], second[visit][0])
        assert torch.equal(first[visit][1], second[visit][1])


def test_a_damaged_shard_is_an_error_not_a_hang(small_dataset, tmp_path):
    root = shutil.copytree(small_dataset, tmp_path / "copy")
    data = bytearray((root / "shard-000001.tar").read_bytes())
    data[3000] ^= 1
    (root / "shard-000001.tar").write_bytes(bytes(data))
    with pytest.raises(ShardError, match="shard-000001"):
        list(load(root))


def test_leaving_early_leaves_no_threads(small_dataset):
    before = threading.active_count()
    iterator = iter(load(small_dataset))
    next(iterator)
    iterator.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("clip-loader")]
    assert threading.active_count() <= before


def test_evaluation_sees_every_clip_once(small_dataset):
    batches = [batch for rank in range(3) for batch in evaluation_batches(10, 3, 4, rank, 3)]
    seen = [(int(i), int(v)) for batch in batches for i, v in zip(batch.instances, batch.visits, strict=True)]
    assert sorted(seen) == [(instance, visit) for instance in range(10) for visit in range(3)]
    assert len(by_visit(load(small_dataset, choice=EvaluationChoice(3), batches=batches))) == 30


def run_graph(clip, settings):
    inputs = iter([pack([clip], settings)])
    pipeline = build_graph(lambda: next(inputs), settings)
    video, audio = pipeline.run()
    return np.array(video[0]), np.array(audio[0])


def host_clip(picture, sound, crop):
    return HostClip(0, 0, picture, 0, sound, Augmentation(crop, colour_matrix(), volume_db=0.0))


def test_sound_is_normalised_as_published():
    with (
        np.load(GOLDEN / "log_spectrogram.npz") as golden,
        np.load(GOLDEN / "spectrogram_norm_stats_24k_257bins.npz") as statistics,
    ):
        settings = GraphSettings(CLIP, statistics["mean"], statistics["std"], batch_size=1)
        picture = np.zeros((8, 48, 64, 3), np.uint8)
        _, audio = run_graph(host_clip(picture, golden["log_power_db"][0], CropBox(0, 0, 48, 64)), settings)
        assert np.abs(audio - golden["normalized"]).max() < 1e-4


def test_crop_and_flip():
    picture = np.zeros((8, 64, 64, 3), np.uint8)
    picture[:, :, :, 0] = np.arange(64)[None, None, :] * 4
    settings = GraphSettings(CLIP, np.zeros(257, np.float32), np.ones(257, np.float32), batch_size=1)
    sound = np.zeros((200, 257), np.float32)
    plain, _ = run_graph(host_clip(picture, sound, CropBox(16, 8, 32, 32)), settings)
    red = plain[0] * 255 * 0.229 + 255 * 0.485
    assert plain.shape == (3, 8, 32, 32)
    assert np.abs(red - np.arange(8, 40) * 4).max() < 1.5
    flipped, _ = run_graph(host_clip(picture, sound, CropBox(16, 8, 32, 32, flip=True)), settings)
    assert np.abs(flipped - plain[..., ::-1]).max() < 1e-2


def test_gpu_decoder_takes_the_arguments_we_give():
    schema = GetSchema("decoders__Video")
    for name in ("start_frame", "sequence_length", "stride", "pad_mode"):
        assert schema.HasArgument(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_gpu_without_a_gpu_says_so(small_dataset):
    with pytest.raises(ConfigError, match="no CUDA device"):
        ClipLoader(open_dataset(small_dataset), [], CLIP, CHOICE, device="gpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_gpu_clips_are_those_of_the_cpu(small_dataset):
    reader = open_dataset(small_dataset)
    batches = evaluation_batches(10, 1, 5)
    on_cpu = by_visit(ClipLoader(reader, batches, CLIP, CHOICE))
    on_gpu = by_visit(ClipLoader(reader, batches, CLIP, CHOICE, device="gpu"))
    for visit, (video, audio) in on_cpu.items():
        assert (on_gpu[visit][0].cpu() - video).abs().mean() < 0.05
        assert torch.allclose(on_gpu[visit][1].cpu(), audio, atol=1e-3)
