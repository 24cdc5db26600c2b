import json
import shutil
import signal
import sys
import threading

import boto3
import obstore
import pytest
from click.testing import CliRunner

from avid_pipeline.shards_spec import copying
from avid_pipeline.shards_spec.cli import main
from avid_pipeline.shards_spec.copying import copy_dataset
from avid_pipeline.shards_spec.errors import ManifestError, ShardError, StorageError
from avid_pipeline.shards_spec.manifest import read_manifest
from avid_pipeline.shards_spec.storage import open_storage
from avid_pipeline.shards_spec.validation import validate
from tests.processes import run, started

LINE = json.dumps({"source": "x", "reason": "unreadable", "detail": "y"}) + "\n"


@pytest.fixture
def source(write_dataset, new_sample, tmp_path):
    """Five shards of two samples, and one source in quarantine."""
    shards = [[new_sample(f"v{shard}-{place}", video_bytes=20_000) for place in range(2)] for shard in range(5)]
    root = write_dataset(tmp_path / "source", shards, quarantined=1)
    (root / "quarantine.jsonl").write_text(LINE)
    return root


def files_of(storage):
    return {name: storage.read(name) for name in storage.names() if not name.startswith("_progress/")}


def assert_equal(source, destination):
    assert files_of(open_storage(source)) == files_of(destination)
    assert validate(destination).problems == []


def test_a_folder_to_a_folder_and_again(source, tmp_path):
    destination = open_storage(tmp_path / "copy", create=True)
    counted = []
    lock = threading.Lock()

    def on_bytes(count):
        with lock:
            counted.append(count)

    result = copy_dataset(open_storage(source), destination, on_bytes=on_bytes)
    assert (result.copied, result.skipped) == (5, 0)
    assert sum(counted) == result.copied_bytes == sum(shard.stat().st_size for shard in source.glob("*.tar"))
    assert_equal(source, destination)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "copy").glob("shard-*")}
    planned = []
    again = copy_dataset(open_storage(source), destination, on_planned=lambda *plan: planned.append(plan))
    assert (again.copied, again.copied_bytes, again.skipped) == (0, 0, 5)
    assert planned == [(result.copied_bytes, result.copied_bytes)]
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "copy").glob("shard-*")}


def test_both_ways_through_an_object_store(source, bucket, tmp_path):
    remote = f"{bucket.url}/sets/one"
    result = CliRunner().invoke(main, ["copy", str(source), remote, *bucket.arguments()])
    assert result.exit_code == 0, result.output
    assert "5 shards copied" in result.output
    assert_equal(source, bucket.open("sets/one"))
    other = f"{bucket.url}/sets/two"
    arguments = ["copy", remote, other, *bucket.arguments(), *bucket.arguments("--source-option")]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    back = tmp_path / "back"
    result = CliRunner().invoke(main, ["copy", other, str(back), *bucket.arguments("--source-option")])
    assert result.exit_code == 0, result.output
    assert_equal(source, open_storage(back))


def test_a_shard_of_several_parts(write_dataset, new_sample, bucket, tmp_path):
    root = write_dataset(tmp_path / "source", [[new_sample("a", video_bytes=20 << 20)]])
    copy_dataset(open_storage(root), bucket.open("copy"))
    assert_equal(root, bucket.open("copy"))
    back = open_storage(tmp_path / "back", create=True)
    copy_dataset(bucket.open("copy"), back)
    assert_equal(root, back)


@pytest.fixture(params=["local", "s3"])
def destination(request, tmp_path):
    if request.param == "local":
        return open_storage(tmp_path / "copy", create=True)
    return request.getfixturevalue("bucket").open("copy")


def flip(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage", ["flipped", "cut", "longer", "missing", "index", "index missing", "index of another"]
)
def test_a_damaged_shard_is_named_and_not_committed(source, destination, damage):
    shard, index = source / "shard-000002.tar", source / "shard-000002.index.npz"
    keep = {path: path.read_bytes() for path in (shard, index)}
    if damage == "flipped":
        flip(shard, 3000)
    elif damage == "cut":
        shard.write_bytes(keep[shard][:-5000])
    elif damage == "longer":
        shard.write_bytes(keep[shard] + bytes(512))
    elif damage == "missing":
        shard.unlink()
    elif damage == "index":
        flip(index, 100)
    elif damage == "index missing":
        index.unlink()
    else:
        index.write_bytes(index_of_one_sample(source))
    with pytest.raises(ShardError, match=r"1 of 5 shards are damaged.*\n.*shard-000002") as error:
        copy_dataset(open_storage(source), destination)
    assert "shard-000001" not in str(error.value)
    there = set(destination.names())
    assert not {"shard-000002.tar", "manifest.json", "_progress/copied-shard-000002.json"} & there
    assert {f"shard-00000{number}.tar" for number in (0, 1, 3, 4)} <= there
    assert not any(".writing-" in name for name in there)
    for path, data in keep.items():
        path.write_bytes(data)
    result = copy_dataset(open_storage(source), destination)
    assert (result.copied, result.skipped) == (1, 4)
    assert_equal(source, destination)


