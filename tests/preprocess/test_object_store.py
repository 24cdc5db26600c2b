"""Sources and shards in object storage: a real S3 server over HTTP."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from avid_pipeline.preprocess.cli import main
from avid_pipeline.shards_spec.reader import open_dataset
from avid_pipeline.shards_spec.storage import open_storage
from avid_pipeline.shards_spec.validation import validate

if TYPE_CHECKING:
    from tests.conftest import Bucket

OPTIONS = ("--short-side", "48", "--samples-per-shard", "4", "--workers", "1")


@pytest.fixture
def bucket_of_videos(kinetics_tree: Path, make_bucket: Callable[[], "Bucket"]) -> "Bucket":
    bucket = make_bucket()
    storage = open_storage(bucket.url, options=bucket.options)
    for path in kinetics_tree.rglob("*.mp4"):
        storage.write(f"raw/{path.relative_to(kinetics_tree).as_posix()}", path.read_bytes())
    return bucket


def test_from_s3_to_s3_and_on_after_an_interruption(
    bucket_of_videos: "Bucket", make_bucket: Callable[[], "Bucket"], small_dataset: Path
) -> None:
    bucket = make_bucket()
    command = ["kinetics", f"{bucket_of_videos.url}/raw", f"{bucket.url}/shards/train", *OPTIONS, *bucket.arguments]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    storage = open_storage(f"{bucket.url}/shards/train", options=bucket.options)

    def shards() -> dict[str, bytes]:
        return {name: storage.read(name) for name in storage.names() if not name.startswith("_progress")}

    assert shards() == {path.name: path.read_bytes() for path in small_dataset.iterdir() if path.is_file()}
    assert validate(storage).problems == []
    assert open_dataset(storage.url, bucket.options).read(3).record.video is not None

    for name in ("manifest.json", "shard-000001.tar", "_progress/shard-000002.json"):
        storage.delete(name)
    assert CliRunner().invoke(main, command).exit_code == 0
    assert shards() == {path.name: path.read_bytes() for path in small_dataset.iterdir() if path.is_file()}


def test_from_s3_to_disk_with_a_file_that_vanishes(
    bucket_of_videos: "Bucket", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from avid_pipeline.preprocess.sources import kinetics

    listing = kinetics.list_kinetics(f"{bucket_of_videos.url}/raw", "train", bucket_of_videos.options)
    assert len(listing.sources) == 10
    gone = listing.sources[0].name
    open_storage(bucket_of_videos.url, options=bucket_of_videos.options).delete(f"raw/{gone}")
    monkeypatch.setattr(kinetics, "list_kinetics", lambda *arguments, **options: listing)
    command = ["kinetics", f"{bucket_of_videos.url}/raw", str(tmp_path), *OPTIONS, *bucket_of_videos.arguments]
    result = CliRunner().invoke(main, [*command, "--max-quarantine-fraction", "0.1"])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "quarantine.jsonl").read_text().count(f'"source": "{gone}", "reason": "source_not_found"') == 1


def test_no_such_bucket_is_one_clear_error(make_bucket: Callable[[], "Bucket"], tmp_path: Path) -> None:
    bucket = make_bucket()
    result = CliRunner().invoke(main, ["kinetics", "s3://no-such-bucket/raw", str(tmp_path), *bucket.arguments])
    assert result.exit_code == 1
    assert "s3://no-such-bucket/raw" in result.output
    assert "Traceback" not in result.output
