import io
from dataclasses import replace

import numpy as np
import pytest

from avid_pipeline.clips.reading import EvaluationChoice, TrainingChoice, read_clip
from avid_pipeline.clips.settings import AugmentationSettings, ClipSettings
from avid_pipeline.clips.timing import draw_times
from avid_pipeline.errors import DecodeError, SampleError
from avid_pipeline.shards_spec.reader import open_dataset, read_spectrogram
from avid_pipeline.shards_spec.video import decode_frames

CLIP = ClipSettings(audio_seconds=0.8)
CHOICE = TrainingChoice(seed=3, epoch=2, augmentation=AugmentationSettings())


@pytest.fixture(scope="module")
def sample(small_dataset):
    return open_dataset(small_dataset).read(4)


def test_a_clip_is_its_part_of_the_stored_sample(sample):
    clip = read_clip(sample, 4, 7, CLIP, CHOICE, "here")
    times = draw_times(sample.record, CLIP, np.random.default_rng([3, 2, 4, 7]))
    everything = decode_frames(sample.video, 0, sample.record.video.frames, 16, "here")
    assert np.array_equal(clip.picture, everything[times.first_video_frame : times.first_video_frame + 8])
    sound = read_spectrogram(sample.spectrogram, "here")
    assert np.array_equal(clip.sound, sound[times.first_audio_frame : times.first_audio_frame + 80])
    assert (clip.index, clip.first_frame) == (4, times.first_video_frame)
    assert clip.label == sample.record.labels[0]


def test_a_later_decoder_gets_the_file_and_the_same_choices(sample):
    here, later = (read_clip(sample, 4, 7, CLIP, CHOICE, where) for where in ("here", "later"))
    assert later.picture.tobytes() == sample.video
    assert later.first_frame == here.first_frame
    assert later.augmentation.crop == here.augmentation.crop
    assert np.array_equal(later.augmentation.colour, here.augmentation.colour)
    assert np.array_equal(later.sound, here.sound)


def test_short_tracks_are_filled_up(sample):
    long_clip = ClipSettings(video_seconds=3.0, audio_seconds=4.0)
    clip = read_clip(sample, 4, 0, long_clip, CHOICE, "here")
    frames, stored = sample.record.video.frames, sample.record.audio.frames
    assert len(clip.picture) == 48 > frames
    assert (clip.picture[frames:] == clip.picture[frames - 1]).all(), "the last picture stands still"
    assert clip.sound.shape == (400, 257)
    assert stored < 400
    assert (clip.sound[stored:] == -100).all(), "silence"
    assert (clip.sound[:stored] > -100).any()


def test_unlabelled_and_several_labels(sample):
    for labels, expected in (((), -1), ((2, 0), 2)):
        other = replace(sample, record=sample.record.model_copy(update={"labels": labels}))
        assert read_clip(other, 0, 0, CLIP, EvaluationChoice(1), "here").label == expected


def test_evaluation_takes_no_chances(sample):
    first, again = (read_clip(sample, instance, 1, CLIP, EvaluationChoice(3), "here") for instance in (4, 5))
    assert np.array_equal(first.picture, again.picture)
    assert first.augmentation.volume_db == 0
    assert not first.augmentation.crop.flip


def test_what_cannot_be_read_names_the_sample(sample):
    key = sample.record.key
    with pytest.raises(DecodeError, match=f"{key}: expected picture and sound"):
        read_clip(replace(sample, video=None), 4, 0, CLIP, CHOICE, "here")
    with pytest.raises(DecodeError, match=key):
        read_clip(replace(sample, video=b"no video" * 100), 4, 0, CLIP, CHOICE, "here")
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((10, 100), np.uint8))
    with pytest.raises(SampleError, match=rf"{key}: spectrogram: .*found uint8 \[10, 100\]"):
        read_clip(replace(sample, spectrogram=buffer.getvalue()), 4, 0, CLIP, CHOICE, "here")
