import contextlib
import gc
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from avid_pipeline.clips.augmentation import Augmentation, CropBox, colour_matrix
from avid_pipeline.clips.dali_engine import frame_stride
from avid_pipeline.clips.dali_graph import GraphSettings, build_graph, pack
from avid_pipeline.clips.loader import ClipLoader, evaluation_batches
from avid_pipeline.clips.reading import EvaluationChoice, HostClip, TrainingChoice
from avid_pipeline.clips.settings import AugmentationSettings, ClipSettings
from avid_pipeline.errors import ConfigError, ManifestError, ShardError
from avid_pipeline.shards_spec.manifest import SpectrogramStatistics
from avid_pipeline.shards_spec.reader import open_dataset
from avid_pipeline.streams.plan import plan

GOLDEN = Path(__file__).parents[2] / "golden"
CLIP = ClipSettings(crop_size=32)
CHOICE = TrainingChoice(seed=0, epoch=0, augmentation=AugmentationSettings())


def load(root, batch_size=4, workers=2, choice=CHOICE, batches=None, **options):
    reader = open_dataset(root)
    if batches is None:
        epoch = plan(reader.manifest, seed=0, epoch=0, clips_per_instance=2, global_batch_size=batch_size)
        batches = [epoch.rank_batch(step, 0, 1) for step in range(epoch.num_batches)]
    return ClipLoader(reader, batches, CLIP, choice, workers=workers, **options)


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


def test_three_workers_give_the_batches_of_one(small_dataset):
    for one, three in zip(load(small_dataset, workers=1), load(small_dataset, workers=3), strict=True):
        assert one.keys() == three.keys() == {"video", "audio", "index", "visit", "label", "labels"}
        assert one["labels"] == three["labels"]
        for name in one.keys() - {"labels"}:
            assert torch.equal(one[name], three[name]), name


def test_a_loader_can_be_read_again_and_partly(small_dataset):
    loader = load(small_dataset)
    first = next(iter(loader))
    whole, again = list(loader), list(loader)
    assert len(whole) == len(again) == len(loader)
    for batch in (whole[0], again[0]):
        assert torch.equal(batch["video"], first["video"])
    # Batches that were delivered are not overwritten by those after them.
    assert not torch.equal(whole[0]["video"], whole[1]["video"])


def test_visits_and_epochs_differ(small_dataset):
    clips = by_visit(load(small_dataset))
    assert not torch.equal(clips[0, 0][0], clips[0, 1][0])
    later = TrainingChoice(seed=0, epoch=1, augmentation=AugmentationSettings())
    assert not torch.equal(by_visit(load(small_dataset, choice=later))[0, 0][0], clips[0, 0][0])


def test_the_last_smaller_batch_is_kept(small_dataset):
    batches = list(load(small_dataset, choice=EvaluationChoice(2), batches=evaluation_batches(10, 2, 6)))
    assert [len(batch["index"]) for batch in batches] == [6, 6, 6, 2]
    assert batches[-1]["video"].shape == (2, 3, 8, 32, 32)
    assert batches[-1]["audio"].shape == (2, 1, 200, 257)
    assert batches[-1]["index"].tolist() == [9, 9]
    assert batches[-1]["visit"].tolist() == [0, 1]


def test_ranks_divide_the_instances_evenly():
    for count, world_size in ((10, 3), (10, 10), (2, 4)):
        of_ranks = [evaluation_batches(count, 2, 3, rank, world_size) for rank in range(world_size)]
        instances = [{int(i) for batch in batches for i in batch.instances} for batches in of_ranks]
        assert sum(len(own) for own in instances) == len(set.union(*instances)) == count
        assert max(map(len, instances)) - min(map(len, instances)) <= 1


