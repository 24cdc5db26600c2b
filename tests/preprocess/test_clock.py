"""Picture and sound stay on one clock: a flash and a beep at the same instant are so after conversion."""

import io

import av
import numpy as np
import pytest

from avid_pipeline.preprocess.sources.base import Segment
from avid_pipeline.shards_spec.reader import read_spectrogram
from avid_pipeline.shards_spec.video import decode_frames

# The flash and the beep last from 1.5 to 2.0 s, 3.5 to 4.0 s, ... on the clock of what is encoded.
CYCLE, BEGIN, END = 2.0, 1.5, 2.0
X264 = ("-c:v", "libx264", "-preset", "ultrafast", "-pix_fmt", "yuv420p", "-g", 25)
WITH_B_FRAMES = ("-c:v", "libx264", "-preset", "fast", "-bf", 3, "-pix_fmt", "yuv420p", "-g", 50)
VP9 = ("-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", 8, "-b:v", "200k")
AAC = ("-c:a", "aac", "-b:a", "96k")
OPUS = ("-c:a", "libopus")


def picture(first=0.0, last=4.6, fps=50, size="64x48"):
    """Input options for black pictures with white flashes; its own clock begins at ``first``."""
    on = f"gte(mod(t+{first},{CYCLE}),{BEGIN})"
    graph = f"color=black:size={size}:rate={fps}:duration={last - first},drawbox=color=white:t=fill:enable='{on}'"
    return ["-itsoffset", first, "-f", "lavfi", "-i", graph]


def sound(first=0.0, last=4.6, rate=44100, channels=1):
    """Input options for silence with beeps."""
    beep = f"if(gte(mod(t+{first},{CYCLE}),{BEGIN}),0.5*sin(5000*t),0)"
    graph = f"aevalsrc='{'|'.join([beep] * channels)}':d={last - first}:s={rate}"
    return ["-itsoffset", first, "-f", "lavfi", "-i", graph]


def edges(levels, threshold, rate, start):
    """Instants at which a level rises above the threshold, and at which it falls below it."""
    high = levels > threshold
    rises = np.flatnonzero(~high[:-1] & high[1:]) + 1
    falls = np.flatnonzero(high[:-1] & ~high[1:]) + 1
    return start + rises / rate, start + falls / rate


def instants(converted):
    """Of the stored sample: (rises, falls) of the flash, and of the beep, on the sample's clock."""
    record = converted.record
    data = converted.files["mp4"].read_bytes()
    with av.open(io.BytesIO(data)) as container:
        assert container.streams.video[0].start_time == 0
    frames = decode_frames(data, 0, record.video.frames, record.video.fps, "test")
    levels = read_spectrogram(converted.files["spectrogram.npy"].read_bytes(), "test")[:, 5:40].max(axis=1)
    flash = edges(frames.mean(axis=(1, 2, 3)), 120, record.video.fps, record.video.start)
    beep = edges(levels, levels.max() - 6, record.audio.frames_per_second, record.audio.start)
    both_run = max(record.video.start, record.audio.start) + 1 / 8
    return [[times[times > both_run] for times in stream] for stream in (flash, beep)]


def assert_on_one_clock(converted, events=2, at=None, within=1 / 24):
    """Both ends of every flash and beep agree; ``at`` is where the first one begins on the sample's clock.

    A stored frame shows the source's nearest one, so that alone may put an edge 1/32 s away.
    """
    (flash_on, flash_off), (beep_on, beep_off) = instants(converted)
    assert len(flash_on) == len(beep_on) == events
    np.testing.assert_allclose(flash_on, beep_on, atol=within)
    both = min(len(flash_off), len(beep_off))
    assert both >= events - 1
    np.testing.assert_allclose(flash_off[:both], beep_off[:both], atol=within)
    if at is not None:
        np.testing.assert_allclose(flash_on[0], at, atol=within)


