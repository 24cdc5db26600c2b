"""Reading encoded samples over loopback S3 beside reading them from the local disk, in the order of a training epoch.

Both go through SampleFetcher, with the files in the page cache. The S3 side is benchmarks/s3_server.py, a minimal
server of our own in a process of its own, because a general S3 emulator in Python would be what is measured; with
``--delay-ms`` it answers late, as a store far away does.

Two comparisons, each printed as a ratio of S3 to local (goal of the loader: 0.9):
- reading alone: samples/s, MB/s, and CPU of this process for each sample, whose ratio ("by CPU") holds also on a
  machine that others use at the same time;
- a loader's load: two threads that spend ``--decode-ms`` of CPU on every sample without the GIL, as decoding does.

    python benchmarks/object_storage.py [--samples 3000] [--decode-ms 9] [--delay-ms 0] [--cache]
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from tabulate import tabulate

from avid_pipeline.shards_spec.manifest import Manifest, Parameters, ShardInfo, SpectrogramStatistics
from avid_pipeline.shards_spec.reader import ShardReader, open_dataset
from avid_pipeline.shards_spec.sample import AudioRecord, OriginalRecord, Sample, SampleRecord, VideoRecord
from avid_pipeline.shards_spec.shard_file import ShardWriter
from avid_pipeline.streams.cache import DiskCache
from avid_pipeline.streams.fetching import PendingSample, SampleFetcher
from avid_pipeline.streams.plan import plan

_SHARDS, _SAMPLES_PER_SHARD = 8, 128
_VIDEO_BYTES, _SPECTROGRAM_FRAMES = 330_000, 1000
_AHEAD = 192
_BATCH = 64


@dataclass(frozen=True)
class Figures:
    """What one run gives."""

    samples_per_second: float
    megabytes_per_second: float
    cpu_milliseconds: float


def make_dataset(root: Path) -> None:
    """Samples of a Kinetics clip's size whose video is random bytes: nothing here decodes them."""
    random = np.random.default_rng(0)
    infos: list[ShardInfo] = []
    for number in range(_SHARDS):
        name = f"shard-{number:06d}"
        with ShardWriter(root / f"{name}.tar") as writer:
            for place in range(_SAMPLES_PER_SHARD):
                writer.add(make_sample(f"sample-{number:03d}-{place:05d}", random))
            done = writer.finish()
        (root / f"{name}.index.npz").write_bytes(done.index.to_bytes())
        infos.append(
            ShardInfo(
                name=f"{name}.tar",
                samples=done.samples,
                bytes=done.bytes,
                sha256=done.sha256,
                first_index=number * _SAMPLES_PER_SHARD,
            )
        )
    manifest = Manifest(
        dataset="made",
        split="train",
        parameters=Parameters(),
        parameters_fingerprint=Parameters().fingerprint(),
        modalities=("video", "audio"),
        classes=("any",),
        spectrogram_statistics=SpectrogramStatistics(mean=(0.0,) * 257, std=(1.0,) * 257, frames=1),
        shards=tuple(infos),
        quarantined=0,
    )
    (root / "manifest.json").write_bytes(manifest.to_json())


def make_sample(key: str, random: np.random.Generator) -> Sample:
    """One sample of 10 seconds."""
    record = SampleRecord(
        key=key,
        id=key,
        source=f"{key}.mp4",
        source_sha256="0" * 64,
        labels=(0,),
        duration=10.0,
        video=VideoRecord(frames=160, fps=16, width=340, height=256, start=0.0),
        audio=AudioRecord(frames=_SPECTROGRAM_FRAMES, frames_per_second=100, start=0.0),
        original=OriginalRecord(),
    )
    return Sample(record, random.bytes(_VIDEO_BYTES), random.bytes(_SPECTROGRAM_FRAMES * 257 + 128))


def spend_cpu(milliseconds: float) -> Callable[[Sample], int]:
    """Work that takes that much CPU in C without the GIL, about as decoding does; gives the sample's bytes."""
    block = bytes(1 << 20)
    costs = []
    for _ in range(30):
        began = time.thread_time()
        hashlib.sha256(block)
        costs.append(time.thread_time() - began)
    per_block = float(np.median(costs)) * 1000
    amount = memoryview(bytes(max(1, int(len(block) * milliseconds / per_block)))) if milliseconds else None

    def work(sample: Sample) -> int:
        if amount is not None:
            hashlib.sha256(amount)
        return len(sample.video or b"") + len(sample.spectrogram or b"")

    return work


