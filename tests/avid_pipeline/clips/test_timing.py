from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from avid_pipeline.clips.settings import ClipSettings
from avid_pipeline.clips.timing import draw_times, spread_times
from avid_pipeline.shards_spec.sample import AudioRecord, OriginalRecord, SampleRecord, VideoRecord

FPS, RATE = 16, 100


def record_of(video_frames=160, audio_frames=1000, video_start=0.0, audio_start=0.0):
    """A sample's record; None for the frames of a track that it lacks."""
    return SampleRecord(
        key="k",
        id="k",
        source="k.mp4",
        source_sha256="0" * 64,
        labels=(),
        duration=20,
        video=VideoRecord(frames=video_frames, fps=FPS, width=64, height=48, start=video_start)
        if video_frames
        else None,
        audio=AudioRecord(frames=audio_frames, frames_per_second=RATE, start=audio_start) if audio_frames else None,
        original=OriginalRecord(),
    )


def drawn_frames(record, settings, count=2000, seed=1):
    """Drawn first frames: ``(video, audio)``, int [count] each."""
    generator = np.random.default_rng(seed)
    drawn = [draw_times(record, settings, generator) for _ in range(count)]
    return (
        np.array([times.first_video_frame for times in drawn]),
        np.array([times.first_audio_frame for times in drawn]),
    )


def starts(record, settings, count=2000):
    """Drawn starts on the sample's clock, in seconds: ``(video, audio)``."""
    video, audio = drawn_frames(record, settings, count)
    return video / settings.fps + record.video.start, audio / RATE + record.audio.start


def is_uniform(values, low, high):
    """Whether whole numbers are as a fair die would throw them: chi square, one in 100,000 beyond."""
    counts = np.bincount(values - low, minlength=high - low + 1)
    expected = len(values) / (high - low + 1)
    assert expected >= 10, "too few draws for this test"
    freedom = high - low
    statistic = ((counts - expected) ** 2 / expected).sum()
    # Wilson and Hilferty's approximation of the quantile.
    quantile = freedom * (1 - 2 / (9 * freedom) + 4.265 * np.sqrt(2 / (9 * freedom))) ** 3
    return len(counts) == high - low + 1 and statistic < quantile


TRACKS = {
    "video_frames": st.integers(1, 200),
    "audio_frames": st.integers(1, 1200),
    "video_start": st.floats(-1, 3),
    "audio_start": st.floats(-1, 3),
}


@given(
    **TRACKS,
    video_seconds=st.sampled_from([0.5, 2.0, 4.0]),
    offset=st.sampled_from([0.0, 0.5, 3.0]),
    seed=st.integers(0, 100),
)
def test_clips_lie_in_their_tracks(video_frames, audio_frames, video_start, audio_start, video_seconds, offset, seed):
    settings = ClipSettings(video_seconds=video_seconds, max_offset=offset)
    record = record_of(video_frames, audio_frames, video_start, audio_start)
    drawn = draw_times(record, settings, np.random.default_rng(seed))
    for times in (drawn, spread_times(record, settings, seed % 5, 5)):
        assert 0 <= times.first_video_frame <= max(0, video_frames - settings.num_frames)
        assert 0 <= times.first_audio_frame <= max(0, audio_frames - 200)


def fractions_apart(video, audio, record):
    """How many seconds the picture starts after the sound, without rounding."""
    shift = Fraction(record.video.start) - Fraction(record.audio.start)
    return Fraction(video, FPS) - Fraction(audio, RATE) + shift


@given(
    **TRACKS,
    video_seconds=st.sampled_from([0.5, 3.0]),
    offset=st.sampled_from([0.07, 0.5, 2.0]),
    seed=st.integers(0, 1000),
)
def test_offsets_are_kept_wherever_the_tracks_allow(
    video_frames, audio_frames, video_start, audio_start, video_seconds, offset, seed
):
    settings = ClipSettings(video_seconds=video_seconds, max_offset=offset)
    record = record_of(video_frames, audio_frames, video_start, audio_start)
    # How late the picture may start after the sound: the shorter within the longer, widened.
    late = sorted(
        (-offset, 2.0 - video_seconds + offset) if video_seconds < 2 else (2.0 - video_seconds - offset, offset)
    )
    video_room, audio_room = max(0, video_frames - settings.num_frames), max(0, audio_frames - 200)
    earliest, latest = fractions_apart(0, audio_room, record), fractions_apart(video_room, 0, record)
    times = draw_times(record, settings, np.random.default_rng(seed))
    found = fractions_apart(times.first_video_frame, times.first_audio_frame, record)
    if latest < late[0]:
        assert found == latest, "the last picture and the first sound are nearest to each other"
    elif earliest > late[1]:
        assert found == earliest
    else:
        assert late[0] - 1e-6 <= found <= late[1] + 1e-6


def test_starts_are_uniform_over_frames():
    video, audio = drawn_frames(record_of(audio_frames=None), ClipSettings(), 8000)
    assert is_uniform(video, 0, 152)
    assert not audio.any()
    video, audio = drawn_frames(record_of(video_frames=None, audio_frames=400), ClipSettings(), 8000)
    assert is_uniform(audio, 0, 200)
    assert not video.any()


def test_few_places_are_equally_likely():
    video, _ = drawn_frames(record_of(video_frames=10, audio_frames=None), ClipSettings(), 3000)
    assert is_uniform(video, 0, 2)


