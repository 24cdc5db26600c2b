"""How preset, crf, tune and GOP trade size, quality, encoding and decoding time of the stored video (H.264).

For every combination: CPU seconds to encode a clip (decoding it included, one thread), kB of the stored video, PSNR (Y)
and SSIM (all) against the unencoded frames, and milliseconds to decode 8 frames at a random place with PyAV, RGB
conversion included. The mean over the clips; a markdown table.

    python benchmarks/encoding.py [--clips FOLDER] [--full]
"""

import argparse
import itertools
import random
import re
import resource
import statistics
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from example_clips import example_clips
from tabulate import tabulate
from tqdm import tqdm

from avid_pipeline.preprocess.ffmpeg import find_ffmpeg
from avid_pipeline.preprocess.probe import Probe, probe
from avid_pipeline.preprocess.settings import Settings
from avid_pipeline.preprocess.transcode import ffmpeg_command
from avid_pipeline.shards_spec.manifest import Parameters, VideoParameters
from avid_pipeline.shards_spec.video import decode_frames

PRESETS = ("medium", "faster", "veryfast", "superfast", "ultrafast")
QUALITIES = (20, 23, 26)
TUNES = ("none", "fastdecode")
GOPS = (4, 8, 16)
DEFAULT = VideoParameters()


@dataclass(frozen=True)
class Figures:
    """What one combination gives."""

    encode_cpu_seconds: float
    kilobytes: float
    psnr: float
    ssim: float
    decode_milliseconds: float


def combinations(full: bool) -> list[tuple[str, int, str, int]]:
    """All combinations, or those that differ from the default in one thing."""
    default = (DEFAULT.preset, DEFAULT.quality, DEFAULT.tune, DEFAULT.gop)
    product = list(itertools.product(PRESETS, QUALITIES, TUNES, GOPS))
    if full:
        return product
    return [item for item in product if sum(a != b for a, b in zip(item, default, strict=True)) <= 1]


def unencoded(clip: Path, out: Path) -> None:
    """The frames as they go into the encoder: the same filters, written raw."""
    found = Probe(probe(clip).video, None)
    command = ffmpeg_command(clip, found, None, Parameters(), Settings(), out)
    filters = command[command.index("-filter_complex") + 1]
    label = command[command.index("-map") + 1]
    raw = ["-filter_complex", filters, "-map", label, "-pix_fmt", "yuv420p", "-f", "yuv4mpegpipe", str(out)]
    subprocess.run([find_ffmpeg(), "-v", "error", "-y", "-i", clip, *raw], check=True)


def encode(clip: Path, parameters: VideoParameters, out: Path) -> float:
    """Encode as avid-preprocess does; CPU seconds."""
    found = Probe(probe(clip).video, None)
    command = ffmpeg_command(clip, found, None, Parameters(video=parameters), Settings(), out)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def quality(encoded: Path, reference: Path) -> tuple[float, float]:
    """PSNR of the luma in dB, and SSIM, as ffmpeg's filters compute them."""
    graph = "[0:v]split[a][b];[1:v]split[c][d];[a][c]psnr;[b][d]ssim"
    command = [find_ffmpeg(), "-hide_banner", "-i", encoded, "-i", reference, "-lavfi", graph, "-f", "null", "-"]
    words = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    psnr = re.search(r"PSNR y:([\d.]+|inf)", words)
    ssim = re.search(r"SSIM .*All:([\d.]+)", words)
    assert psnr is not None
    assert ssim is not None
    return float(psnr.group(1)), float(ssim.group(1))


def decode(encoded: Path, places: int = 40) -> float:
    """Median CPU milliseconds to decode 8 frames."""
    data = encoded.read_bytes()
    draws = random.Random(0)
    times = []
    for _ in range(places):
        first = draws.randrange(150)
        began = time.process_time()
        decode_frames(data, first, 8, DEFAULT.fps, "benchmark")
        times.append(time.process_time() - began)
    return 1000 * statistics.median(times)


def figures(clips: list[Path], references: list[Path], parameters: VideoParameters, out: Path) -> Figures:
    """The mean over the clips."""
    rows = []
    for clip, reference in zip(clips, references, strict=True):
        cpu = encode(clip, parameters, out)
        rows.append((cpu, out.stat().st_size / 1e3, *quality(out, reference), decode(out)))
    return Figures(*(statistics.fmean(column) for column in zip(*rows, strict=True)))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=Path, help="folder with .mp4 files  [default: the real ones, else made ones]")
    parser.add_argument("--full", action="store_true", help="every combination, not one change at a time")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="avid-benchmark-") as name:
        folder = Path(name)
        clips = example_clips(arguments.clips, folder)
        references = [folder / f"reference-{place}.y4m" for place in range(len(clips))]
        for clip, reference in zip(clips, references, strict=True):
            unencoded(clip, reference)
        rows = []
        for preset, crf, tune, gop in tqdm(combinations(arguments.full)):
            parameters = VideoParameters(preset=preset, quality=crf, tune=tune, gop=gop)
            found = figures(clips, references, parameters, folder / "encoded.mp4")
            rows.append((preset, crf, tune, gop, *vars(found).values()))
    headers = ("preset", "crf", "tune", "GOP", "encode CPU s", "kB", "PSNR Y dB", "SSIM", "decode 8 frames ms")
    print(tabulate(rows, headers, tablefmt="github", floatfmt=("", "", "", "", ".2f", ".0f", ".2f", ".4f", ".1f")))


if __name__ == "__main__":
    main()
