import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from avid_pipeline.clips.settings import ClipSettings
from avid_pipeline.clips.timing import draw_times, spread_times
from avid_pipeline.shards_spec.sample import AudioRecord, OriginalRecord, SampleRecord, VideoRecord


def record_of(video_frames=160, audio_frames=1000, video_start=0.0, audio_start=0.0):
    return SampleRecord(
        key="k",
        id="k",
        source="k.mp4",
        source_sha256="0" * 64,
        labels=(),
        duration=20,
        video=VideoRecord(frames=video_frames, fps=16, width=64, height=48, start=video_start),
        audio=AudioRecord(frames=audio_frames, frames_per_second=100, start=audio_start),
        original=OriginalRecord(),
    )


@given(
    video_frames=st.integers(1, 200),
    audio_frames=st.integers(1, 1200),
    audio_start=st.floats(0, 3),
    video_seconds=st.sampled_from([0.5, 2.0, 4.0]),
    seed=st.integers(0, 100),
)
def test_clips_lie_in_their_tracks(video_frames, audio_frames, audio_start, video_seconds, seed):
    settings = ClipSettings(video_seconds=video_seconds)
    record = record_of(video_frames, audio_frames, audio_start=audio_start)
    drawn = draw_times(record, settings, np.random.default_rng(seed))
    for times in (drawn, spread_times(record, settings, seed % 5, 5)):
        assert 0 <= times.first_video_frame <= max(0, video_frames - settings.num_frames)
        assert 0 <= times.first_audio_frame <= max(0, audio_frames - 200)


def test_offset_and_coverage():
    settings, record, generator = ClipSettings(), record_of(), np.random.default_rng(0)
    drawn = [draw_times(record, settings, generator) for _ in range(4000)]
    video = np.array([times.first_video_frame for times in drawn]) / 16
    audio = np.array([times.first_audio_frame for times in drawn]) / 100
    late = video - audio
    tolerance = 1 / 16
    assert late.min() >= -0.5 - tolerance
    assert late.max() <= 2.0 + tolerance
    assert late.min() < -0.4
    assert late.max() > 1.9
    # The sound's start is uniform over [0, 8] s.
    counts, _ = np.histogram(audio, bins=8, range=(0, 8))
    assert counts.min() > 0.8 * 500


def test_evaluation_clips_are_spread_evenly():
    settings = ClipSettings()
    frames = [spread_times(record_of(), settings, number, 10).first_video_frame for number in range(10)]
    assert np.diff(frames) == pytest.approx(np.full(9, 16), abs=1)
    assert frames[0] == 4
    sound = [spread_times(record_of(), settings, number, 10).first_audio_frame for number in range(10)]
    assert sound[0] == 0
    assert sound[-1] == 800


def starts(record, settings, count=2000):
    generator = np.random.default_rng(1)
    drawn = [draw_times(record, settings, generator) for _ in range(count)]
    video = np.array([times.first_video_frame for times in drawn]) / settings.fps + record.video.start
    audio = np.array([times.first_audio_frame for times in drawn]) / 100 + record.audio.start
    return video, audio


HALF_A_FRAME = 0.5 / 16 + 0.5 / 100


def test_sound_that_begins_late_is_met_on_the_common_clock():
    video, audio = starts(record_of(audio_frames=700, audio_start=3.0), ClipSettings())
    assert (video - audio).min() >= -0.5 - HALF_A_FRAME
    assert (video - audio).max() <= 2.0 + HALF_A_FRAME
    assert audio.min() >= 3.0
    assert audio.max() <= 8.0
    assert video.min() >= 2.5 - HALF_A_FRAME, "no picture from long before the sound begins"
    counts, _ = np.histogram(audio, bins=5, range=(3, 8))
    assert counts.min() > 0.8 * 400


def test_a_picture_longer_than_the_sound_holds_it():
    settings = ClipSettings(video_seconds=4.0, audio_seconds=1.0, max_offset=0.25)
    video, audio = starts(record_of(), settings)
    assert (audio - video).min() >= -0.25 - HALF_A_FRAME
    assert (audio - video).max() <= 3.25 + HALF_A_FRAME
    assert (audio - video).min() < -0.1
    assert (audio - video).max() > 3.1
    counts, _ = np.histogram(video, bins=6, range=(0, 6))
    assert counts.min() > 0.8 * 333


def test_no_offset_keeps_the_picture_inside_the_sound():
    video, audio = starts(record_of(), ClipSettings(max_offset=0))
    assert (video - audio).min() >= -HALF_A_FRAME
    assert (video + 0.5 - audio - 2.0).max() <= HALF_A_FRAME


def test_tracks_shorter_than_their_clips_are_used_from_their_start():
    for record in (record_of(video_frames=5), record_of(audio_frames=90), record_of(5, 90)):
        video, audio = starts(record, ClipSettings(), count=50)
        if record.video.frames == 5:
            assert not video.any()
        if record.audio.frames == 90:
            assert not audio.any()


def test_tracks_that_never_meet_still_give_clips():
    video, audio = starts(record_of(video_frames=16, audio_frames=300, audio_start=9.0), ClipSettings(), count=50)
    # The ends nearest to each other: the end of the picture and the beginning of the sound.
    assert video == pytest.approx(np.full(50, 0.5))
    assert audio == pytest.approx(np.full(50, 9.0))


def test_a_finer_grid_than_the_stored_one_ends_in_time():
    settings = ClipSettings(fps=24)
    drawn = {draw_times(record_of(), settings, np.random.default_rng(seed)).first_video_frame for seed in range(500)}
    assert max(drawn) + settings.num_frames <= 10 * 24
    assert max(drawn) > 8.5 * 24


@given(offset=st.floats(0, 2), seed=st.integers(0, 1000), audio_start=st.floats(-1, 1), frames=st.integers(48, 200))
def test_offsets_are_kept_wherever_both_tracks_allow(offset, seed, audio_start, frames):
    record = record_of(frames, 1000, audio_start=audio_start)
    settings = ClipSettings(max_offset=offset)
    times = draw_times(record, settings, np.random.default_rng(seed))
    late = times.first_video_frame / 16 - times.first_audio_frame / 100 - audio_start
    assert -offset - HALF_A_FRAME <= late <= 1.5 + offset + HALF_A_FRAME
