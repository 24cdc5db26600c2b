"""Odd but valid files become samples of the right size and length."""

import io
import os
import shutil

import av
import pytest

from avid_pipeline.shards_spec.reader import read_spectrogram
from avid_pipeline.shards_spec.video import decode_frames

SECONDS = 1.5
X264 = ("-c:v", "libx264", "-preset", "ultrafast", "-pix_fmt", "yuv420p")
AAC = ("-c:a", "aac")


def picture(size="66x50", rate=25, seconds=SECONDS):
    return ["-f", "lavfi", "-i", f"testsrc2=size={size}:rate={rate}:duration={seconds}"]


def sound(rate=44100, seconds=SECONDS, channels=1):
    graph = f"sine=frequency=440:sample_rate={rate}:duration={seconds}"
    return ["-f", "lavfi", "-i", graph + (f",pan={channels}" if isinstance(channels, str) else "")]


def check(converted, size, seconds=SECONDS, sound_seconds=SECONDS):
    """The record tells the truth about the stored files, and both are as expected."""
    record = converted.record
    video, audio = record.video, record.audio
    assert (video.width, video.height) == size
    assert video.frames == pytest.approx(seconds * 16, abs=1)
    data = converted.files["mp4"].read_bytes()
    frames = decode_frames(data, 0, video.frames, 16, "test")
    assert frames.shape == (video.frames, video.height, video.width, 3)
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == 16
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert stream.sample_aspect_ratio in (None, 0, 1)
    spectrogram = read_spectrogram(converted.files["spectrogram.npy"].read_bytes(), "test")
    assert len(spectrogram) == audio.frames
    assert audio.frames == pytest.approx(sound_seconds * 100, abs=8)  # encoders add up to some frames of their own
    return frames, spectrogram


