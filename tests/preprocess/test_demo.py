import os
import shutil

import av
import numpy as np
import pytest
from click.testing import CliRunner

from avid_pipeline.preprocess.cli import main
from avid_pipeline.preprocess.demo.causes import keyed_generator, sample_causes
from avid_pipeline.preprocess.demo.picture import FRAMES_PER_SECOND, render_frames
from avid_pipeline.preprocess.demo.sound import SAMPLES_PER_SECOND, synthesize
from avid_pipeline.preprocess.demo.write import SECONDS, demo_names, write_demo
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


def test_every_file_decodes_to_its_end(demo):
    out, _ = demo
    for name in demo_names(6, 3):
        with av.open(str(out / name)) as container:
            assert sum(1 for _ in container.decode(video=0)) == round(SECONDS * FRAMES_PER_SECOND)
        with av.open(str(out / name)) as container:
            assert container.streams.audio[0].rate == SAMPLES_PER_SECOND
            samples = sum(frame.samples for frame in container.decode(audio=0))
            assert samples / SAMPLES_PER_SECOND == pytest.approx(SECONDS, abs=0.1)


def test_a_failing_ffmpeg_is_reported_and_leaves_nothing_behind(tmp_path, monkeypatch):
    program = tmp_path / "programs" / "ffmpeg"
    program.parent.mkdir()
    # Writes half a file where it was told to, as a full disk would make it.
    program.write_text(
        "#!/bin/sh\n"
        'for out; do case "$out" in file:*.partial) echo half > "${out#file:}";; esac; done\n'
        "cat > /dev/null\n"
        "echo no space left >&2\n"
        "exit 1\n"
    )
    program.chmod(0o755)
    with monkeypatch.context() as changed:
        changed.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
        with pytest.raises(PreprocessError, match="no space left"):
            write_demo(tmp_path / "demo", instances=2, workers=1)
    assert [path.name for path in (tmp_path / "demo").rglob("*") if path.is_file()] == ["demo.json"]
    assert write_demo(tmp_path / "demo", instances=2, workers=1).train == 1


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
