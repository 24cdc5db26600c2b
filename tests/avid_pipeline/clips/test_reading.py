import io
import re
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from avid_pipeline.clips.augmentation import CropBox, clip_generator, draw_augmentation
from avid_pipeline.clips.reading import EvaluationChoice, TrainingChoice, read_clip
from avid_pipeline.clips.settings import AugmentationSettings, ClipSettings, resolve_modalities
from avid_pipeline.clips.timing import draw_times
from avid_pipeline.errors import AvidPipelineError, DecodeError, ManifestError, SampleError
from avid_pipeline.preprocess.executors.local import LocalExecutor
from avid_pipeline.preprocess.ffmpeg import find_ffmpeg
from avid_pipeline.preprocess.job import run_job
from avid_pipeline.preprocess.settings import Settings
from avid_pipeline.preprocess.sources.folder import list_folder
from avid_pipeline.shards_spec.manifest import WITH_AUDIO, Parameters, VideoParameters
from avid_pipeline.shards_spec.reader import open_dataset, read_spectrogram
from avid_pipeline.shards_spec.sample import AudioRecord, OriginalRecord, Sample, SampleRecord
from avid_pipeline.shards_spec.video import decode_frames

CLIP = ClipSettings(audio_seconds=0.8)
CHOICE = TrainingChoice(seed=3, epoch=2, augmentation=AugmentationSettings())


@pytest.fixture(scope="module")
def sample(small_dataset):
    return open_dataset(small_dataset).read(4)


def convert(tree, root, modalities, missing_audio="quarantine"):
    settings = Settings(modalities=modalities, missing_audio=missing_audio)
    listing = list_folder(tree, modalities=modalities)
    parameters = Parameters(video=VideoParameters(short_side=48))
    run_job(listing, parameters, str(root), LocalExecutor(1), settings=settings)
    return open_dataset(root)


@pytest.fixture(scope="module")
def three_videos(kinetics_tree, tmp_path_factory):
    """Three videos, of which one has no sound."""
    tree = tmp_path_factory.mktemp("three")
    found = sorted(kinetics_tree.rglob("*.mp4"))[:3]
    for path in found[:2]:
        shutil.copy(path, tree)
    command = [find_ffmpeg(), "-v", "error", "-i", found[2], "-an", "-c", "copy", tree / found[2].name]
    subprocess.run(command, check=True, timeout=120)
    return tree


def test_a_clip_is_its_part_of_the_stored_sample(sample):
    clip = read_clip(sample, 4, 7, CLIP, CHOICE, "rgb")
    times = draw_times(sample.record, CLIP, np.random.default_rng([3, 2, 4, 7]))
    everything = decode_frames(sample.video, 0, sample.record.video.frames, 16, "test")
    assert np.array_equal(clip.picture, everything[times.first_video_frame : times.first_video_frame + 8])
    sound = read_spectrogram(sample.spectrogram, "test")
    assert np.array_equal(clip.sound, sound[times.first_audio_frame : times.first_audio_frame + 80])
    assert (clip.index, clip.first_frame) == (4, times.first_video_frame)
    assert clip.label == sample.record.labels[0]
    assert clip.labels == sample.record.labels
    assert clip.frames is None


def test_the_augmentation_follows_the_times(sample):
    generator = clip_generator(3, 2, 4, 7)
    draw_times(sample.record, CLIP, generator)
    video = sample.record.video
    expected = draw_augmentation(AugmentationSettings(), video.height, video.width, generator)
    clip = read_clip(sample, 4, 7, CLIP, CHOICE, "later")
    assert clip.augmentation.crop == expected.crop
    assert clip.augmentation.volume_db == expected.volume_db
    assert np.array_equal(clip.augmentation.colour, expected.colour)


def test_every_way_to_decode_is_the_same_clip(sample):
    rgb, frames, later = (read_clip(sample, 4, 7, CLIP, CHOICE, decode) for decode in ("rgb", "frames", "later"))
    for other in (frames, later):
        assert other.first_frame == rgb.first_frame
        assert other.augmentation.crop == rgb.augmentation.crop
        assert np.array_equal(other.augmentation.colour, rgb.augmentation.colour)
        assert np.array_equal(other.sound, rgb.sound)
    assert later.picture.tobytes() == sample.video
    assert later.frames is None
    assert frames.picture is None
    assert np.array_equal(np.stack([frame.to_ndarray(format="rgb24") for frame in frames.frames]), rgb.picture)


