"""Hostile and damaged files end in quarantine (or are sound samples), at a bounded cost, and reach nothing else."""

import os
import socket
import threading
import time
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from avid_pipeline.preprocess.quarantine import SourceRejectedError
from avid_pipeline.preprocess.settings import Limits, Settings
from avid_pipeline.preprocess.sources.base import Segment
from avid_pipeline.shards_spec.reader import read_spectrogram
from avid_pipeline.shards_spec.video import decode_frames

X264 = ("-c:v", "libx264", "-preset", "ultrafast", "-pix_fmt", "yuv420p")
AAC = ("-c:a", "aac")
PICTURE = ("-f", "lavfi", "-i", "testsrc2=size=64x48:rate=25:duration=2")
SOUND = ("-f", "lavfi", "-i", "sine=frequency=440:sample_rate=44100:duration=2")
CONTAINERS = {
    "a.mp4": [*X264, *AAC, "-movflags", "+faststart"],
    "behind.mp4": [*X264, *AAC],
    "a.mkv": [*X264, "-c:a", "libopus"],
    "a.avi": ["-c:v", "mpeg4", "-c:a", "libmp3lame"],
    "a.ts": [*X264, *AAC],
}


@pytest.fixture(scope="module")
def good(ffmpeg, tmp_path_factory):
    """Good files of 2 s, name to path."""
    folder = tmp_path_factory.mktemp("good")
    for name, options in CONTAINERS.items():
        ffmpeg(*PICTURE, *SOUND, *options, folder / name)
    return {name: folder / name for name in CONTAINERS}


@pytest.fixture
def server():
    """Port of a TCP server, and the list of connections that it saw."""
    seen = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve():
            while True:
                try:
                    connection, address = listener.accept()
                except OSError:
                    return
                seen.append(address)
                connection.close()

        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1], seen
        listener.shutdown(socket.SHUT_RDWR)


def children():
    """Process numbers of this process's children, but what Python keeps for other tests (its resource tracker)."""
    found = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    return [pid for pid in found if b"multiprocessing" not in Path(f"/proc/{pid}/cmdline").read_bytes()]


def rejection(convert_file, path, *arguments, **keywords):
    with pytest.raises(SourceRejectedError) as caught:
        convert_file(path, *arguments, **keywords)
    assert not children()
    return caught.value


def outcome_of(convert_file, path, *arguments, **keywords):
    """What the conversion gives, or why the file was rejected."""
    try:
        return convert_file(path, *arguments, **keywords)
    except SourceRejectedError as error:
        return error


REFERENCES = {
    "hls.mp4": "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{url}\n#EXT-X-ENDLIST\n",
    "hls.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{url}\n#EXT-X-ENDLIST\n",
    "concat.mp4": "ffconcat version 1.0\nfile '{url}'\n",
    "concat.ffconcat": "ffconcat version 1.0\nfile '{url}'\n",
    "dash.mp4": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
    'mediaPresentationDuration="PT2S" profiles="urn:mpeg:dash:profile:isoff-on-demand:2011"><Period><AdaptationSet>'
    '<Representation id="1" bandwidth="1" mimeType="video/mp4"><BaseURL>{url}</BaseURL></Representation>'
    "</AdaptationSet></Period></MPD>",
    "session.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video {port} RTP/AVP 96\n"
    "a=rtpmap:96 H264/90000\n",
    "reference.asf": "[Reference]\nRef1={url}\n",
    "reference.mov": "SMILtext<smil><body><video src='{url}'/></body></smil>",
    "picture.svg": '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><image href="{url}"/></svg>',
    "words.srt": "1\n00:00:00,000 --> 00:00:09,000\n{url}\n",
    "words.ass": "[Script Info]\n[Events]\nDialogue: 0,0:00:00.00,0:00:09.00,D,,0,0,0,,{url}\n",
    "words.txt": "{url} words and words\n" * 50,
    "words.mp4": "{url} words and words\n" * 50,
    "meta.mp4": ";FFMETADATA1\ntitle={url}\n",
    "frame%03d.png": "{url}",
    "list.mlt": "<mlt><producer><property name='resource'>{url}</property></producer></mlt>",
    "script.avs": 'FFmpegSource2("{url}")',
}


@pytest.mark.parametrize("to", ["network", "file"])
@pytest.mark.parametrize("name", REFERENCES)
def test_files_that_refer_to_others(name, to, good, server, convert_file, tmp_path):
    port, seen = server
    url = f"http://127.0.0.1:{port}/x.ts" if to == "network" else f"file://{good['a.ts']}"
    path = tmp_path / name
    path.write_text(REFERENCES[name].format(url=url, port=port))
    assert rejection(convert_file, path).reason == "unreadable"
    assert seen == []


