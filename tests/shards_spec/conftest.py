"""Fixtures of this room: data sets with any records, and an S3 endpoint over HTTP."""

import io
import os
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import boto3
import numpy as np
import pytest
from moto.server import ThreadedMotoServer

from avid_pipeline.shards_spec.manifest import Manifest, Parameters, ShardInfo, SpectrogramStatistics
from avid_pipeline.shards_spec.sample import AudioRecord, OriginalRecord, Sample, SampleRecord, VideoRecord
from avid_pipeline.shards_spec.shard_file import ShardWriter
from avid_pipeline.shards_spec.spectrogram import CODE_STEP_DB, FLOOR_DB
from avid_pipeline.shards_spec.storage import Storage, open_storage


@dataclass(frozen=True)
class Bucket:
    """A new bucket of an S3 endpoint."""

    url: str
    options: dict[str, str]

    def open(self, folder: str = "") -> Storage:
        return open_storage(f"{self.url}/{folder}".rstrip("/"), options=self.options)

    def arguments(self, option: str = "--storage-option") -> list[str]:
        """The settings as command line arguments."""
        return [part for key, value in self.options.items() for part in (option, f"{key}={value}")]


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_endpoint: str) -> Bucket:
    name = f"bucket-{uuid.uuid4().hex}"
    keys = {"aws_access_key_id": "x", "aws_secret_access_key": "x"}
    client = boto3.client("s3", endpoint_url=s3_endpoint, region_name="us-east-1", **keys)
    client.create_bucket(Bucket=name)
    return Bucket(f"s3://{name}", {"aws_endpoint": s3_endpoint, "aws_region": "us-east-1", **keys})


def make_sample(key: str, *, with_audio: bool = True, video_bytes: int = 300, **changes: object) -> Sample:
    """A sample whose video is random bytes: for what does not decode."""
    fields: dict[str, object] = {
        "key": key,
        "id": key,
        "source": f"{key}.mp4",
        "source_sha256": "0" * 64,
        "labels": (0,),
        "duration": 2.0,
        "video": VideoRecord(frames=32, fps=16, width=64, height=48, start=0.0),
        "audio": AudioRecord(frames=200, frames_per_second=100, start=0.0) if with_audio else None,
        "original": OriginalRecord(width=320, height=240, fps=25.0, video_codec="h264", audio_codec="aac"),
    }
    buffer = io.BytesIO()
    np.save(buffer, np.full((200, 257), 100, np.uint8))
    record = SampleRecord.model_validate(fields | changes)
    return Sample(record, os.urandom(video_bytes), buffer.getvalue() if with_audio else None)


WriteDataset = Callable[..., Path]


@pytest.fixture
def write_dataset() -> WriteDataset:
    """Write ``shards`` (lists of samples) as a data set, the statistics being those of :func:`make_sample`."""

    def write(root: Path, shards: list[list[Sample]], **fields: object) -> Path:
        root.mkdir(parents=True, exist_ok=True)
        infos: list[ShardInfo] = []
        for number, samples in enumerate(shards):
            name = f"shard-{number:06d}"
            with ShardWriter(root / f"{name}.tar") as writer:
                for sample in samples:
                    writer.add(sample)
                done = writer.finish()
            (root / f"{name}.index.npz").write_bytes(done.index.to_bytes())
            first = infos[-1].first_index + infos[-1].samples if infos else 0
            info = {"name": f"{name}.tar", "samples": done.samples, "bytes": done.bytes, "sha256": done.sha256}
            infos.append(ShardInfo.model_validate(info | {"first_index": first}))
        frames = sum(sample.record.audio.frames for shard in shards for sample in shard if sample.record.audio)
        mean = FLOOR_DB + 100 * CODE_STEP_DB
        statistics = SpectrogramStatistics(mean=(mean,) * 257, std=(0.0,) * 257, frames=frames) if frames else None
        (root / "quarantine.jsonl").write_bytes(b"")
        content = {
            "dataset": "made",
            "split": "train",
            "parameters": Parameters(),
            "parameters_fingerprint": Parameters().fingerprint(),
            "modalities": ("video", "audio"),
            "classes": ("dog", "cat", "bird"),
            "spectrogram_statistics": statistics,
            "shards": tuple(infos),
            "quarantined": 0,
        }
        (root / "manifest.json").write_bytes(Manifest.model_validate(content | fields).to_json())
        return root

    return write


@pytest.fixture
def new_sample() -> Callable[..., Sample]:
    """:func:`make_sample`, for tests."""
    return make_sample