def test_what_outlives_picture_and_sound(sample):
    clip = read_clip(sample, 4, 7, CLIP, CHOICE, "frames")
    rest = clip.without_content()
    assert rest.picture is rest.sound is rest.frames is None
    assert (rest.index, rest.label, rest.labels) == (clip.index, clip.label, clip.labels)
    assert clip.frames is not None


def test_short_tracks_are_filled_up(sample):
    long_clip = ClipSettings(video_seconds=3.0, audio_seconds=4.0)
    clip = read_clip(sample, 4, 0, long_clip, CHOICE, "rgb")
    frames, stored = sample.record.video.frames, sample.record.audio.frames
    assert len(clip.picture) == 48 > frames
    assert (clip.picture[frames:] == clip.picture[frames - 1]).all(), "the last picture stands still"
    assert clip.sound.shape == (400, 257)
    assert stored < 400
    assert (clip.sound[stored:] == -100).all(), "silence"
    assert (clip.sound[:stored] > -100).any()
    coded = read_clip(sample, 4, 0, long_clip, CHOICE, "frames").frames
    assert len(coded) == 48
    assert all(frame is coded[frames - 1] for frame in coded[frames:]), "repeated, not decoded again"


def test_unlabelled_and_several_labels(sample):
    for labels, expected in (((), -1), ((2, 0), 2)):
        other = replace(sample, record=sample.record.model_copy(update={"labels": labels}))
        clip = read_clip(other, 0, 0, CLIP, EvaluationChoice(1), "later")
        assert (clip.label, clip.labels) == (expected, labels)


def test_evaluation_takes_no_chances(sample):
    first, again = (read_clip(sample, instance, 1, CLIP, EvaluationChoice(3), "rgb") for instance in (4, 5))
    assert np.array_equal(first.picture, again.picture)
    assert first.augmentation.volume_db == 0
    assert not first.augmentation.crop.flip


def test_the_last_evaluation_clip_ends_with_the_video(sample):
    clips = [read_clip(sample, 4, visit, CLIP, EvaluationChoice(3), "rgb") for visit in range(3)]
    everything = decode_frames(sample.video, 0, sample.record.video.frames, 16, "test")
    sound = read_spectrogram(sample.spectrogram, "test")
    assert np.array_equal(clips[0].picture, everything[:8])
    assert np.array_equal(clips[2].picture, everything[-8:])
    assert np.array_equal(clips[0].sound, sound[:80])
    assert np.array_equal(clips[2].sound, sound[-80:])


def test_a_data_set_of_pictures(three_videos, tmp_path):
    reader = convert(three_videos, tmp_path, ("video",))
    clip = resolve_modalities(CLIP, reader.manifest)
    assert clip.modalities == ("video",)
    for choice in (CHOICE, EvaluationChoice(2)):
        found = read_clip(reader.read(0), 0, 1, clip, choice, "rgb")
        assert found.sound is None
        assert found.picture.shape[0] == 8
        assert found.augmentation.crop.height > 0
    with pytest.raises(ManifestError, match="has no audio; "):
        read_clip(reader.read(0), 0, 1, ClipSettings(modalities=("video", "audio")), CHOICE, "rgb")


def test_a_data_set_of_sounds(kinetics_tree, tmp_path):
    tree = tmp_path / "sounds"
    tree.mkdir()
    shutil.copy(sorted(kinetics_tree.rglob("*.mp4"))[0], tree)
    reader = convert(tree, tmp_path / "out", ("audio",))
    clip = resolve_modalities(CLIP, reader.manifest)
    assert clip.modalities == ("audio",)
    nothing = CropBox(0, 0, 0, 0)
    for decode in ("rgb", "frames", "later"):
        for choice in (CHOICE, EvaluationChoice(2)):
            found = read_clip(reader.read(0), 0, 1, clip, choice, decode)
            assert found.picture is None
            assert found.frames is None
            assert found.sound.shape == (80, 257)
            assert found.augmentation.crop == nothing
    with pytest.raises(ManifestError, match="has no video; "):
        read_clip(reader.read(0), 0, 1, ClipSettings(modalities=("video",)), CHOICE, "rgb")