def with_external_data(data, target):
    """An MP4 (index behind the data) whose tracks say that their data is in another file."""
    name = target.encode()
    alias = b"\0\0\0\x01" + bytes(10) + bytes([0]) + bytes(27) + bytes(12) + bytes([0]) + bytes(63) + bytes(16)
    alias += (0).to_bytes(2, "big") * 2 + bytes(16) + (2).to_bytes(2, "big") + len(name).to_bytes(2, "big") + name
    alias += bytes(len(name) % 2) + b"\xff\xff\0\0"
    entry = (len(alias) + 8).to_bytes(4, "big") + b"alis" + alias

    def rebuilt(box):
        kind, content = box[4:8], box[8:]
        if kind == b"dref":
            content = content[:8] + entry
        elif kind in (b"moov", b"trak", b"mdia", b"minf", b"dinf"):
            content = b"".join(map(rebuilt, boxes(content)))
        return (len(content) + 8).to_bytes(4, "big") + kind + content

    def boxes(content):
        while content:
            size = int.from_bytes(content[:4], "big")
            yield content[:size]
            content = content[size:]

    return b"".join(map(rebuilt, boxes(data)))


def test_movie_whose_data_is_in_another_file(good, convert_file, tmp_path):
    """It reads its own bytes at these places instead: of the secret, nothing is stored."""
    secret = good["behind.mp4"]
    data = bytearray(with_external_data(secret.read_bytes(), str(secret)))
    begin = data.index(b"mdat") + 4
    end = data.index(b"moov") - 4
    data[begin:end] = bytes(end - begin)
    path = tmp_path / "a.mov"
    path.write_bytes(data)
    with av.open(str(path), options={"enable_drefs": "1", "use_absolute_path": "1"}) as container:
        assert sum(1 for _ in container.decode(video=0)) == 50  # the attack works where it is allowed
    assert rejection(convert_file, path).reason == "decode_error"