PLAIN = {
    "mp4 with aac": (picture() + sound(), [*X264, *AAC], "a.mp4"),
    "mp4 whose sound is late": (picture() + sound(first=1.3), [*X264, *AAC], "a.mp4"),
    "mp4 whose picture is late": (picture(first=0.7) + sound(), [*X264, *AAC], "a.mp4"),
    "mp4 whose sound ends early": (picture() + sound(last=4.1), [*X264, *AAC], "a.mp4"),
    "fragmented mp4": (picture() + sound(), [*X264, *AAC, "-movflags", "frag_keyframe+empty_moov"], "a.mp4"),
    "mov with 8 kHz u8": (picture() + sound(rate=8000), [*X264, "-c:a", "pcm_u8"], "a.mov"),
    "mkv with opus": (picture() + sound(rate=48000), [*X264, *OPUS], "a.mkv"),
    "mkv whose sound is late": (picture() + sound(first=1.3, rate=48000), [*X264, *OPUS], "a.mkv"),
    "mkv with vorbis": (picture() + sound(), [*X264, "-c:a", "libvorbis"], "a.mkv"),
    "webm": (picture() + sound(rate=48000), [*VP9, *OPUS], "a.webm"),
    "streamed webm": (picture() + sound(rate=48000), [*VP9, *OPUS, "-f", "webm", "-live", 1], "a.webm"),
    "mpegts": (picture() + sound(), [*X264, *AAC], "a.ts"),
    "mpegts with b-frames": (picture() + sound(), [*WITH_B_FRAMES, *AAC], "a.ts"),
    "mpegts whose picture is late": (picture(first=0.7) + sound(), [*X264, *AAC], "a.ts"),
    "mpegts that starts far on": (picture() + sound(), [*X264, *AAC, "-output_ts_offset", 5000], "a.ts"),
    "mpeg with mp2": (picture() + sound(), ["-c:v", "mpeg2video", "-c:a", "mp2"], "a.mpg"),
    "avi with mp3": (picture() + sound(), ["-c:v", "mpeg4", "-c:a", "libmp3lame"], "a.avi"),
    "avi with h264 b-frames": (picture() + sound(), [*WITH_B_FRAMES, "-c:a", "pcm_s16le"], "a.avi"),
    "avi with mpeg4 b-frames": (picture() + sound(), ["-c:v", "mpeg4", "-bf", 2, "-c:a", "pcm_s16le"], "a.avi"),
    "flv": (picture() + sound(), [*X264, *AAC], "a.flv"),
    "wmv": (picture() + sound(), ["-c:v", "wmv2", "-c:a", "wmav2"], "a.wmv"),
    "ogg": (picture() + sound(), ["-c:v", "libtheora", "-c:a", "libvorbis"], "a.ogv"),
    "mp4 with b-frames": (picture() + sound(), [*WITH_B_FRAMES, *AAC], "a.mp4"),
    "mkv with b-frames": (picture() + sound(), [*WITH_B_FRAMES, *AAC], "a.mkv"),
    "mp4 with 5.1": (picture() + sound(channels=6), [*X264, *AAC, "-b:a", "200k"], "a.mp4"),
    "mp4 with mp3": (picture() + sound(), [*X264, "-c:a", "libmp3lame"], "a.mp4"),
    "mkv with flac": (picture() + sound(), [*X264, "-c:a", "flac"], "a.mkv"),
    "mkv with ac3": (picture() + sound(), [*X264, "-c:a", "ac3"], "a.mkv"),
    "29.97 frames": (picture(fps="30000/1001") + sound(), [*X264, *AAC], "a.mp4"),
    "hevc": (picture() + sound(), ["-c:v", "libx265", "-preset", "ultrafast", "-x265-params", "log-level=none:open-gop=1", *AAC], "a.mp4"),  # noqa: E501
}  # fmt: skip


@pytest.mark.parametrize("case", PLAIN)
def test_containers_and_codecs(case, ffmpeg, convert_file, tmp_path):
    inputs, codecs, name = PLAIN[case]
    ffmpeg(*inputs, *codecs, tmp_path / name)
    # Muxers for AVI and MPEG themselves begin the picture up to 2 frames late, and MP3 and WMA in them their sound.
    assert_on_one_clock(convert_file(tmp_path / name), at=1.5 if name[-3:] not in ("avi", "mpg") else None)


@pytest.fixture(scope="module")
def plain_mp4(ffmpeg, tmp_path_factory):
    path = tmp_path_factory.mktemp("plain") / "plain.mp4"
    ffmpeg(*picture(last=6.6), *sound(last=6.6), *WITH_B_FRAMES, *AAC, path)
    return path


@pytest.fixture(scope="module")
def plain_ts(plain_mp4, ffmpeg):
    path = plain_mp4.with_suffix(".ts")
    ffmpeg("-i", plain_mp4, "-c", "copy", path)
    return path


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_variable_frame_rate(name, ffmpeg, convert_file, tmp_path):
    uneven = "select='not(mod(n,3))+gt(mod(n,40),25)'"
    options = ["-vf", uneven, "-fps_mode", "vfr", *WITH_B_FRAMES, *AAC]
    ffmpeg(*picture(), *sound(), *options, tmp_path / name)
    # Its frames are up to 0.06 s apart, so the flash itself comes up to that much late.
    assert_on_one_clock(convert_file(tmp_path / name), at=1.5, within=1 / 16 + 1 / 32)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts", "a.flv"])