def test_a_data_set_with_and_without_sound(three_videos, tmp_path):
    reader = convert(three_videos, tmp_path, ("video", "audio"), missing_audio="keep")
    with_audio = set(reader.manifest.subset_indices(WITH_AUDIO).tolist())
    assert len(with_audio) == 2
    (silent,) = {0, 1, 2} - with_audio
    only_picture, both = (resolve_modalities(CLIP, reader.manifest, subset) for subset in (None, WITH_AUDIO))
    for index in range(3):
        assert read_clip(reader.read(index), index, 0, only_picture, CHOICE, "rgb").sound is None
        # Left open, it is what the sample has.
        assert (read_clip(reader.read(index), index, 0, CLIP, CHOICE, "rgb").sound is None) == (index == silent)
    for index in with_audio:
        assert read_clip(reader.read(index), index, 0, both, CHOICE, "rgb").sound is not None
    key = reader.read(silent).record.key
    with pytest.raises(
        ManifestError, match=f"{key}: expected video and audio, .* no audio; read the subset with-audio"
    ):
        read_clip(reader.read(silent), silent, 0, both, CHOICE, "rgb")


@pytest.mark.parametrize("modality", ["video", "audio"])
def test_one_modality_of_two(sample, modality):
    clip = read_clip(sample, 4, 0, ClipSettings(modalities=(modality,)), CHOICE, "rgb")
    assert (clip.picture is not None) == (modality == "video")
    assert (clip.sound is not None) == (modality == "audio")


def npy(array, **options):
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, **options)
    return buffer.getvalue()


def test_what_cannot_be_read_names_the_sample(sample):
    key = sample.record.key
    wanted = ClipSettings(modalities=("video", "audio"))
    with pytest.raises(ManifestError, match=f"{key}: expected video and audio, but this sample has no video"):
        read_clip(replace(sample, video=None), 4, 0, wanted, CHOICE, "rgb")
    for decode in ("rgb", "frames"):
        with pytest.raises(DecodeError, match=key):
            read_clip(replace(sample, video=b"no video" * 100), 4, 0, CLIP, CHOICE, decode)
    damaged = npy(np.zeros((10, 100), np.uint8))
    with pytest.raises(SampleError, match=rf"{key}: spectrogram: .*found uint8 \[10, 100\]"):
        read_clip(replace(sample, spectrogram=damaged), 4, 0, CLIP, CHOICE, "later")


@pytest.mark.parametrize("stored", ["uint8", "float16", "other version", "other order"])
def test_spectrograms_as_others_write_them(sample, stored):
    codes = np.random.default_rng(0).integers(0, 255, (sample.record.audio.frames, 257)).astype(np.uint8)
    data = {
        "uint8": npy(codes),
        "float16": npy(codes.astype(np.float16)),
        "other version": npy(codes, version=(2, 0)),
        "other order": npy(np.asfortranarray(codes)),
    }[stored]
    other = replace(sample, spectrogram=data)
    clip = read_clip(other, 4, 0, ClipSettings(modalities=("audio",), audio_seconds=0.3), CHOICE, "later")
    generator = clip_generator(3, 2, 4, 0)
    first = draw_times(sample.record, ClipSettings(modalities=("audio",), audio_seconds=0.3), generator)
    expected = read_spectrogram(data, "test")[first.first_audio_frame : first.first_audio_frame + 30]
    assert np.array_equal(clip.sound, expected)


def outcome(read):
    """What it gives, or its error without addresses in memory."""
    try:
        return read()
    except AvidPipelineError as error:
        return re.sub("0x[0-9a-f]+", "0x", str(error))


@given(place=st.integers(0, 140), byte=st.integers(0, 255), cut=st.integers(0, 400), stored=st.sampled_from("ef"))
def test_damaged_spectrograms_are_what_numpy_makes_of_them_or_an_error(place, byte, cut, stored):
    codes = np.random.default_rng(0).integers(0, 255, (12, 257)).astype(np.uint8 if stored == "e" else np.float16)
    whole = bytearray(npy(codes))
    whole[place] = byte
    data = bytes(whole[: len(whole) - cut])
    audio = AudioRecord(frames=12, frames_per_second=100, start=0)
    record = SampleRecord(
        key="k",
        id="k",
        source="k",
        source_sha256="0" * 64,
        labels=(),
        duration=1,
        video=None,
        audio=audio,
        original=OriginalRecord(),
    )
    settings = ClipSettings(audio_seconds=0.15)
    sample = Sample(record, None, data)
    expected, found = (
        outcome(read)
        for read in (
            lambda: read_spectrogram(data, "k"),
            lambda: read_clip(sample, 0, 0, settings, CHOICE, "later").sound,
        )
    )
    if isinstance(expected, str):
        assert found == expected
    else:
        heard = min(15, len(expected))
        assert found.shape == (15, 257)
        np.testing.assert_array_equal(found[:heard], expected[:heard])
        assert (found[heard:] == -100).all()
