"""Embedding files as they are, compared with embedding them through shards."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from avid_pipeline.clips.settings import ClipSettings
from avid_pipeline.embedding import embed_dataset
from avid_pipeline.errors import CheckpointError, ConfigError, DecodeError, SampleError
from avid_pipeline.evaluate.embedder import Embedder
from avid_pipeline.models.published_statistics import published_statistics
from avid_pipeline.preprocess.cli import main as preprocess
from avid_pipeline.preprocess.single_file import read_media
from avid_pipeline.retrieval import retrieve
from avid_pipeline.shards_spec.manifest import AudioParameters, Parameters, SpectrogramStatistics
from avid_pipeline.shards_spec.reader import open_dataset
from tests.conftest import make_video
from tests.evaluate.saved_models import CLIP, save_published, save_run, save_weights, small_model

STATISTICS = SpectrogramStatistics(mean=(-30.0,) * 257, std=(20.0,) * 257, frames=3)
SMALL_CLIP = ClipSettings.model_validate(CLIP)
# Kernels may round differently in batches of other sizes.
ROUNDING = 1e-6


@pytest.fixture(scope="module")
def embedder():
    return Embedder(small_model(), SMALL_CLIP, STATISTICS, workers=1)


@pytest.fixture(scope="module")
def through_shards(embedder, small_dataset):
    reader = open_dataset(small_dataset)
    return embed_dataset(embedder.model, reader, SMALL_CLIP, clips_per_instance=3, statistics=STATISTICS, workers=1)


@pytest.fixture(scope="module")
def samples(small_dataset, kinetics_tree):
    """The files of the small data set, in its order."""
    reader = open_dataset(small_dataset)
    sources = [reader.read(index).record.source for index in range(len(reader))]
    return [read_media(kinetics_tree / source, reader.manifest.parameters) for source in sources]


def test_files_embed_as_through_shards(embedder, through_shards, samples, small_dataset):
    assert torch.equal(embedder.video(samples, clips=3), through_shards.video)
    assert torch.equal(embedder.sound(samples, clips=3), through_shards.audio)
    reader = open_dataset(small_dataset)
    stored = tuple(reader.read(index) for index in range(len(reader)))
    assert torch.equal(embedder.video(stored, clips=3), through_shards.video)
    # They differ among each other, so that equality says something.
    assert (through_shards.video[1:] - through_shards.video[:-1]).abs().amax(dim=1).min() > 10 * ROUNDING
    assert (through_shards.audio[1:] - through_shards.audio[:-1]).abs().amax(dim=1).min() > 10 * ROUNDING


def test_one_sample_some_none_and_other_batches(embedder, through_shards, samples):
    one = embedder.video(samples[4], clips=3)
    assert one.shape == (8,)
    assert one.dtype == torch.float32
    torch.testing.assert_close(one, through_shards.video[4], rtol=0, atol=ROUNDING)
    torch.testing.assert_close(embedder.sound(samples[4], clips=3), through_shards.audio[4], rtol=0, atol=ROUNDING)
    uneven = replace(embedder, batch_size=7, workers=2)
    torch.testing.assert_close(uneven.video(samples, clips=3), through_shards.video, rtol=0, atol=ROUNDING)
    assert embedder.sound([]).shape == (0, 8)


def test_the_best_sound_for_a_video(embedder, through_shards, samples):
    """Ranking by the vectors of files is ranking by those of shards."""
    videos, sounds = embedder.video(samples, clips=3), embedder.sound(samples, clips=3)
    expected = through_shards.video @ through_shards.audio.T
    assert torch.equal((videos @ sounds.T).argsort(dim=1), expected.argsort(dim=1))
    assert retrieve(videos, sounds) == retrieve(through_shards.video, through_shards.audio)
    assert (videos[2] @ sounds.T).argmax() == expected[2].argmax()


def test_the_model_and_the_generators_stay_as_they_were(samples):
    model = small_model()
    expected = Embedder(model, SMALL_CLIP, STATISTICS).video(samples[0], clips=2)
    model.train()
    model.audio_model.eval()
    modes = [module.training for module in model.modules()]
    state, numpy_state = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    vector = Embedder(model, SMALL_CLIP, STATISTICS).video(samples[0], clips=2)
    assert torch.equal(vector, expected)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)
    assert not vector.requires_grad
    (vector * torch.ones(8, requires_grad=True)).sum().backward()  # no tensor of inference mode comes out


def test_a_run_folder_brings_its_clips_and_statistics(tmp_path, samples, through_shards):
    name = save_run(tmp_path / "run", small_model(), STATISTICS)
    for checkpoint in (tmp_path / "run", str(tmp_path / "run" / name)):
        loaded = Embedder.load(checkpoint, device="cpu")
        assert (loaded.clip, loaded.statistics) == (SMALL_CLIP, STATISTICS)
        assert torch.equal(loaded.video(samples, clips=3), through_shards.video)
        assert torch.equal(loaded.sound(samples, clips=3), through_shards.audio)
    other = Embedder.load(tmp_path / "run", statistics=published_statistics())
    assert other.statistics == published_statistics()
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        Embedder.load(tmp_path / "nothing")


def test_a_published_file_has_the_settings_of_the_paper(tmp_path, samples):
    published = Embedder.load(save_published(tmp_path / "small.pth.tar", small_model()))
    assert (published.clip, published.statistics) == (ClipSettings(), published_statistics())
    assert published.video(samples[0], clips=1).shape == (8,)


def test_weights_alone_need_statistics_for_sound(tmp_path, samples):
    path = save_weights(tmp_path / "weights.safetensors", small_model())
    loaded = Embedder.load(path)
    assert loaded.video(samples[0], clips=1).shape == (8,)
    with pytest.raises(
        ConfigError, match=r"weights\.safetensors: does not say what sound is normalised with; give the"
    ):
        loaded.sound(samples[0])
    given = Embedder.load(path, statistics=STATISTICS)
    expected = Embedder(small_model(), ClipSettings(), STATISTICS).sound(samples[0])
    assert torch.equal(given.sound(samples[0]), expected)


def test_what_a_sample_lacks(embedder, tmp_path):
    silent = read_media(make_video(tmp_path / "silent.mp4", tone=None))
    tone = read_media(make_video(tmp_path / "tone.mp4", picture=False))
    assert embedder.video(silent, clips=1).shape == embedder.sound(tone, clips=1).shape == (8,)
    with pytest.raises(
        SampleError, match=r"silent\.mp4: has no sound to embed; give a file with sound, or its picture"
    ):
        embedder.sound([tone, silent])
    with pytest.raises(SampleError, match=r"tone\.mp4: has no picture to embed"):
        embedder.video(tone)


def test_what_is_no_sample(embedder, samples):
    for wrong, kind in (("dog.mp4", "str"), (Path("dog.mp4"), "PosixPath"), ([samples[0], "dog.mp4"], "str")):
        with pytest.raises(ConfigError, match=rf"expected a Sample or several, found {kind}; make one .*read_media"):
            embedder.video(wrong)
    with pytest.raises(ConfigError, match="clips: expected at least 1"):
        embedder.video(samples[0], clips=0)
    with pytest.raises(DecodeError, match=f"{samples[0].record.key}: video cannot be decoded"):
        embedder.video(replace(samples[0], video=b"no video"))
    with pytest.raises(SampleError, match=rf"{samples[0].record.key}: spectrogram is no \.npy"):
        embedder.sound(replace(samples[0], spectrogram=b"no array"))


@pytest.fixture(scope="module")
def real_file(real_clips):
    """One clip of Kinetics."""
    return min((real_clips / "kinetics400" / "val").glob("*/*.mp4"))


@pytest.mark.parametrize("storage", ["uint8", "float16"])
def test_a_real_clip_embeds_as_through_shards(real_file, tmp_path, storage):
    folder = tmp_path / "in" / real_file.parent.name
    folder.mkdir(parents=True)
    (folder / real_file.name).symlink_to(real_file)
    arguments = ["kinetics", str(tmp_path / "in"), str(tmp_path / "out"), "--workers", "1"]
    done = CliRunner().invoke(preprocess, [*arguments, "--spectrogram-dtype", storage])
    assert done.exit_code == 0, done.output
    reader = open_dataset(tmp_path / "out")
    assert reader.manifest.parameters == Parameters(audio=AudioParameters(storage=storage))
    model, clip = small_model(dim=128), ClipSettings(crop_size=64)
    expected = embed_dataset(model, reader, clip, statistics=published_statistics(), workers=1)
    embedder = Embedder(model, clip, published_statistics())
    sample = read_media(real_file, reader.manifest.parameters)
    stored = reader.read(0)
    assert (sample.video, sample.spectrogram) == (stored.video, stored.spectrogram)
    torch.testing.assert_close(embedder.video(sample), expected.video[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(embedder.sound(sample), expected.audio[0], rtol=0, atol=1e-5)


def test_how_spectrograms_are_stored_hardly_matters(real_file):
    """Unit vectors from uint8 and from float16: at most 0.006 apart over five networks and both clips when measured,
    where those of the two clips were 0.05 to 0.23 apart."""
    embedder = Embedder(small_model(dim=128), ClipSettings(), published_statistics())
    half = Parameters(audio=AudioParameters(storage="float16"))
    coarse, fine = (
        embedder.sound(read_media(real_file, parameters, modalities=("audio",))) for parameters in (None, half)
    )
    assert not torch.equal(coarse, fine)
    assert (coarse - fine).norm() < 0.01