def index_of_one_sample(source):
    from avid_pipeline.shards_spec.shard_file import ShardIndex, load_index

    index = load_index(open_storage(source), "shard-000000.index.npz")
    return ShardIndex(index.keys[:1], index.offsets[:1], index.sizes[:1], index.crc32[:1]).to_bytes()


def note(destination, number):
    return f"_progress/copied-shard-{number:06d}.json"


@pytest.mark.parametrize("change", ["shorter", "no index", "no note", "bad note", "other sha256"])
def test_only_what_is_right_is_skipped(source, destination, change):
    copy_dataset(open_storage(source), destination)
    if change == "shorter":
        destination.write("shard-000003.tar", destination.read("shard-000003.tar")[:-1])
    elif change == "no index":
        destination.delete("shard-000003.index.npz")
    elif change == "no note":
        destination.delete(note(destination, 3))
    elif change == "bad note":
        destination.write(note(destination, 3), b"{")
    else:
        content = json.loads(destination.read(note(destination, 3)))
        destination.write(note(destination, 3), json.dumps(content | {"sha256": "0" * 64}).encode())
    result = copy_dataset(open_storage(source), destination)
    assert (result.copied, result.skipped) == (1, 4)
    assert_equal(source, destination)


def test_another_data_set_is_refused(source, destination, write_dataset, new_sample, tmp_path):
    other = open_storage(write_dataset(tmp_path / "other", [[new_sample("other")]]))
    copy_dataset(other, destination)
    before = files_of(destination)
    with pytest.raises(StorageError, match="holds a different data set"):
        copy_dataset(open_storage(source), destination)
    destination.delete("manifest.json")
    with pytest.raises(StorageError, match="holds a part of a different data set"):
        copy_dataset(open_storage(source), destination)
    assert files_of(destination) == {name: data for name, data in before.items() if name != "manifest.json"}


def test_what_is_of_nobody_knows_what_is_refused(source, destination):
    destination.write("_progress/job.json", b"{}")
    with pytest.raises(StorageError, match="holds an unfinished conversion"):
        copy_dataset(open_storage(source), destination)
    destination.delete("_progress/job.json")
    destination.write("shard-000000.tar", b"x")
    with pytest.raises(StorageError, match=r"holds shard-000000.tar of an unknown data set"):
        copy_dataset(open_storage(source), destination)
    destination.write("_progress/copy.json", b"nonsense")
    with pytest.raises(StorageError, match=r"copy.json: is no note of a copy"):
        copy_dataset(open_storage(source), destination)
    assert destination.read("shard-000000.tar") == b"x"


def test_the_source_itself_is_refused(source, bucket, tmp_path):
    (tmp_path / "link").symlink_to(source)
    with pytest.raises(StorageError, match="is the source itself"):
        copy_dataset(open_storage(source), open_storage(tmp_path / "link"))
    copy_dataset(open_storage(source), bucket.open("copy"))
    with pytest.raises(StorageError, match="is the source itself"):
        copy_dataset(bucket.open("copy"), bucket.open("copy"))
    assert validate(open_storage(source)).problems == []


def test_a_source_that_is_no_data_set_makes_no_destination(tmp_path):
    (tmp_path / "empty").mkdir()
    result = CliRunner().invoke(main, ["copy", str(tmp_path / "empty"), str(tmp_path / "copy")])
    assert result.exit_code == 1
    assert "is not a finished data set" in result.output
    assert not (tmp_path / "copy").exists()
    with pytest.raises(ManifestError):
        copy_dataset(open_storage(tmp_path / "empty"), open_storage(tmp_path / "copy", create=True))
    assert list((tmp_path / "copy").iterdir()) == []


def test_a_missing_quarantine_list_is_no_complete_source(source, destination):
    (source / "quarantine.jsonl").unlink()
    with pytest.raises(StorageError, match=r"quarantine.jsonl: does not exist, though the manifest counts 1"):
        copy_dataset(open_storage(source), destination)
    assert not destination.exists("manifest.json")


