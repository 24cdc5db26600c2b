import json
import re

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from avid_pipeline.shards_spec.cli import main
from avid_pipeline.shards_spec.errors import SampleError, ShardError
from avid_pipeline.shards_spec.reader import ShardReader, open_dataset
from avid_pipeline.shards_spec.sample import OriginalRecord
from avid_pipeline.shards_spec.shard_file import ShardIndex, load_index
from avid_pipeline.shards_spec.show import resolve
from avid_pipeline.shards_spec.storage import Storage, open_storage


def run(*arguments):
    result = CliRunner().invoke(main, ["show", *map(str, arguments)])
    assert "Traceback" not in result.output
    return result


@pytest.fixture
def root(write_dataset, new_sample, tmp_path):
    shards = [
        [new_sample("first", labels=(1, 2)), new_sample("7", with_audio=False)],
        [new_sample("third", labels=(), segment=(3.5, 5.5), original=OriginalRecord())],
    ]
    subsets = {"with-audio": ((0, 1), (2, 3)), "fold1-train": ((0, 2),)}
    return write_dataset(tmp_path / "root", shards, modalities=("video",), subsets=subsets)


def test_what_is_shown(root):
    output = run(root, "first").output
    for pattern in (
        "key +first",
        "index +0 of 3",
        "place +0 in shard-000000.tar",
        r"labels +cat \(1\), bird \(2\)",
        "subsets +with-audio, fold1-train",
        r"duration +2.000 s",
        r"video +64x48, 32 frames at 16/s, 0.000 s to 2.000 s",
        r"spectrogram +200 frames at 100/s, 0.000 s to 2.000 s",
        r"original +320x240, 25 frames/s, h264, aac",
        r"\.mp4 +300 bytes at 512 of the shard, crc32 [0-9a-f]{8}",
        r"\.spectrogram\.npy +51,528 bytes at 1,536 ",
    ):
        assert re.search(pattern, output), pattern
    output = run(root, "2").output
    assert re.search("labels +none", output)
    assert re.search("original +unknown", output)
    assert re.search(r"segment +3.5 s to 5.5 s of the source", output)


def test_digits_are_an_index_unless_said_otherwise(root):
    assert re.search("key +third", run(root, "2").output)
    assert re.search("key +third", run(root, "002").output)
    result = run(root, "7")
    assert result.exit_code == 1
    assert "expected an instance index from 0 to 2, found 7; add --key" in result.output
    output = run(root, "7", "--key").output
    assert re.search("index +1 of 3", output)
    assert "spectrogram" not in output
    assert run(root, "9" * 5000).exit_code == 1


@pytest.mark.parametrize("key", ["absent", "../first", "First", "", "²"])
def test_a_key_that_is_not_there(root, key):
    result = run(root, key)
    assert result.exit_code == 1
    assert f"no sample has the key {key!r} (3 samples in 2 shards were looked through)" in result.output


def test_every_key_is_found(small_dataset):
    reader = open_dataset(small_dataset)
    assert [reader.find(reader.read(index).record.key) for index in range(10)] == list(range(10))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.text() | st.text("0123456789"))
def test_any_text_is_a_sample_or_a_clear_error(small_dataset, text):
    reader = open_dataset(small_dataset)
    keys = [reader.read(index).record.key for index in range(10)]
    if text in keys or text in [str(index) for index in range(10)]:
        assert resolve(reader, text) == (keys.index(text) if text in keys else int(text))
    elif text.isascii() and text.isdigit() and int(text) < 10:
        assert resolve(reader, text) == int(text)
    else:
        with pytest.raises(SampleError, match=r"no sample has the key|expected an instance index"):
            resolve(reader, text)


class CountingStorage(Storage):
    """Notes the names that are read and how."""

    def read(self, name):
        self.reads.append((name, "whole"))
        return super().read(name)

    def read_range(self, name, start, length):
        self.reads.append((name, length))
        return super().read_range(name, start, length)

    def read_ranges(self, name, starts, lengths):
        self.reads += [(name, length) for length in lengths]
        return super().read_ranges(name, starts, lengths)


def counting(root):
    plain = open_storage(root)
    storage = CountingStorage(plain.url, plain.store, plain.local_root)
    object.__setattr__(storage, "reads", [])
    return storage


@pytest.mark.parametrize("whole", [False, True])
def test_a_sample_by_index_is_one_ranged_read(root, whole):
    from avid_pipeline.shards_spec.show import locate

    storage = counting(root)
    sample = locate(ShardReader(storage), 2, whole=whole)
    assert sample.record.key == "third"
    names = [name for name, _ in storage.reads]
    assert names == ["manifest.json", "shard-000001.index.npz", "shard-000001.tar"]
    record_bytes = int(sample.tar_index.sizes[0, 2])
    assert (storage.reads[-1][1] == record_bytes) is not whole


@pytest.mark.parametrize("remote", [False, True])
def test_extracted_files_are_the_members(small_dataset, bucket, tmp_path, remote):
    root, options = small_dataset, []
    if remote:
        for path in small_dataset.glob("*.*"):
            bucket.open("data").write(path.name, path.read_bytes())
        root, options = f"{bucket.url}/data", bucket.arguments()
    result = run(root, "5", "--extract", tmp_path / "new" / "folder", *options)
    assert result.exit_code == 0, result.output
    sample = open_dataset(small_dataset).read(5)
    key = sample.record.key
    files = {path.name: path.read_bytes() for path in (tmp_path / "new" / "folder").iterdir()}
    assert files.keys() == {f"{key}.mp4", f"{key}.spectrogram.npy", f"{key}.json"}
    assert files[f"{key}.mp4"] == sample.video
    assert files[f"{key}.spectrogram.npy"] == sample.spectrogram
    assert json.loads(files[f"{key}.json"])["source"] == sample.record.source


@pytest.mark.parametrize("key", ["../../outside", "/tmp/outside", "a/b", "other"])
def test_a_hostile_key_is_no_file_name(root, tmp_path, key):
    index = load_index(open_storage(root), "shard-000001.index.npz")
    forged = ShardIndex((key,), index.offsets, index.sizes, index.crc32)
    (root / "shard-000001.index.npz").write_bytes(forged.to_bytes())
    result = run(root, "2", "--extract", tmp_path / "a" / "b")
    assert result.exit_code == 1
    assert "nothing was written" in result.output
    assert not (tmp_path / "a").exists()


def test_damage_is_one_error(root, tmp_path):
    index = load_index(open_storage(root), "shard-000001.index.npz")
    data = bytearray((root / "shard-000001.tar").read_bytes())
    data[int(index.offsets[0, 0])] ^= 1
    (root / "shard-000001.tar").write_bytes(data)
    assert run(root, "2").exit_code == 0
    result = run(root, "2", "--extract", tmp_path / "out")
    assert result.exit_code == 1
    assert "third.mp4: bytes" in result.output
    data[int(index.offsets[0, 2]) + 3] ^= 1
    (root / "shard-000001.tar").write_bytes(data)
    result = run(root, "2")
    assert result.exit_code == 1
    assert "third.json: bytes" in result.output
    with pytest.raises(ShardError, match=r"third\.json"):
        open_dataset(root).read_records(open_dataset(root).manifest.shards[1])


def test_a_folder_that_cannot_be_made_is_one_error(root, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    result = run(root, "2", "--extract", tmp_path / "file" / "below")
    assert result.exit_code == 1
    assert "cannot write" in result.output