CASES = {
    "hevc": (picture(), ["-c:v", "libx265", "-preset", "ultrafast", "-x265-params", "log-level=none", *AAC], "a.mp4"),
    "hevc 10 bit": (picture(), ["-c:v", "libx265", "-preset", "ultrafast", "-x265-params", "log-level=none", "-pix_fmt", "yuv420p10le", *AAC], "a.mkv"),  # noqa: E501
    "h264 10 bit 4:4:4": (picture(), ["-c:v", "libx264", "-preset", "ultrafast", "-pix_fmt", "yuv444p10le", *AAC], "a.mp4"),  # noqa: E501
    "av1": (picture(), ["-c:v", "libaom-av1", "-usage", "realtime", "-cpu-used", 8, "-pix_fmt", "yuv420p", *AAC], "a.mp4"),  # noqa: E501
    "vp9": (picture(), ["-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", 8, "-c:a", "libopus"], "a.webm"),
    "vp8": (picture(), ["-c:v", "libvpx", "-deadline", "realtime", "-c:a", "libvorbis"], "a.webm"),
    "mpeg-4 in avi": (picture(), ["-c:v", "mpeg4", "-c:a", "libmp3lame"], "a.avi"),
    "motion jpeg": (picture(), ["-c:v", "mjpeg", "-c:a", "pcm_s16le"], "a.mov"),
    "rgb": (picture(), ["-c:v", "libx264rgb", "-preset", "ultrafast", *AAC], "a.mkv"),
    "grey": (picture(), ["-c:v", "ffv1", "-pix_fmt", "gray", "-c:a", "flac"], "a.mkv"),
    "interlaced": (picture("66x52"), ["-c:v", "libx264", "-flags", "+ilme+ildct", "-x264opts", "tff=1", "-pix_fmt", "yuv420p", *AAC], "a.mp4"),  # noqa: E501
    "prores": (picture(), ["-c:v", "prores", "-c:a", "pcm_s24le"], "a.mov"),
    "wmv": (picture(), ["-c:v", "wmv2", "-c:a", "wmav2"], "a.wmv"),
    "no duration": (picture(), ["-c:v", "libvpx", "-deadline", "realtime", "-c:a", "libopus", "-f", "webm", "-live", 1], "a.webm"),  # noqa: E501
    "fragmented": (picture(), [*X264, *AAC, "-movflags", "frag_keyframe+empty_moov"], "a.mp4"),
    "index behind": (picture(), [*X264, *AAC, "-movflags", "-faststart"], "a.mp4"),
    "120 frames a second": (picture(rate=120), [*X264, *AAC], "a.mp4"),
    "5 frames a second": (picture(rate=5, seconds=1.6), [*X264, *AAC], "a.mp4"),
    "metadata and chapters": (picture(), [*X264, *AAC, "-metadata", "title=a\nb;c=#\\", "-metadata", "comment=ü"], "a.mp4"),  # noqa: E501
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_codecs_and_containers(case, ffmpeg, convert_file, tmp_path):
    inputs, options, name = CASES[case]
    ffmpeg(*inputs, *sound(), *options, tmp_path / name)
    seconds = 1.6 if case == "5 frames a second" else SECONDS
    check(convert_file(tmp_path / name), (66, 52 if case == "interlaced" else 50), seconds)


SIZES = {  # source size, sample aspect ratio, stored size
    "portrait": ("50x66", "1", (50, 66)),
    "odd": ("67x51", "1", (66, 50)),
    "large": ("640x360", "1", (454, 256)),
    "large portrait": ("360x640", "1", (256, 454)),
    "tiny": ("16x16", "1", (16, 16)),
    "tiniest": ("2x2", "1", (2, 2)),
    "long strip": ("1000x4", "1", (1000, 4)),
    "wide pixels": ("72x58", "16/11", (104, 58)),
    "tall pixels": ("720x480", "8/9", (340, 256)),
}


@pytest.mark.parametrize("case", SIZES)
def test_sizes(case, ffmpeg, convert_file, tmp_path):
    size, ratio, stored = SIZES[case]
    options = ["-vf", f"setsar={ratio}", "-c:v", "ffv1", "-pix_fmt", "yuv444p", "-c:a", "flac"]
    ffmpeg(*picture(size), *sound(), *options, tmp_path / "a.mkv")
    check(convert_file(tmp_path / "a.mkv"), stored)


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_display_matrix(degrees, ffmpeg, convert_file, tmp_path):
    """A white corner at the top left, odd width, and a matrix that turns the picture."""
    corner = ["-vf", "drawbox=w=iw:h=ih:color=black:t=fill,drawbox=w=20:h=20:color=white:t=fill"]
    codec = ["-c:v", "libx264", "-preset", "ultrafast", "-pix_fmt", "yuv444p"]
    ffmpeg(*picture("77x51"), *sound(), *corner, *codec, *AAC, tmp_path / "plain.mp4")
    data = bytearray((tmp_path / "plain.mp4").read_bytes())
    one = 0x10000
    a, b, c, d = {0: (1, 0, 0, 1), 90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}[degrees]
    matrix = b"".join((x & 0xFFFFFFFF).to_bytes(4, "big") for x in (a * one, b * one, 0, c * one, d * one, 0, 0, 0))
    place = data.index(b"tkhd") + 4 + 40
    data[place : place + 32] = matrix
    (tmp_path / "a.mp4").write_bytes(data)
    frames, _ = check(convert_file(tmp_path / "a.mp4"), (76, 50) if degrees % 180 == 0 else (50, 76))
    first = frames[0].mean(axis=2)
    corners = {0: first[5, 5], 90: first[5, -6], 180: first[-6, -6], 270: first[-6, 5]}
    assert max(corners, key=corners.__getitem__) == degrees
    assert sum(level > 128 for level in corners.values()) == 1


def test_4k(ffmpeg, convert_file, tmp_path):
    ffmpeg(*picture("3840x2160", rate=10, seconds=0.2), *sound(seconds=0.2), *X264, *AAC, tmp_path / "a.mp4")
    check(convert_file(tmp_path / "a.mp4"), (454, 256), 0.2, 0.2)


def test_default_streams_are_chosen_and_covers_subtitles_and_data_are_not(ffmpeg, convert_file, tmp_path):
    (tmp_path / "a.srt").write_text("1\n00:00:00,000 --> 00:00:01,000\nhello\n")
    ffmpeg(*picture("66x50"), "-frames:v", 1, tmp_path / "cover.png")
    inputs = [*picture("32x32"), *picture("66x50"), *sound(8000, 0.3), *sound(), "-i", tmp_path / "a.srt"]
    maps = [option for number in range(5) for option in ("-map", number)]
    disposition = ["-disposition:v:0", 0, "-disposition:v:1", "default", "-disposition:a:0", 0]
    disposition += ["-disposition:a:1", "default"]
    ffmpeg(*inputs, *maps, *X264, *AAC, "-c:s", "srt", *disposition, "-attach", tmp_path / "a.srt", "-metadata:s:t",
           "mimetype=text/plain", tmp_path / "a.mkv")  # fmt: skip
    converted = convert_file(tmp_path / "a.mkv")
    check(converted, (66, 50))
    assert converted.record.original.audio_sample_rate == 44100


def test_cover_is_no_video(ffmpeg, convert_file, tmp_path):
    from avid_pipeline.preprocess.quarantine import SourceRejectedError

    ffmpeg(*picture("66x50"), "-frames:v", 1, tmp_path / "cover.png")
    ffmpeg(*sound(), "-i", tmp_path / "cover.png", "-map", 0, "-map", 1, *AAC, "-c:v", "copy", "-disposition:v",
           "attached_pic", tmp_path / "a.mp4")  # fmt: skip
    with pytest.raises(SourceRejectedError, match="no_video_stream"):
        convert_file(tmp_path / "a.mp4")


SOUNDS = {
    "8 kHz": (sound(8000), AAC, "a.mp4"),
    "u8": (sound(8000), ("-c:a", "pcm_u8"), "a.mov"),
    "96 kHz": (sound(96000), ("-c:a", "flac"), "a.mkv"),
    "float": (sound(), ("-c:a", "pcm_f64le"), "a.mkv"),
    "stereo": (sound(channels="stereo|c0=c0|c1=c0"), AAC, "a.mp4"),
    "5.1": (sound(channels="5.1|c2=c0"), AAC, "a.mp4"),
    "ac3 5.1": (sound(channels="5.1|c2=c0"), ("-c:a", "ac3"), "a.mkv"),
    "8 channels": (sound(channels="7.1|c0=c0|c1=c0"), ("-c:a", "flac"), "a.mkv"),
}


@pytest.mark.parametrize("case", SOUNDS)
def test_sounds(case, ffmpeg, convert_file, tmp_path):
    audio, codec, name = SOUNDS[case]
    ffmpeg(*picture(), *audio, *X264, *codec, tmp_path / name)
    _, spectrogram = check(convert_file(tmp_path / name), (66, 50))
    # The tone of 440 Hz is in frequency 9 (two bins of 23.4 Hz each).
    assert spectrogram[20:100].mean(axis=0).argmax() in (9, 10)


@pytest.mark.parametrize(("first", "last"), [(0.7, 1.5), (0.0, 0.4)])
def test_sound_that_is_late_or_short(first, last, ffmpeg, convert_file, tmp_path):
    late = ["-itsoffset", first, *sound(seconds=last - first)]
    ffmpeg(*picture(), *late, *X264, *AAC, tmp_path / "a.mp4")
    converted = convert_file(tmp_path / "a.mp4")
    check(converted, (66, 50), sound_seconds=last - first)
    assert converted.record.audio.start == pytest.approx(first, abs=0.03)


def test_size_that_changes_in_the_middle(ffmpeg, convert_file, tmp_path):
    """The stored size is that of the beginning."""
    for name, size in (("one.ts", "66x50"), ("two.ts", "128x96")):
        ffmpeg(*picture(size, seconds=1), *sound(seconds=1), *X264, *AAC, tmp_path / name)
    ffmpeg("-i", f"concat:{tmp_path}/one.ts|{tmp_path}/two.ts", "-c", "copy", tmp_path / "a.ts")
    check(convert_file(tmp_path / "a.ts"), (66, 50), 2, 2)


def test_full_range_becomes_limited(ffmpeg, convert_file, tmp_path):
    white = ["-f", "lavfi", "-i", "color=white:size=66x50:rate=25:duration=1.5"]
    ffmpeg(*white, *sound(), "-c:v", "mjpeg", "-pix_fmt", "yuvj420p", *AAC, tmp_path / "a.mkv")
    frames, _ = check(convert_file(tmp_path / "a.mkv"), (66, 50))
    assert frames.min() > 250


def test_sound_whose_channels_change_in_the_middle(ffmpeg, convert_file, tmp_path):
    for name, channels in (("one.ts", "stereo|c0=c0|c1=c0"), ("two.ts", "5.1|c2=c0")):
        options = [*picture(seconds=1), *sound(48000, seconds=1, channels=channels), *X264, "-c:a", "ac3"]
        ffmpeg(*options, tmp_path / name)
    ffmpeg("-i", f"concat:{tmp_path}/one.ts|{tmp_path}/two.ts", "-c", "copy", tmp_path / "a.ts")
    record = convert_file(tmp_path / "a.ts").record
    # ffmpeg builds its filters anew there, and may lose what is in them.
    assert record.audio.frames == pytest.approx(200, abs=30)
    assert record.video.frames == pytest.approx(32, abs=4)


def test_mkv_whose_sound_goes_on_after_the_picture(ffmpeg, convert_file, tmp_path):
    """Matroska states one duration for both."""
    ffmpeg(*picture(seconds=0.5), *sound(seconds=3), *X264, "-c:a", "flac", tmp_path / "a.mkv")
    check(convert_file(tmp_path / "a.mkv"), (66, 50), 0.5, 3)


NAMES = [
    "-i.mp4", "--.mp4", ".mp4", "..a.mp4", "a b.mp4", "it's \"quoted\".mp4", "ü 中文 🎬.mp4", "new\nline.mp4", "%03d.mp4",  # noqa: E501
    "100%.mp4", "a:b.mp4", "file:x.mp4", "concat:a|b.mp4", "http:x.mp4", "pipe:0.mp4", "a\\b.mp4", "$(touch x).mp4",
    "*.mp4", "[0:v];null.mp4", "avid-pipeline-source", "-", "no ending",
]  # fmt: skip


@pytest.fixture(scope="module")
def plain(ffmpeg, tmp_path_factory):
    path = tmp_path_factory.mktemp("plain") / "plain.mp4"
    ffmpeg(*picture(seconds=0.5), *sound(seconds=0.5), *X264, *AAC, path)
    return path


@pytest.mark.parametrize("name", NAMES)
def test_names(name, plain, convert_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(plain, tmp_path / name)
    check(convert_file(tmp_path / name), (66, 50), 0.5, 0.5)
    assert os.listdir(tmp_path) == [name]


def test_relative_paths_and_bytes_as_names(plain, convert_file, tmp_path, monkeypatch):
    from pathlib import Path

    monkeypatch.chdir(tmp_path)
    name = os.fsdecode(b"-\xe9.mp4")
    shutil.copy(plain, name)
    record = convert_file(Path(name)).record
    assert record.video.frames == 8