def run(reader: ShardReader, order: list[int], work: Callable[[Sample], int], cache: DiskCache | None) -> Figures:
    """Ask for samples some batches ahead and take them in two threads, as a loader does."""
    began, cpu = time.perf_counter(), time.process_time()
    with SampleFetcher(reader, cache=cache) as fetcher, ThreadPoolExecutor(2) as pool:

        def take(pending: PendingSample) -> int:
            return work(pending.result())

        upcoming = iter(order)
        taken = [pool.submit(take, fetcher.request(index)) for index in islice(upcoming, _AHEAD)]
        size = 0
        while taken:
            size += taken.pop(0).result()
            taken += [pool.submit(take, fetcher.request(index)) for index in islice(upcoming, 1)]
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    return Figures(len(order) / seconds, size / seconds / 1e6, cpu / len(order) * 1000)


def compare(local: ShardReader, remote: ShardReader, arguments: argparse.Namespace, folder: Path) -> None:
    """Run both in turn, several times; the medians and their ratio."""
    batches = plan(local.manifest, seed=0, epoch=0, clips_per_instance=10, global_batch_size=_BATCH).rank_batches(0, 1)
    order = [
        int(instance)
        for batch in islice(iter(batches), -(-arguments.samples // _BATCH))
        for instance in batch.instances
    ]
    for label, milliseconds in (
        ("reading alone", 0.0),
        (f"with {arguments.decode_ms} ms of decoding", arguments.decode_ms),
    ):
        part = order[: arguments.samples if not milliseconds else arguments.samples // 4]
        work = spend_cpu(milliseconds)
        caches = [DiskCache(folder / "cache", 4 << 30)] if arguments.cache else []
        found: dict[str, list[Figures]] = {}
        for _ in range(arguments.repeat):
            found.setdefault("local disk", []).append(run(local, part, work, None))
            found.setdefault("loopback S3", []).append(run(remote, part, work, None))
            for cache in caches:
                found.setdefault("loopback S3, cached", []).append(run(remote, part, work, cache))
        rows = []
        base = float(np.median([each.samples_per_second for each in found["local disk"]]))
        least_cpu = float(np.median([each.cpu_milliseconds for each in found["local disk"]]))
        for name, figures in found.items():
            speed, bytes_speed, cpu = (
                float(np.median([getattr(each, field) for each in figures]))
                for field in ("samples_per_second", "megabytes_per_second", "cpu_milliseconds")
            )
            rows.append((name, speed, bytes_speed, cpu, speed / base, least_cpu / cpu))
        print(f"\n{label}: median of {arguments.repeat} runs of {len(part)} samples")
        headers = ("", "samples/s", "MB/s", "CPU ms/sample", "of local", "of local by CPU")
        print(tabulate(rows, headers, tablefmt="github", floatfmt=("", ".0f", ".0f", ".2f", ".2f", ".2f")))


def main() -> None:
    """Make the data, start the server, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=3000)
    parser.add_argument("--decode-ms", type=float, default=9.0)
    parser.add_argument("--delay-ms", type=float, default=0.0)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--cache", action="store_true", help="also with a local cache, cold in the first run")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name) / "data"
        root.mkdir()
        make_dataset(root)
        command = [
            sys.executable,
            Path(__file__).with_name("s3_server.py"),
            root,
            "--delay-ms",
            str(arguments.delay_ms),
        ]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            options = {
                "aws_endpoint": server.stdout.readline().strip(),
                "aws_region": "us-east-1",
                "aws_access_key_id": "any",
                "aws_secret_access_key": "any",
            }
            try:
                print(f"{len(os.sched_getaffinity(0))} cores; benchmarks/s3_server.py, {arguments.delay_ms} ms")
                compare(open_dataset(root), open_dataset("s3://bucket", options), arguments, Path(name))
            finally:
                server.terminate()


if __name__ == "__main__":
    main()
