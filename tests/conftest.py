"""Fixtures that several rooms share: real files, made by ffmpeg."""

import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from avid_pipeline.preprocess.executors.local import LocalExecutor
from avid_pipeline.preprocess.ffmpeg import find_ffmpeg
from avid_pipeline.preprocess.job import run_job
from avid_pipeline.preprocess.sources.kinetics import list_kinetics
from avid_pipeline.shards_spec.manifest import MANIFEST_NAME, Parameters, VideoParameters
from avid_pipeline.shards_spec.reader import open_dataset
from avid_pipeline.shards_spec.shard_file import ShardWriter

_ACCESS = {"aws_access_key_id": "anyone", "aws_secret_access_key": "anything"}
BROKEN = (3, 4)
"""Instances of ``broken_dataset`` whose video cannot be decoded."""
REPOSITORY = Path(__file__).resolve().parents[1]
pytest_plugins = ("tests.hooks",)


def make_video(
    path: Path,
    *,
    seconds: float = 1.6,
    size: str = "66x50",
    fps: int = 25,
    tone: int | None = 440,
    picture: bool = True,
    begin: float = 0.0,
) -> Path:
    """A small real video: ffmpeg's moving test picture from second ``begin`` on, and a sine tone (None: no sound)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    command = [find_ffmpeg(), "-hide_banner", "-loglevel", "error", "-y"]
    if picture:
        picture_filter = f"testsrc2=size={size}:rate={fps}:duration={begin + seconds}"
        picture_filter += f",trim=start={begin},setpts=PTS-STARTPTS"
        command += ["-f", "lavfi", "-i", picture_filter]
    if tone is not None:
        command += ["-f", "lavfi", "-i", f"sine=frequency={tone}:sample_rate=44100:duration={seconds}"]
    command += [
        "-c:v",
        "libx264",
        "-preset",
        "ultrafast",
        "-pix_fmt",
        "yuv420p",
        "-c:a",
        "aac",
        "-f",
        "mp4",
        f"file:{path}",
    ]
    subprocess.run(command, check=True, timeout=120)
    return path


@pytest.fixture(scope="session")
def kinetics_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten small videos in three class folders."""
    root = tmp_path_factory.mktemp("kinetics")
    for number in range(10):
        make_video(root / f"class {number % 3}" / f"video{number:06d}.mp4", tone=300 + 100 * number, begin=number / 2)
    return root


@pytest.fixture(scope="session")
def small_dataset(kinetics_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten samples in three shards."""
    root = tmp_path_factory.mktemp("shards")
    parameters = Parameters(video=VideoParameters(short_side=48), samples_per_shard=4)
    run_job(list_kinetics(kinetics_tree), parameters, str(root), LocalExecutor(1))
    return root


@pytest.fixture(scope="session")
def broken_dataset(small_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small data set, but the videos of ``BROKEN`` cannot be decoded; all checksums fit."""
    root, reader, shards = tmp_path_factory.mktemp("broken"), open_dataset(small_dataset), []
    for shard in reader.manifest.shards:
        with ShardWriter(root / shard.name) as writer:
            for place, sample in enumerate(reader.read_shard(shard)):
                writer.add(replace(sample, video=b"no video") if shard.first_index + place in BROKEN else sample)
            finished = writer.finish()
        (root / shard.index_name).write_bytes(finished.index.to_bytes())
        shards.append(shard.model_copy(update={"bytes": finished.bytes, "sha256": finished.sha256}))
    manifest = reader.manifest.model_copy(update={"shards": tuple(shards)})
    (root / MANIFEST_NAME).write_bytes(manifest.to_json())
    return root


@pytest.fixture(scope="session")
def real_clips() -> Path:
    """The real clips beside the repository, where there are any."""
    clips = REPOSITORY.parent / "shared" / "clips"
    if not clips.is_dir():
        pytest.skip("the real clips are not beside this checkout")
    return clips


@dataclass(frozen=True)
class Bucket:
    """An S3 bucket on a real HTTP server: its URL, and the options to open it."""

    url: str
    options: dict[str, str] = field(repr=False)

    @property
    def arguments(self) -> list[str]:
        """The options for a command line."""
        return [part for key, value in self.options.items() for part in ("--storage-option", f"{key}={value}")]


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """Address of an S3 server that ends with the tests."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def make_bucket(s3_endpoint: str) -> Callable[[], Bucket]:
    """Makes empty S3 buckets."""
    import boto3

    client = boto3.client("s3", endpoint_url=s3_endpoint, region_name="us-east-1", **_ACCESS)

    def make() -> Bucket:
        name = f"bucket-{len(client.list_buckets()['Buckets'])}"
        client.create_bucket(Bucket=name)
        return Bucket(f"s3://{name}", {"aws_endpoint": s3_endpoint, "aws_region": "us-east-1", **_ACCESS})

    return make
