"""Peak memory of converting one two-hour 1080p video, ffmpeg included, against the floor of 600 MB per worker.

The video is made here: a minute of 1080p H.264 with AAC sound, repeated without encoding it again. The conversion
runs in a process of its own, and all processes below that one are watched. Decoding two hours takes some CPU-minutes;
``--hours 0.1`` gives nearly the same figure.
"""

import multiprocessing
import subprocess
import tempfile
import time
from pathlib import Path

import click

from avid_pipeline.preprocess.convert import PlannedSource, convert
from avid_pipeline.preprocess.fetch import Fetcher
from avid_pipeline.preprocess.ffmpeg import find_ffmpeg
from avid_pipeline.preprocess.settings import Settings
from avid_pipeline.preprocess.sources.base import Source
from avid_pipeline.shards_spec.manifest import Parameters

FLOOR_MB = 600
SECONDS_BETWEEN_LOOKS = 0.2


def make_video(path: Path, hours: float) -> None:
    """Write an MP4 of 1920x1080, 25 frames a second, 5 s of moving test picture and 55 s of still, over and over."""
    run = [find_ffmpeg(), "-hide_banner", "-loglevel", "error", "-nostdin", "-y"]
    minute = path.with_name("minute.mp4")
    picture = ["-f", "lavfi", "-i", "testsrc=size=1920x1080:rate=25:duration=5", "-vf", "loop=-1:125"]
    sound = ["-f", "lavfi", "-i", "sine=duration=60:sample_rate=48000"]
    codecs = ["-c:v", "libx264", "-preset", "veryfast", "-pix_fmt", "yuv420p", "-c:a", "aac"]
    subprocess.run([*run, *picture[:4], *sound, *picture[4:], "-t", "60", *codecs, f"file:{minute}"], check=True)
    repeat = ["-stream_loop", str(round(hours * 60) - 1), "-i", f"file:{minute}", "-c", "copy"]
    subprocess.run([*run, *repeat, f"file:{path}"], check=True)


def convert_one(path: Path, folder: Path) -> None:
    """What a worker does for one source."""
    settings = Settings()
    planned = PlannedSource(Source(name=path.name, location=path, id=path.stem), "key", ())
    converted = convert(planned, Parameters(), settings, Fetcher({}, settings.limits), folder)
    click.echo(f"converted {converted.record.duration / 3600:.2f} h of video")


def memory_mb(process: int) -> float:
    """Resident memory of a process and of all that it started, in MB; what they share counts in each."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:  # it has just ended
        return 0.0
    lines = [line for line in status.splitlines() if line.startswith("VmRSS:")]
    own = int(lines[0].split()[1]) / 1024 if lines else 0.0
    return own + sum(memory_mb(int(child)) for child in children)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--hours", type=click.FloatRange(min=1 / 60), default=2.0, show_default=True, help="Length of the video.")
@click.option("--video", type=click.Path(path_type=Path, exists=True), help="Use this file instead of making one.")
def main(hours: float, video: Path | None) -> None:
    """Measure the peak memory of one worker with its ffmpeg (Linux only)."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if video is None:
            video = folder / "long.mp4"
            make_video(video, hours)
        (folder / "sample").mkdir()
        worker = multiprocessing.get_context("spawn").Process(target=convert_one, args=(video, folder / "sample"))
        begin = time.perf_counter()
        worker.start()
        peak = 0.0
        while worker.is_alive():
            peak = max(peak, memory_mb(worker.pid or 0))
            time.sleep(SECONDS_BETWEEN_LOOKS)
        if worker.exitcode != 0:
            raise click.ClickException(f"the worker ended with exit code {worker.exitcode}")
    seconds = time.perf_counter() - begin
    verdict = "holds" if peak <= FLOOR_MB else "MISSED"
    click.echo(f"peak memory {peak:.0f} MB, {peak / FLOOR_MB:.2f} of {FLOOR_MB} MB: {verdict} ({seconds:.0f} s)")
    if peak > FLOOR_MB:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