def test_both_are_uniform_where_they_may_be():
    video, audio = drawn_frames(record_of(), ClipSettings(), 30000)
    assert is_uniform(audio, 0, 800)
    # Given the sound's start, the picture's frames from half a second before it to half a second after its end.
    inner = (audio >= 50) & (audio <= 750)
    first = np.ceil((audio[inner] - 50) / RATE * FPS).astype(int)
    last = np.floor((audio[inner] + 200) / RATE * FPS).astype(int)
    place = (video[inner] - first) / (last - first + 1)
    assert is_uniform((10 * (place + np.random.default_rng(0).uniform(0, 1 / (last - first + 1)))).astype(int), 0, 9)
    assert (video[inner] - first).min() == 0
    assert (last - video[inner]).min() == 0


def test_sound_that_begins_late_is_met_on_the_common_clock():
    video, audio = starts(record_of(audio_frames=700, audio_start=3.0), ClipSettings(), 8000)
    assert (video - audio).min() >= -0.5
    assert (video - audio).max() <= 2.0
    assert video.min() == 2.5, "no picture from long before the sound begins"
    assert is_uniform(np.rint((audio - 3.0) * RATE).astype(int), 0, 500)


def test_a_picture_that_begins_late_is_met_on_the_common_clock():
    video, audio = starts(record_of(video_frames=80, video_start=5.0), ClipSettings(), 8000)
    assert (video - audio).min() >= -0.5
    assert (video - audio).max() <= 2.0
    assert video.min() == 5.0
    assert is_uniform(np.rint(audio * RATE).astype(int), 300, 800)


def test_a_picture_longer_than_the_sound_holds_it():
    settings = ClipSettings(video_seconds=4.0, audio_seconds=1.0, max_offset=0.25)
    video, audio = starts(record_of(), settings, 5000)
    assert (audio - video).min() == pytest.approx(-0.25)
    assert (audio - video).max() == pytest.approx(3.25)
    assert is_uniform(np.rint(video * FPS).astype(int), 0, 96)


def test_no_offset_keeps_the_picture_inside_the_sound():
    video, audio = starts(record_of(), ClipSettings(max_offset=0))
    assert (video - audio).min() >= -1e-9
    assert (video + 0.5 - audio - 2.0).max() <= 1e-9


def test_equally_long_and_no_offset_is_as_near_as_frames_allow():
    video, audio = starts(record_of(), ClipSettings(video_seconds=2.0, max_offset=0))
    assert np.abs(video - audio).max() <= 0.5 / RATE + 0.5 / FPS


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


@pytest.mark.parametrize("fps", [24, 8, 10, 15.984])
def test_another_grid_than_the_stored_one_ends_in_time(fps):
    settings = ClipSettings(fps=fps)
    video, _ = drawn_frames(record_of(), settings, 500)
    assert video.max() + settings.num_frames <= 10 * fps
    assert video.max() > 8.5 * fps
    assert spread_times(record_of(), settings, 9, 10).first_video_frame + settings.num_frames <= 10 * fps


@pytest.mark.parametrize("modality", ["video", "audio"])
def test_what_is_not_read_does_not_matter(modality):
    # Beside a sound of 3 s that begins at 7 s, most of the picture would never be seen.
    record = record_of(audio_frames=300, audio_start=7.0)
    alone = record_of(audio_frames=None) if modality == "video" else record_of(video_frames=None, audio_frames=300)
    settings = ClipSettings(modalities=(modality,))
    for found, expected in zip(drawn_frames(record, settings), drawn_frames(alone, ClipSettings()), strict=True):
        assert np.array_equal(found, expected)
    for number in range(4):
        assert spread_times(record, settings, number, 4) == spread_times(alone, ClipSettings(), number, 4)


def evaluation_frames(record, clips, settings=None):
    times = [spread_times(record, settings or ClipSettings(), number, clips) for number in range(clips)]
    return [each.first_video_frame for each in times], [each.first_audio_frame for each in times]


def test_evaluation_clips_are_spread_over_the_whole_sample():
    video, audio = evaluation_frames(record_of(), 10)
    assert video[0] == audio[0] == 0
    assert video[-1] + 8 == 160
    assert audio[-1] + 200 == 1000
    # The places that torchvision's UniformClipSampler and SlowFast's test views have: linspace over the starts.
    assert np.abs(np.array(video) - np.linspace(0, 152, 10)).max() <= 0.5
    assert np.abs(np.array(audio) - np.linspace(0, 800, 10)).max() <= 0.5


def test_a_single_evaluation_clip_is_the_middle():
    assert evaluation_frames(record_of(), 1) == ([76], [400])


@given(
    frames=st.integers(1, 300),
    extra=st.floats(-0.02, 0.02),
    clips=st.integers(1, 30),
    start=st.floats(0, 2),
)
def test_evaluation_pictures_lie_in_their_sound(frames, extra, clips, start):
    record = record_of(frames, max(1, round((frames / FPS + extra) * RATE)), start, start)
    for video, audio in zip(*evaluation_frames(record, clips), strict=True):
        begin, end = video / FPS, (video + 8) / FPS
        assert begin >= audio / RATE - 0.05
        assert end <= max(audio / RATE + 2.0, 0.5) + 0.05


@given(frames=st.integers(1, 300), clips=st.integers(1, 30))
def test_evaluation_clips_leave_no_gap_that_more_clips_would_fill(frames, clips):
    video, _ = evaluation_frames(record_of(frames, None), clips)
    steps = np.diff(video)
    assert (steps >= 0).all()
    assert clips == 1 or steps.max() - steps.min() <= 1
    assert clips == 1 or video[-1] - video[0] == max(0, frames - 8)


def test_short_samples_give_the_same_evaluation_clip_again():
    assert evaluation_frames(record_of(8, 200), 3) == ([0, 0, 0], [0, 0, 0])