def test_picture_that_pauses_and_sound_with_a_gap(name, ffmpeg, convert_file, tmp_path):
    """No frames from 2.4 to 3.2 s, no samples from 0.5 to 1.1 s: timestamps jump."""
    picture_gap = ["-vf", "select='not(between(t,2.4,3.2))'", "-fps_mode", "vfr"]
    sound_gap = ["-af", "aselect='not(between(t,0.5,1.1))'"]
    codecs = [*X264, "-c:a", "libopus" if name == "a.mkv" else "aac"]
    ffmpeg(*picture(), *sound(rate=48000), *picture_gap, *sound_gap, *codecs, tmp_path / name)
    converted = convert_file(tmp_path / name)
    assert_on_one_clock(converted, at=1.5)
    assert converted.record.video.frames == pytest.approx(4.6 * 16, abs=1)
    assert converted.record.audio.frames == pytest.approx(460, abs=6)


@pytest.mark.parametrize("begin", [0.5, 1.3, 2.7])
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts"])
def test_cut_without_encoding_again(name, begin, plain_mp4, ffmpeg, convert_file, tmp_path):
    """In MP4 an edit list hides the pictures from the key frame before the cut on; elsewhere one stream starts late."""
    ffmpeg("-ss", begin, "-i", plain_mp4, "-c", "copy", tmp_path / name)
    converted = convert_file(tmp_path / name)
    assert_on_one_clock(converted, events=3 - (begin > 1.5))
    if name == "a.mp4":
        first = 1.5 if begin < 1.5 else 3.5
        assert instants(converted)[0][0][0] == pytest.approx(first - begin, abs=0.06)


@pytest.mark.parametrize("part", [0.1, 0.2, 0.3])
@pytest.mark.parametrize("keyed", ["b-frames", "intra refresh"])
def test_transport_stream_that_begins_in_the_middle(keyed, part, plain_ts, ffmpeg, convert_file, tmp_path):
    """Its first pictures cannot be decoded."""
    if keyed == "intra refresh":
        refresh = [*X264, "-x264-params", "intra-refresh=1:scenecut=0", *AAC]
        ffmpeg(*picture(last=6.6), *sound(last=6.6), *refresh, tmp_path / "whole.ts")
        plain_ts = tmp_path / "whole.ts"
    data = plain_ts.read_bytes()
    path = tmp_path / "part.ts"
    path.write_bytes(data[188 * int(part * len(data) / 188) :])
    (flash, _), (beep, _) = instants(convert_file(path))
    common = min(len(flash), len(beep))
    assert common >= 2
    np.testing.assert_allclose(flash[-common:], beep[-common:], atol=1 / 24)


@pytest.mark.parametrize("name", ["a.mkv", "a.ts", "a.mp4"])
def test_clock_that_does_not_begin_at_zero(name, plain_mp4, ffmpeg, convert_file, tmp_path):
    ffmpeg("-copyts", "-i", plain_mp4, "-c", "copy", "-output_ts_offset", 77.7, tmp_path / name)
    assert_on_one_clock(convert_file(tmp_path / name), events=3, at=1.5)


@pytest.mark.parametrize("late", [0.02, 0.05, 0.08])
def test_segment_whose_sound_begins_a_little_late(late, ffmpeg, convert_file, tmp_path):
    ffmpeg(*picture(), *sound(first=late), *X264, "-c:a", "pcm_s16le", tmp_path / "a.mkv")
    assert_on_one_clock(convert_file(tmp_path / "a.mkv", segment=Segment(0, 4.2)), at=1.5)


@pytest.mark.parametrize("begin", [0.0, 0.8, 1.25, 2.6])
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts", "a.avi", "a.flv", "late.mp4", "late.mkv", "picture.ts"])
def test_segments(name, begin, ffmpeg, convert_file, tmp_path):
    """Instants are relative to the segment's start, whether its streams begin before or after it."""
    late_sound, late_picture = 1.1 * name.startswith("late"), 0.9 * name.startswith("picture")
    codecs = ["-c:v", "mpeg4", "-g", 50, "-c:a", "ac3"] if name == "a.avi" else [*WITH_B_FRAMES, *AAC]
    ffmpeg(*picture(late_picture, 6.6), *sound(late_sound, 6.6), *codecs, tmp_path / name)
    converted = convert_file(tmp_path / name, segment=Segment(begin, begin + 3.1))
    first = 1.5 if begin < 1.5 - 1 / 8 else 3.5
    (flash, _), (beep, _) = instants(converted)
    events = np.arange(first, begin + 3.0, CYCLE) - begin
    # In MPEG-TS and FLV the file begins with what the AAC encoder puts before the sound (23 ms).
    np.testing.assert_allclose(flash[: len(beep)], beep[: len(flash)], atol=1 / 24)
    np.testing.assert_allclose(flash[: len(events)], events, atol=1 / 24 + 0.03)
    record = converted.record
    assert (record.video.start, record.audio.start) == (0, 0)
    assert record.video.frames == pytest.approx(3.1 * 16, abs=1)
    assert record.audio.frames == pytest.approx(310, abs=1)