@pytest.mark.parametrize("name", ["http://127.0.0.1:{port}/x.mp4", "concat:/etc/hostname|x", "data:video,x", "pipe:0"])
def test_names_that_are_urls(name, server, convert_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    port, seen = server
    assert rejection(convert_file, Path(name.format(port=port))).reason == "source_not_found"
    assert seen == []


@pytest.mark.parametrize("name", ["a.mp4", "a.txt", "a.m3u8", "a.jpg", "a"])
def test_content_counts_not_the_ending(name, good, convert_file, tmp_path):
    (tmp_path / name).write_bytes(good["a.mkv"].read_bytes())
    assert convert_file(tmp_path / name).record.video.frames == pytest.approx(32, abs=1)


def limited(**limits):
    return Settings(limits=Limits(**limits))


def test_limits(good, convert_file):
    for limits in ({"seconds": 1}, {"frames": 40}, {"pixels": 64 * 47}, {"bytes": 1000}):
        for name in good:
            error = rejection(convert_file, good[name], limited(**limits))
            if name == "a.avi" and "pixels" in limits:  # its size is told by its pictures, which are refused
                assert error.reason in ("no_video_stream", "limit_exceeded")
                continue
            assert error.reason == "limit_exceeded", (name, limits, error)
            assert f"--max-{next(iter(limits))}" in error.detail
    convert_file(good["a.mp4"], limited(seconds=2.2, frames=50, pixels=64 * 48))


def test_size_that_only_the_stream_tells(good, ffmpeg, convert_file, tmp_path):
    """Small pictures, then enormous ones: refused by the decoder, before they are decoded."""
    ffmpeg("-f", "lavfi", "-i", "color=size=1600x1200:rate=25:duration=2", *SOUND, *X264, *AAC, tmp_path / "two.ts")
    path = tmp_path / "a.ts"
    path.write_bytes(good["a.ts"].read_bytes() + (tmp_path / "two.ts").read_bytes())
    outcome = outcome_of(convert_file, path, limited(pixels=100_000))
    if isinstance(outcome, SourceRejectedError):
        assert outcome.reason in ("decode_error", "limit_exceeded")
    else:
        assert (outcome.record.video.width, outcome.record.video.height) == (64, 48)


def jump(seconds):
    """Filters that move all after the 20th frame by so many seconds."""
    return f"setpts='PTS+gt(N,20)*{seconds}/TB'"


@pytest.mark.parametrize("stated", [True, False])
@pytest.mark.parametrize("stream", ["video", "audio"])
def test_enormous_jump_of_timestamps(stream, stated, ffmpeg, convert_file, tmp_path):
    """A few frames that claim hours."""
    filters = ["-vf", jump(7200), "-fps_mode", "vfr"] if stream == "video" else ["-af", "a" + jump(7200)]
    container = [] if stated else ["-f", "matroska", "-live", 1]
    ffmpeg(*PICTURE, *SOUND, *filters, *X264, "-c:a", "flac", *container, tmp_path / "a.mkv")
    outcome = outcome_of(convert_file, tmp_path / "a.mkv", limited(seconds=20))
    if isinstance(outcome, SourceRejectedError):
        assert outcome.reason == "limit_exceeded"
    else:
        assert (stream, stated) == ("audio", False)  # the sound ends at the gap
        assert outcome.record.duration < 3
    assert not children()


def test_sound_that_is_no_number(ffmpeg, convert_file, tmp_path):
    samples = np.sin(np.arange(44100, dtype=np.float32) / 20)
    samples[22050] = np.nan
    (tmp_path / "raw").write_bytes(samples.tobytes())
    raw = ["-f", "f32le", "-ar", 44100, "-ac", 1, "-i", tmp_path / "raw"]
    ffmpeg(*PICTURE, *raw, *X264, "-c:a", "pcm_f32le", tmp_path / "a.mkv")
    assert rejection(convert_file, tmp_path / "a.mkv").reason == "decode_error"


def test_timeout_ends_ffmpeg(ffmpeg, convert_file, tmp_path):
    picture = ["-f", "lavfi", "-i", "testsrc2=size=640x480:rate=60:duration=20"]
    ffmpeg(*picture, "-c:v", "mpeg4", tmp_path / "a.mkv")
    begin = time.monotonic()
    error = rejection(convert_file, tmp_path / "a.mkv", Settings(modalities=("video",), timeout=0.3))
    assert error.reason == "timeout"
    assert "--timeout" in error.detail
    assert time.monotonic() - begin < 60


def test_many_streams(ffmpeg, convert_file, tmp_path):
    maps = [option for _ in range(300) for option in ("-map", 1)]
    ffmpeg(*PICTURE, *SOUND, "-map", 0, *maps, *X264, "-c:a", "pcm_u8", "-ar", 8000, tmp_path / "a.mkv")
    assert convert_file(tmp_path / "a.mkv").record.video.frames == pytest.approx(32, abs=1)


def check_or_rejected(convert_file, path, segment=None):
    """Quarantined, or a sample that can be decoded and is what its record says."""
    converted = outcome_of(convert_file, path, segment=segment)
    if isinstance(converted, SourceRejectedError):
        assert converted.detail
        return False
    record = converted.record
    frames = decode_frames(converted.files["mp4"].read_bytes(), 0, record.video.frames, 16, "damaged")
    assert frames.shape == (record.video.frames, record.video.height, record.video.width, 3)
    spectrogram = read_spectrogram(converted.files["spectrogram.npy"].read_bytes(), "damaged")
    assert len(spectrogram) == record.audio.frames
    return True


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.7, 0.8, 0.9])
@pytest.mark.parametrize("name", CONTAINERS)
def test_cut_off(name, share, good, convert_file, tmp_path):
    data = good[name].read_bytes()
    path = tmp_path / name
    path.write_bytes(data[: int(share * len(data))])
    became_sample = check_or_rejected(convert_file, path)
    if name in ("a.mp4", "behind.mp4") or share < 0.1:  # whose header says how much is missing
        assert not became_sample


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(sorted(CONTAINERS)),
    keep=st.floats(0, 1),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), max_size=30),
    segment=st.sampled_from([None, None, Segment(0.5, 1.5)]),
)
def test_any_damage(good, convert_file, tmp_path_factory, name, keep, flips, segment):
    data = bytearray(good[name].read_bytes())
    for place, change in flips:
        data[int(place * len(data))] ^= change
    path = tmp_path_factory.mktemp("damaged") / name
    path.write_bytes(data[: max(1, int(keep * len(data)))])
    check_or_rejected(convert_file, path, segment)
    assert not children()


def test_real_clips_are_sound_and_their_pieces_are_not(real_clips, convert_file, tmp_path):
    for path in sorted(real_clips.glob("**/*.mp4")):
        assert convert_file(path).record.duration == pytest.approx(10, abs=1)
        data = path.read_bytes()
        for share in (0.3, 0.6, 0.85):
            (tmp_path / "piece.mp4").write_bytes(data[: int(share * len(data))])
            rejection(convert_file, tmp_path / "piece.mp4")
    for path in sorted(real_clips.glob("**/*.avi")):
        convert_file(path, Settings(missing_audio="keep"))
