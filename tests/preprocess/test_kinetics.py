import io
import json
import os
import shutil
import subprocess
from pathlib import Path

import av
import pytest
from av.video.frame import PictureType
from click.testing import CliRunner

from avid_pipeline.preprocess.cli import main
from avid_pipeline.preprocess.ffmpeg import find_ffmpeg
from avid_pipeline.shards_spec.reader import open_dataset
from avid_pipeline.shards_spec.storage import open_storage
from avid_pipeline.shards_spec.validation import validate


def run(*arguments):
    return CliRunner().invoke(main, ["kinetics", *map(str, arguments)])


def contents(root):
    return {path.name: path.read_bytes() for path in root.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def troubled_tree(kinetics_tree, tmp_path_factory):
    """Two good videos with odd names among files that cannot become samples."""
    root = tmp_path_factory.mktemp("troubled")
    good = kinetics_tree / "class 0" / "video000000.mp4"
    folder = root / "it's a «class»"
    folder.mkdir()
    shutil.copy(good, folder / "-a b.c.mp4")
    shutil.copy(good, folder / "ünïcode 'quoted'.mp4")
    shutil.copy(good, root / "outside.mp4")
    (folder / "notes.txt").write_text("this is no video\n" * 20)
    (folder / "empty.mp4").touch()
    (folder / "cut.mp4").write_bytes(good.read_bytes()[:3000])
    (folder / "playlist.mp4").write_text("ffconcat version 1.0\nfile /etc/hostname\n")
    (folder / "hls.mp4").write_text("#EXTM3U\n#EXTINF:10,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n")
    for name, extra in (("silent.mp4", ["-an"]), ("sound only.mp4", ["-vn"])):
        command = [find_ffmpeg(), "-v", "error", "-i", good, *extra, "-c", "copy", "-y", folder / name]
        subprocess.run(command, check=True, timeout=120)
    return root


def test_troubled_tree(troubled_tree, tmp_path):
    result = run(troubled_tree, tmp_path / "out", "--short-side", "48")
    assert result.exit_code == 3, result.output
    assert "80.0% of the sources are in quarantine" in result.output
    lines = (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()
    reasons = {entry["source"].rsplit("/", 1)[-1]: entry["reason"] for entry in map(json.loads, lines)}
    assert reasons == {
        "outside.mp4": "no_class_folder",
        "notes.txt": "unreadable",
        "empty.mp4": "empty_file",
        "cut.mp4": "unreadable",
        "playlist.mp4": "unreadable",
        "hls.mp4": "unreadable",
        "silent.mp4": "no_audio_stream",
        "sound only.mp4": "no_video_stream",
    }
    assert all(json.loads(line)["detail"] for line in lines)
    reader = open_dataset(tmp_path / "out")
    assert {reader.read(i).record.id for i in range(len(reader))} == {"-a b.c", "ünïcode 'quoted'"}
    assert validate(open_storage(tmp_path / "out")).problems == []
    assert reader.manifest.quarantined == 8


def test_any_bytes_as_names_and_equal_names(kinetics_tree, tmp_path):
    """File names on Linux are bytes, and two files may differ in their ending alone."""
    folder = tmp_path / "tree" / "c"
    folder.mkdir(parents=True)
    good = kinetics_tree / "class 0" / "video000000.mp4"
    for name in (b"a.mp4", b"caf\xe9.mp4"):
        shutil.copy(good, os.fsdecode(os.fsencode(folder) + b"/" + name))
    (folder / "a.txt").write_text("no video")
    Path(os.fsdecode(os.fsencode(folder) + b"/leer\xe9.mp4")).touch()
    result = run(tmp_path / "tree", tmp_path / "out", "--max-quarantine-fraction", "0.5")
    assert result.exit_code == 0, result.output
    lines = (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["reason"] for line in lines) == ["empty_file", "unreadable"]
    assert len(open_dataset(tmp_path / "out")) == 2
    assert validate(open_storage(tmp_path / "out")).problems == []


def test_stored_video(small_dataset):
    sample = open_dataset(small_dataset).read(3)
    video = sample.record.video
    assert (video.width, video.height, video.fps) == (62, 48, 16)
    assert sample.video.index(b"moov") < sample.video.index(b"mdat")
    with av.open(io.BytesIO(sample.video)) as container:
        assert [stream.type for stream in container.streams] == ["video"]
        frames = list(container.decode(video=0))
    assert len(frames) == video.frames == round(1.6 * 16)
    assert [place for place, frame in enumerate(frames) if frame.key_frame] == [0, 8, 16, 24]
    assert {frame.pict_type for frame in frames} == {PictureType.I, PictureType.P}
    assert {frame.format.name for frame in frames} == {"yuv420p"}


def test_never_upscaled(kinetics_tree, tmp_path):
    assert run(kinetics_tree, tmp_path, "--codec", "mjpeg").exit_code == 0
    video = open_dataset(tmp_path).read(0).record.video
    assert (video.width, video.height) == (66, 50)


@pytest.mark.parametrize("codec", ["hevc", "vp9", "copy"])
def test_codecs(kinetics_tree, tmp_path, codec):
    from avid_pipeline.shards_spec.video import decode_frames

    tree = tmp_path / "tree" / "c"
    tree.mkdir(parents=True)
    shutil.copy(kinetics_tree / "class 0" / "video000000.mp4", tree)
    result = run(tmp_path / "tree", tmp_path / "out", "--codec", codec, "--spectrogram-dtype", "float16")
    assert result.exit_code == 0, result.output
    assert validate(open_storage(tmp_path / "out")).problems == []
    sample = open_dataset(tmp_path / "out").read(0)
    assert decode_frames(sample.video, 5, 8, 16, codec).shape == (8, 50, 66, 3)


def test_bytes_do_not_depend_on_workers_and_do_on_the_seed(kinetics_tree, small_dataset, tmp_path):
    options = ("--short-side", 48, "--samples-per-shard", 4)
    assert run(kinetics_tree, tmp_path / "two", *options, "--workers", 2).exit_code == 0
    assert contents(tmp_path / "two") == contents(small_dataset)
    assert run(kinetics_tree, tmp_path / "seed", *options, "--shuffle-seed", 1).exit_code == 0
    assert contents(tmp_path / "seed")["shard-000000.tar"] != contents(small_dataset)["shard-000000.tar"]


def test_other_parameters_are_refused_until_told(kinetics_tree, small_dataset, tmp_path):
    out = shutil.copytree(small_dataset, tmp_path / "out")
    result = run(kinetics_tree, out, "--short-side", 48, "--samples-per-shard", 4, "--fps", 10)
    assert result.exit_code == 1
    assert "parameters.video.fps was 16 and is now 10" in result.output
    assert contents(out) == contents(small_dataset)
    result = run(kinetics_tree, out, "--short-side", 48, "--samples-per-shard", 5, "--overwrite")
    assert result.exit_code == 0
    assert sorted(path.name for path in out.glob("*.tar")) == ["shard-000000.tar", "shard-000001.tar"]


@pytest.mark.parametrize(("source", "message"), [("nothing", "does not exist"), (".", "holds no files")])
def test_wrong_source_is_one_clear_error(tmp_path, source, message):
    result = run(tmp_path / source, tmp_path.parent / "never")
    assert result.exit_code == 1
    assert message in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize("out", [".", "shards/train"])
def test_shards_among_the_sources_are_refused(tmp_path, out):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "a.mp4").touch()
    result = run(tmp_path, tmp_path / out)
    assert result.exit_code == 2
    assert "give a folder outside of it" in result.output
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.mp4", "c"]


def test_a_folder_of_splits_names_the_split_to_give(tmp_path):
    (tmp_path / "train" / "c").mkdir(parents=True)
    (tmp_path / "train" / "c" / "a.mp4").touch()
    result = run(tmp_path, tmp_path.parent / "never")
    assert result.exit_code == 1
    assert str(tmp_path / "train") in result.output


def test_late_sound_keeps_its_clock(tmp_path):
    """The sound starts 0.4 s after the picture; the record says so and the beep is where the flash is."""
    folder = tmp_path / "tree" / "c"
    folder.mkdir(parents=True)
    command = [find_ffmpeg(), "-v", "error", "-f", "lavfi", "-i", "color=black:size=64x48:rate=25:duration=2"]
    command += [
        "-itsoffset",
        "0.4",
        "-f",
        "lavfi",
        "-i",
        "aevalsrc='if(between(t,0.6,0.7),sin(6000*t),0)':d=1.6:s=44100",
    ]
    command += ["-vf", "drawbox=color=white:t=fill:enable='between(t,1.0,1.1)'", "-c:v", "libx264", "-c:a", "aac"]
    subprocess.run([*command, str(folder / "late.mp4")], check=True, timeout=120)
    assert run(tmp_path / "tree", tmp_path / "out").exit_code == 0
    import numpy as np

    from avid_pipeline.shards_spec.reader import read_spectrogram
    from avid_pipeline.shards_spec.video import decode_frames

    sample = open_dataset(tmp_path / "out").read(0)
    record = sample.record
    assert record.audio.start - record.video.start == pytest.approx(0.4, abs=0.03)
    levels = decode_frames(sample.video, 0, record.video.frames, 16, "late").mean(axis=(1, 2, 3))
    loud = read_spectrogram(sample.spectrogram, "late").max(axis=1)
    flash = record.video.start + np.argmax(levels > 120) / 16
    beep = record.audio.start + np.argmax(loud > loud.max() - 20) / 100
    assert abs(flash - beep) < 1 / 16


def test_real_clips(real_clips, tmp_path):
    result = run(real_clips / "kinetics400" / "val", tmp_path)
    assert "2 samples" in result.output
    assert validate(open_storage(tmp_path)).problems == []
