"""One file read into memory is to the byte the sample that avid-preprocess writes."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from avid_pipeline.preprocess.cli import main
from avid_pipeline.preprocess.errors import PreprocessError
from avid_pipeline.preprocess.single_file import Limits, read_media
from avid_pipeline.shards_spec.errors import AvidPipelineError, StorageError
from avid_pipeline.shards_spec.manifest import Parameters, VideoParameters
from avid_pipeline.shards_spec.reader import open_dataset
from avid_pipeline.shards_spec.storage import open_storage
from tests.conftest import make_video

SMALL = ("--short-side", "48", "--workers", "1")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Files with both, without sound, with sound only, and with odd names."""
    folder = tmp_path_factory.mktemp("files")
    make_video(folder / "both.mp4")
    make_video(folder / "silent.mp4", tone=None)
    shutil.copy(folder / "both.mp4", folder / "-a b.c.mp4")
    shutil.copy(folder / "both.mp4", os.fsdecode(os.fsencode(folder) + b"/caf\xe9.mp4"))
    return folder


@pytest.fixture(scope="module")
def sound_file(tmp_path_factory):
    return make_video(tmp_path_factory.mktemp("sounds") / "tone.mp4", picture=False)


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """Where temporary folders are made; nothing may be left in it."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert list(folder.iterdir()) == []


def converted(source, out, *options):
    done = CliRunner().invoke(main, ["folder", str(source), str(out), *SMALL, *options])
    assert done.exit_code == 0, done.output
    return open_dataset(out)


@pytest.mark.parametrize("options", [(), ("--spectrogram-dtype", "float16", "--codec", "vp9"), ("--codec", "copy")])
def test_the_sample_is_that_of_the_shards(files, tmp_path, options):
    reader = converted(files, tmp_path / "out", "--missing-audio", "keep", *options)
    by_name = {os.fsencode(path.name).decode("utf-8", "backslashreplace"): path for path in files.iterdir()}
    assert len(reader) == len(by_name) == 4
    for index in range(len(reader)):
        stored = reader.read(index)
        assert read_media(by_name[stored.record.source], reader.manifest.parameters) == stored
    assert {reader.read(index).spectrogram is None for index in range(len(reader))} == {True, False}


def test_the_parameters_are_those_of_the_command_without_options(tmp_path):
    video = make_video(tmp_path / "in" / "wide.mp4", size="320x280", seconds=0.6)
    done = CliRunner().invoke(main, ["folder", str(video.parent), str(tmp_path / "out"), "--workers", "1"])
    assert done.exit_code == 0, done.output
    reader = open_dataset(tmp_path / "out")
    assert reader.manifest.parameters == Parameters()
    assert read_media(str(video)) == reader.read(0)
    assert reader.read(0).record.video.height == 256


def test_one_modality(files, sound_file, tmp_path):
    only_sound = read_media(sound_file)
    assert only_sound.video is None
    assert only_sound.record.video is None
    assert only_sound == converted(sound_file.parent, tmp_path / "sounds", "--modalities", "audio").read(0)
    silent = read_media(files / "silent.mp4")
    assert silent.spectrogram is None
    assert silent.record.audio is None
    for modality in ("video", "audio"):
        shutil.rmtree(tmp_path / "in", ignore_errors=True)
        shutil.copytree(files, tmp_path / "in", ignore=shutil.ignore_patterns("silent*", "-*", "caf*"))
        reader = converted(tmp_path / "in", tmp_path / modality, "--modalities", modality)
        assert read_media(files / "both.mp4", reader.manifest.parameters, modalities=(modality,)) == reader.read(0)


def test_a_segment(files, tmp_path):
    shutil.copy(files / "both.mp4", tmp_path)
    (tmp_path / "list.csv").write_text("url,start,end\nboth.mp4,0.25,1.1\n")
    reader = converted(tmp_path / "list.csv", tmp_path / "out")
    sample = read_media(tmp_path / "both.mp4", reader.manifest.parameters, segment=(0.25, 1.1))
    assert sample == reader.read(0)
    assert sample.record.segment == (0.25, 1.1)


def test_from_an_object_store(files, make_bucket, tmp_path):
    bucket = make_bucket()
    copy = shutil.copy(files / "both.mp4", tmp_path)
    open_storage(bucket.url, options=bucket.options).upload(Path(copy), "some folder/both.mp4")
    url = f"{bucket.url}/some folder/both.mp4"
    assert read_media(url, options=bucket.options) == read_media(files / "both.mp4")
    with pytest.raises(PreprocessError, match=r"both\.mp4: cannot be used \(limit_exceeded\)"):
        read_media(url, options=bucket.options, limits=Limits(bytes=10))
    with pytest.raises(PreprocessError, match=r"nothing\.mp4: cannot be used \(source_not_found\).*check its name"):
        read_media(f"{bucket.url}/nothing.mp4", options=bucket.options)
    with pytest.raises(StorageError, match=rf"{bucket.url}: cannot open this root") as raised:
        read_media(url, options=bucket.options | {"no_such_option": "1"})
    assert "ffmpeg" not in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"\(source_not_found\): the file does not exist \(any more\); check its name"),
        (b"", r"\(empty_file\): the file has 0 bytes"),
        (b"this is no video\n" * 20, r"\(unreadable\): no media file.*see whether ffmpeg plays it"),
        (b"#EXTM3U\n#EXTINF:10,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n", r"\(unreadable\)"),
        (b"ffconcat version 1.0\nfile /etc/hostname\n", r"\(unreadable\)"),
    ],
)
def test_what_is_no_media_file(tmp_path, content, message):
    path = tmp_path / "file.mp4"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PreprocessError, match=rf"file\.mp4: cannot be used {message}"):
        read_media(path)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("silent.mp4", {"modalities": ("video", "audio")}, r"silent\.mp4.*no_audio_stream.*ask for its picture alone"),
        ("silent.mp4", {"modalities": ("audio",)}, r"silent\.mp4.*no_audio_stream"),
        ("both.mp4", {"modalities": ("sound",)}, r"both\.mp4: modalities: expected video, audio or both, found sound"),
        ("both.mp4", {"limits": Limits(frames=3)}, r"has 40 frames, the limit is 3; give limits=Limits\(…\)"),
        ("both.mp4", {"timeout": 1e-3}, r"\(timeout\).*more than 0\.001 s; give it more seconds with timeout="),
        ("both.mp4", {"segment": (7, 8)}, r"\(too_short\): the segment begins at 7 s, but the file ends at 1\.6"),
        ("both.mp4", {"segment": (1, 1)}, r"segment: expected \(start, end\).*found \(1, 1\)"),
        ("both.mp4", {"segment": (0, float("nan"))}, r"segment: expected"),
    ],
)
def test_arguments_that_do_not_fit(files, name, arguments, message):
    with pytest.raises(PreprocessError, match=message):
        read_media(files / name, **arguments)


def test_copied_streams_are_not_cut(files):
    copied = Parameters(video=VideoParameters(codec="copy"))
    with pytest.raises(PreprocessError, match=r"both\.mp4: segment: codec copy cannot cut"):
        read_media(files / "both.mp4", copied, segment=(0, 1))


def test_no_sound_only_where_picture_is_wanted(sound_file):
    with pytest.raises(PreprocessError, match=r"tone\.mp4.*no_video_stream.*ask for its sound alone"):
        read_media(sound_file, modalities=("video",))


@pytest.mark.parametrize("url", ["ftp://host/a.mp4", "s3://bucket", "https://host/a.mp4?token=1"])
def test_urls_that_cannot_be_read(url):
    with pytest.raises(AvidPipelineError, match="url: "):
        read_media(url)


def test_nothing_stays_after_an_interruption(files, temporary, monkeypatch):
    def interrupt(*arguments):
        assert len(list(temporary.iterdir())) == 1
        raise KeyboardInterrupt

    monkeypatch.setattr("avid_pipeline.preprocess.single_file.convert", interrupt)
    with pytest.raises(KeyboardInterrupt):
        read_media(files / "both.mp4")


def test_no_temporary_folder(files, temporary, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(temporary / "nothing"))
    with pytest.raises(StorageError, match=r"temporary/nothing: cannot write: No such file.*TMPDIR"):
        read_media(files / "both.mp4")