def test_evaluation_of_a_subset_keeps_its_indices():
    indices = np.array([3, 4, 8, 9, 12])
    batches = [batch for rank in range(2) for batch in evaluation_batches(indices, 2, 3, rank, 2)]
    seen = [(int(i), int(v)) for batch in batches for i, v in zip(batch.instances, batch.visits, strict=True)]
    assert sorted(seen) == [(index, visit) for index in indices for visit in range(2)]


@pytest.mark.parametrize("modality", ["video", "audio"])
def test_one_modality_alone(small_dataset, modality):
    clip = CLIP.model_copy(update={"modalities": (modality,)})
    batches = evaluation_batches(10, 2, 6)
    loaded = list(ClipLoader(open_dataset(small_dataset), batches, clip, EvaluationChoice(2)))
    assert all(({"video", "audio"} & batch.keys()) == {modality} for batch in loaded)
    both = list(ClipLoader(open_dataset(small_dataset), batches, CLIP, EvaluationChoice(2)))
    assert [batch[modality].shape for batch in loaded] == [batch[modality].shape for batch in both]


def test_no_batches_are_no_clips(small_dataset):
    assert list(load(small_dataset, batches=[])) == []


def native_threads():
    """Threads of this process, save those of obstore's pool, which the process shares and which start on demand."""
    gc.collect()
    names = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # it ended just now
            names.append(task.joinpath("comm").read_text().strip())
    return sum(not name.startswith("tokio") for name in names)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs /proc to count DALI's own threads")
def test_abandoned_loaders_do_not_pile_up_threads(small_dataset, tmp_path):
    root = damage(small_dataset, tmp_path)

    def leave_early():
        iterator = iter(load(small_dataset))
        next(iterator)
        iterator.close()

    def fail():
        with pytest.raises(ShardError):
            list(load(root))

    leave_early()
    fail()
    before = native_threads()
    for _ in range(3):
        leave_early()
        fail()
    end = time.monotonic() + 10
    while native_threads() > before and time.monotonic() < end:
        time.sleep(0.05)
    assert native_threads() <= before


def damage(dataset, folder):
    """A copy whose middle shard has a byte changed in every sample, so that any plan meets one."""
    root = shutil.copytree(dataset, folder / "damaged")
    data = bytearray((root / "shard-000001.tar").read_bytes())
    for place in range(2000, len(data) - 2000, 1500):
        data[place] ^= 1
    (root / "shard-000001.tar").write_bytes(bytes(data))
    return root


def test_other_statistics_change_the_sound_only(small_dataset):
    reader = open_dataset(small_dataset)
    own = reader.manifest.spectrogram_statistics
    other = SpectrogramStatistics(
        mean=tuple(mean + 10 for mean in own.mean), std=tuple(2 * std + 1e-5 for std in own.std), frames=1
    )
    batches = evaluation_batches(10, 1, 5)
    plain, changed = (
        next(iter(ClipLoader(reader, batches, CLIP, EvaluationChoice(1), statistics=given, workers=1)))
        for given in (None, other)
    )
    assert torch.equal(plain["video"], changed["video"])
    std = torch.tensor(own.std)
    assert torch.allclose(changed["audio"], (plain["audio"] - 10 / (std + 1e-5)) / 2, atol=1e-4)


def test_data_without_sound_say_so(small_dataset):
    reader = open_dataset(small_dataset)
    silent = reader.manifest.model_copy(update={"spectrogram_statistics": None})
    with pytest.raises(ManifestError, match="spectrogram_statistics"):
        ClipLoader(type(reader)(reader.storage, silent), [], CLIP, CHOICE)


def test_gpu_decoding_needs_a_rate_that_divides_the_stored_one(small_dataset):
    reader = open_dataset(small_dataset)
    assert frame_stride(reader.manifest, ClipSettings(fps=16)) == 1
    assert frame_stride(reader.manifest, ClipSettings(fps=8)) == 2
    for fps in (10, 32):
        with pytest.raises(ConfigError, match=r"clip\.fps"):
            frame_stride(reader.manifest, ClipSettings(fps=fps))
