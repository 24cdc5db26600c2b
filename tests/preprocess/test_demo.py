import shutil

import av
import numpy as np
import pytest
from click.testing import CliRunner

from avid_pipeline.preprocess.cli import main
from avid_pipeline.preprocess.demo.causes import keyed_generator, sample_causes
from avid_pipeline.preprocess.demo.picture import render_frames
from avid_pipeline.preprocess.demo.sound import synthesize
from avid_pipeline.preprocess.demo.write import demo_names, write_demo
from avid_pipeline.preprocess.errors import PreprocessError
from avid_pipeline.preprocess.ffmpeg import find_ffmpeg


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    return out, write_demo(out, instances=6, seed=3, workers=1)


def test_layout_and_streams(demo):
    out, summary = demo
    assert (summary.train, summary.val) == (4, 2)
    files = sorted(str(path.relative_to(out)) for path in out.rglob("*.mp4"))
    assert files == sorted(demo_names(6, 3))
    assert [path.name for path in out.rglob("*.partial")] == []
    with av.open(str(out / files[0])) as container:
        assert sorted(stream.type for stream in container.streams) == ["audio", "video"]
        assert container.duration / av.time_base == pytest.approx(3.0, abs=0.1)


def test_same_seed_same_bytes_other_seed_others(demo, tmp_path):
    out, _ = demo
    write_demo(tmp_path, instances=6, seed=3, workers=2)
    for name in demo_names(6, 3):
        assert (tmp_path / name).read_bytes() == (out / name).read_bytes()
    assert not set(demo_names(6, 3)) & set(demo_names(6, 4))


def test_picture_and_sound_follow_the_causes():
    causes = sample_causes(0, 5)

    def picture(seed):
        return render_frames(causes, 0.4, keyed_generator(seed, 5, "picture"))

    assert np.array_equal(picture(0), picture(0))
    assert not np.array_equal(picture(0), picture(1))
    sound = synthesize(causes, 0.4, keyed_generator(0, 5, "sound"))
    assert len(sound) == round(0.4 * 44_100)
    assert 0.01 < np.abs(sound).max() <= 1


def test_given_again_it_keeps_files_and_refuses_other_parameters(demo):
    out, _ = demo
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.mp4")}
    write_demo(out, instances=6, seed=3, workers=1)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.mp4")} == times
    result = CliRunner().invoke(main, ["demo", str(out), "--instances", "6", "--seed", "4"])
    assert result.exit_code == 1
    assert "'seed': 3" in result.output


def test_ffmpeg_on_path_comes_first(tmp_path, monkeypatch):
    packaged = find_ffmpeg() if shutil.which("ffmpeg") is None else None
    program = tmp_path / "ffmpeg"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_ffmpeg() == str(program)
    program.unlink()
    monkeypatch.delenv("IMAGEIO_FFMPEG_EXE", raising=False)
    assert packaged is None or find_ffmpeg() == packaged
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "gone"))
    with pytest.raises(PreprocessError, match="IMAGEIO_FFMPEG_EXE"):
        find_ffmpeg()
