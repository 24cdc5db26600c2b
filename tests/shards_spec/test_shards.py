import io
import json
import shutil
import tarfile

import numpy as np
import pytest
import webdataset
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from avid_pipeline.shards_spec.cli import main
from avid_pipeline.shards_spec.errors import ManifestError, ShardError, StorageError
from avid_pipeline.shards_spec.manifest import Manifest, read_manifest
from avid_pipeline.shards_spec.reader import open_dataset, read_spectrogram
from avid_pipeline.shards_spec.sample import assign_keys, is_valid_key
from avid_pipeline.shards_spec.storage import open_storage
from avid_pipeline.shards_spec.validation import validate


@pytest.fixture
def copy(small_dataset, tmp_path):
    return shutil.copytree(small_dataset, tmp_path / "copy")


def flip(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(bytes(data))


def test_clean_data_set_has_no_problems(small_dataset):
    report = validate(open_storage(small_dataset))
    assert report.problems == []
    assert report.samples == 10


def test_plain_webdataset_reads_the_shards(small_dataset):
    manifest = read_manifest(open_storage(small_dataset))
    urls = [str(small_dataset / shard.name) for shard in manifest.shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    reader = open_dataset(small_dataset)
    assert len(samples) == 10
    for index, sample in enumerate(samples):
        ours = reader.read(index)
        assert sample["__key__"] == ours.record.key
        assert sample["mp4"] == ours.video
        assert json.loads(sample["json"])["labels"] == list(ours.record.labels)
        codes = np.load(io.BytesIO(sample["spectrogram.npy"]))
        assert codes.shape == (ours.record.audio.frames, 257)


def test_tar_headers_are_fixed(small_dataset):
    with tarfile.open(small_dataset / "shard-000000.tar") as tar:
        assert {(info.mtime, info.uid, info.gid, info.mode) for info in tar} == {(0, 0, 0, 0o644)}


def test_statistics_are_those_of_the_stored_values(small_dataset):
    reader = open_dataset(small_dataset)
    values = np.concatenate([read_spectrogram(reader.read(i).spectrogram, "x") for i in range(10)]).astype(float)
    mean, std = reader.manifest.spectrogram_statistics.arrays()
    np.testing.assert_allclose(mean, values.mean(axis=0), atol=1e-3)
    np.testing.assert_allclose(std, values.std(axis=0), atol=1e-3)


@pytest.mark.parametrize("member", ["mp4", "json", "spectrogram.npy"])
def test_a_flipped_byte_is_found_and_never_read(copy, member):
    reader = open_dataset(copy)
    index = reader.index_of(reader.manifest.shards[0])
    column = ["mp4", "spectrogram.npy", "json"].index(member)
    flip(copy / "shard-000000.tar", int(index.offsets[1, column]) + 7)
    with pytest.raises(ShardError, match=f"{index.keys[1]}.{member}"):
        open_dataset(copy).read(1)
    result = CliRunner().invoke(main, ["validate", str(copy)])
    assert result.exit_code == 1
    assert f"{index.keys[1]}.{member}" in result.output
    assert "sha256" in result.output
    assert "Traceback" not in result.output


def test_truncated_shard(copy):
    shard = copy / "shard-000001.tar"
    shard.write_bytes(shard.read_bytes()[:20_000])
    report = validate(open_storage(copy))
    assert any("shard-000001.tar" in problem and "bytes" in problem for problem in report.problems)
    reader = open_dataset(copy)
    with pytest.raises((ShardError, StorageError), match="shard-000001"):
        list(reader.read_shard(reader.manifest.shards[1]))


def test_swapped_indices_are_found(copy):
    shutil.copy(copy / "shard-000000.index.npz", copy / "shard-000001.index.npz")
    assert any("the index has another key" in problem for problem in validate(open_storage(copy)).problems)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("spec_version", 2, "spec_version: expected 1, found 2"),
        ("colour", 1, "colour"),
        ("parameters_fingerprint", "sha256:0", "changed by hand"),
        ("modalities", ["smell"], "modalities"),
    ],
)
def test_inconsistent_manifest_names_the_field(copy, field, value, message):
    content = json.loads((copy / "manifest.json").read_text())
    content[field] = value
    (copy / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(ManifestError, match=message):
        read_manifest(open_storage(copy))


def test_manifest_round_trip_and_locate(small_dataset):
    manifest = read_manifest(open_storage(small_dataset))
    assert Manifest.model_validate_json(manifest.to_json()) == manifest
    assert [manifest.locate(i)[0].first_index + manifest.locate(i)[1] for i in range(10)] == list(range(10))
    with pytest.raises(ManifestError, match="0 to 9"):
        manifest.locate(10)


def test_missing_root_is_one_clear_error(tmp_path):
    for command in (["info"], ["validate"], ["preview", "--out", str(tmp_path / "x.png")]):
        result = CliRunner().invoke(main, [command[0], str(tmp_path / "nothing"), *command[1:]])
        assert result.exit_code == 1
        assert "does not exist" in result.output
        assert "Traceback" not in result.output


def test_info_and_preview(small_dataset, tmp_path):
    result = CliRunner().invoke(main, ["info", str(small_dataset)])
    assert "10 in 3 shards" in result.output
    out = tmp_path / "sheet.png"
    assert CliRunner().invoke(main, ["preview", str(small_dataset), "--out", str(out)]).exit_code == 0
    assert out.read_bytes().startswith(b"\x89PNG")


@given(st.lists(st.text(min_size=1).filter(lambda name: "\x00" not in name), unique=True))
def test_keys_are_valid_and_unique_whatever_the_names(names):
    keys = assign_keys(names)
    assert all(is_valid_key(key) for key in keys)
    assert len({key.casefold() for key in keys}) == len(keys)


def test_dots_do_not_merge_keys():
    keys = assign_keys(["a/abc_10.000", "a/abc_10.500", "a/-dash", "b/Video", "c/video", "d/plain_1"])
    assert all("." not in key and not key.startswith("-") for key in keys)
    assert len(set(keys)) == 6
    assert keys[-1] == "plain_1"
