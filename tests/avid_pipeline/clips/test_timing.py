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
