"""Where the ``ffmpeg`` program is."""

import shutil

import imageio_ffmpeg

from avid_pipeline.preprocess.errors import PreprocessError

__all__ = ["find_ffmpeg"]


def find_ffmpeg() -> str:
    """Path of the ``ffmpeg`` program: the one on ``PATH``, else the one in the ``imageio-ffmpeg`` wheel.

    The wheel brings no ``ffprobe``; sources are probed with PyAV instead.

    Raises:
        PreprocessError: neither exists, or the environment variable ``IMAGEIO_FFMPEG_EXE`` names no program.
    """
    on_path = shutil.which("ffmpeg")
    if on_path is not None:
        return on_path
    try:
        packaged = imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError as error:
        raise PreprocessError(
            "no ffmpeg program: none on PATH, and the imageio-ffmpeg package has none for this platform; "
            "install ffmpeg (for example `apt-get install ffmpeg`) or set IMAGEIO_FFMPEG_EXE to its path"
        ) from error
    if shutil.which(packaged) is None:
        raise PreprocessError(
            f"no ffmpeg program: none on PATH, and {packaged!r} (from imageio-ffmpeg or IMAGEIO_FFMPEG_EXE) "
            "is not an executable file; correct or unset IMAGEIO_FFMPEG_EXE, or install ffmpeg"
        )
    return str(packaged)
