"""Both places where ffmpeg may be, with the real program."""

import subprocess
from pathlib import Path

import av
import imageio_ffmpeg
import pytest

from avid_pipeline.preprocess.demo.write import demo_names, write_demo
from avid_pipeline.preprocess.ffmpeg import find_ffmpeg


@pytest.fixture
def wheel_binary(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.delenv("IMAGEIO_FFMPEG_EXE", raising=False)
    return imageio_ffmpeg.get_ffmpeg_exe()


@pytest.mark.parametrize("on_path", [True, False])
def test_the_program_that_is_found_writes_videos(
    on_path: bool, wheel_binary: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs))
    if on_path:
        (programs / "ffmpeg").symlink_to(wheel_binary)
    assert find_ffmpeg() == (str(programs / "ffmpeg") if on_path else wheel_binary)
    words = subprocess.run([find_ffmpeg(), "-version"], capture_output=True, check=True, timeout=120).stdout
    assert words.startswith(b"ffmpeg version")
    write_demo(tmp_path / "demo", instances=2, val_fraction=0.5, workers=1)
    for name in demo_names(2, 0, 0.5):
        with av.open(str(tmp_path / "demo" / name)) as container:
            assert container.streams.video[0].codec_context.name == "h264"
            assert container.streams.audio[0].codec_context.name == "aac"