def test_a_destination_that_cannot_be_written_is_one_error(source, tmp_path):
    (tmp_path / "copy" / "shard-000003.tar").mkdir(parents=True)
    result = CliRunner().invoke(main, ["copy", str(source), str(tmp_path / "copy")])
    assert result.exit_code == 1
    assert "shard-000003.tar: cannot write" in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "copy" / "manifest.json").exists()
    assert not list((tmp_path / "copy").glob(".writing-*"))


@pytest.fixture
def many(write_dataset, new_sample, tmp_path):
    """A source whose copy takes some seconds."""
    shards = [[new_sample(f"v{number}", video_bytes=150_000)] for number in range(120)]
    return write_dataset(tmp_path / "source", shards)


def start_copy(*arguments):
    return started(
        sys.executable, "-m", "avid_pipeline.shards_spec.cli", "copy", "--workers", "2", *arguments, merge=True
    )


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_killed_in_the_middle_it_goes_on(many, destination, bucket, number):
    local = destination.local_root is not None
    arguments = [str(many), destination.url, *([] if local else bucket.arguments())]
    finished = {}
    for shard in (3, 20):
        with start_copy(*arguments) as process:
            process.wait_until(lambda shard=shard: destination.exists(note(destination, shard)))
            process.signal(number)
            assert process.wait() == (1 if number == signal.SIGINT else -signal.SIGKILL)
            assert "Traceback" not in process.stdout
        assert not destination.exists("manifest.json")
        assert finished.items() <= times_of(destination).items()
        done = {name.removeprefix("_progress/copied-").removesuffix(".json") for name in destination.names("_progress")}
        finished = {name: when for name, when in times_of(destination).items() if name.removesuffix(".tar") in done}
        assert len(finished) >= shard
    if local:
        (destination.local_root / ".writing-0123456789abcdef-shard-000119.tar").write_bytes(b"of a killed run")
    with start_copy(*arguments) as process:
        assert process.wait() == 0, str(process)
        assert f"{len(finished)} were there already" in process.stdout
    assert finished.items() <= times_of(destination).items()
    assert_equal(many, destination)


def times_of(destination):
    """When every shard was written."""
    if destination.local_root is not None:
        return {path.name: path.stat().st_mtime_ns for path in destination.local_root.glob("*.tar")}
    found = [item for page in obstore.list(destination.store) for item in page]
    return {item["path"]: item["last_modified"] for item in found if item["path"].endswith(".tar")}


def test_a_failed_copy_leaves_no_parts_of_uploads(source, bucket):
    flip(source / "shard-000002.tar", 3000)
    with pytest.raises(ShardError):
        copy_dataset(open_storage(source), bucket.open("copy"))
    client = boto3.client(
        "s3",
        endpoint_url=bucket.options["aws_endpoint"],
        region_name="us-east-1",
        aws_access_key_id="x",
        aws_secret_access_key="x",
    )
    assert not client.list_multipart_uploads(Bucket=bucket.url.removeprefix("s3://")).get("Uploads")


def test_memory_is_bounded(write_dataset, new_sample, tmp_path):
    root = write_dataset(tmp_path / "source", [[new_sample("a", video_bytes=300 << 20)]])
    code = (
        "import re, sys\n"
        "from avid_pipeline.shards_spec.copying import copy_dataset\n"
        "from avid_pipeline.shards_spec.storage import open_storage\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) // 1024\n"
        "before = peak()\n"
        "copy_dataset(open_storage(sys.argv[1]), open_storage(sys.argv[2], create=True))\n"
        "print(peak() - before)\n"
    )
    command = [sys.executable, "-c", code, str(root), str(tmp_path / "copy")]
    assert 0 < int(run(*command).stdout) < 100
    shutil.rmtree(tmp_path / "copy")


def test_the_manifest_is_the_same(source, tmp_path):
    destination = open_storage(tmp_path / "copy", create=True)
    copy_dataset(open_storage(source), destination)
    assert read_manifest(destination).fingerprint() == read_manifest(open_storage(source)).fingerprint()


def test_the_cause_is_shown_though_an_earlier_shard_stopped_because_of_it(source, tmp_path, monkeypatch):
    def copy_shard(source, destination, shard, on_bytes, stop):
        if shard.first_index > 0:
            raise StorageError("the disk is full")
        stop.wait(10)
        raise copying._StoppedError("stopped")

    monkeypatch.setattr(copying, "_copy_shard", copy_shard)
    with pytest.raises(StorageError, match="the disk is full"):
        copying.copy_dataset(open_storage(source), open_storage(tmp_path / "copy", create=True), workers=2)
