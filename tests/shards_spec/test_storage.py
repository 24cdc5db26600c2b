import os
from urllib.parse import quote

import boto3
import pytest
from hypothesis import given
from hypothesis import strategies as st

from avid_pipeline.shards_spec.errors import StorageError
from avid_pipeline.shards_spec.storage import is_remote, open_storage, split_url

KEYS = {"aws_access_key_id": "x", "aws_secret_access_key": "x"}


@pytest.fixture(params=["local", "s3"])
def storage(request, tmp_path):
    if request.param == "local":
        return open_storage(tmp_path / "root", create=True)
    return request.getfixturevalue("bucket").open("some/prefix")


def test_what_is_written_is_read(storage):
    data = os.urandom(100_000)
    storage.write("folder/name.bin", data)
    assert storage.read("folder/name.bin") == data
    assert storage.read_range("folder/name.bin", 1000, 50) == data[1000:1050]
    assert storage.read_ranges("folder/name.bin", [5, 99_990, 5], [10, 10, 1]) == [data[5:15], data[-10:], data[5:6]]
    assert storage.read_ranges("folder/name.bin", [], []) == []
    assert b"".join(storage.chunks("folder/name.bin")) == data
    assert storage.size("folder/name.bin") == len(data)
    with storage.open("folder/name.bin") as file:
        file.seek(70_000)
        assert bytes(file.read(100)) == data[70_000:70_100]
    storage.write("folder/name.bin", b"other")
    assert storage.read("folder/name.bin") == b"other"


def test_names_are_sorted_and_below_the_prefix(storage):
    for name in ("b", "a/2", "a/10", "ab"):
        storage.write(name, b"x")
    assert list(storage.names()) == ["a/10", "a/2", "ab", "b"]
    assert list(storage.names("a")) == ["a/10", "a/2"]
    assert list(storage.names("none")) == []


def test_deleting_twice_is_no_error(storage):
    storage.write("x", b"x")
    storage.delete("x")
    assert not storage.exists("x")
    assert storage.size("x") is None
    storage.delete("x")


@pytest.mark.parametrize(
    "action",
    [
        lambda storage: storage.read("nothing"),
        lambda storage: storage.read_range("nothing", 0, 1),
        lambda storage: storage.read_ranges("nothing", [0], [1]),
        lambda storage: list(storage.chunks("nothing")),
        lambda storage: storage.open("nothing").read(),
    ],
)
def test_what_does_not_exist_is_one_clear_error(storage, action):
    with pytest.raises(StorageError, match=r"nothing: does not exist") as error:
        action(storage)
    assert "\n" not in str(error.value)


def test_ranges_beyond_the_end_are_errors(storage):
    storage.write("x", b"0123456789")
    with pytest.raises(StorageError, match="truncated"):
        storage.read_range("x", 5, 10)
    with pytest.raises(StorageError, match="truncated"):
        storage.read_ranges("x", [0, 5], [5, 10])
    with pytest.raises(StorageError, match="/x: cannot read"):
        storage.read_range("x", 50, 10)


def test_pieces_make_one_name(storage):
    pieces = [os.urandom(3 << 20) for _ in range(5)] + [b"end"]
    storage.write_pieces("big", iter(pieces), sum(map(len, pieces)))
    assert storage.read("big") == b"".join(pieces)
    storage.write_pieces("empty", iter([]), 0)
    assert storage.read("empty") == b""


def test_pieces_that_end_in_an_error_leave_what_was_there(storage):
    def pieces():
        yield os.urandom(9 << 20)
        raise StorageError("the source broke off")

    storage.write("kept", b"old")
    for name in ("kept", "new"):
        with pytest.raises(StorageError, match="the source broke off"):
            storage.write_pieces(name, pieces(), 9 << 20)
    assert storage.read("kept") == b"old"
    assert list(storage.names()) == ["kept"]


def test_upload_moves_the_file(storage, tmp_path):
    path = tmp_path / "finished"
    path.write_bytes(b"content")
    storage.upload(path, "moved")
    assert storage.read("moved") == b"content"
    assert not path.exists()


def test_a_local_root_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    storage = open_storage(tmp_path)
    with pytest.raises(StorageError, match="file/below: cannot write"):
        storage.write("file/below", b"x")
    with pytest.raises(StorageError, match="file/below: cannot write"):
        storage.write_pieces("file/below", iter([b"x"]), 1)


def test_opening_says_what_is_wrong(tmp_path):
    with pytest.raises(StorageError, match="does not exist; give the folder"):
        open_storage(tmp_path / "nothing")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="is a file, not a folder"):
        open_storage(tmp_path / "file")
    with pytest.raises(StorageError, match="cannot make this folder"):
        open_storage(tmp_path / "file" / "below", create=True)
    with pytest.raises(StorageError, match="expected a local path or an s3://"):
        open_storage("gopher://host/path")
    with pytest.raises(StorageError, match="cannot open this root"):
        open_storage("s3://bucket", options={"aws_colour": "blue"})


def test_local_roots_have_several_spellings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    root = tmp_path / "a b"
    made = open_storage(f"file://{root}", create=True)
    made.write("x", b"1")
    assert [open_storage(text).read("x") for text in (root, "a b", "~/a b", f"{root}/")] == [b"1"] * 4
    assert made.url_of("x") == f"{root}/x"
    assert made.local_path("x") == root / "x"


@pytest.mark.parametrize("slash", ["", "/"])
def test_a_web_server_is_a_root_too(bucket, s3_endpoint, slash):
    written = bucket.open("folder")
    written.write("a b.txt", b"0123456789")
    client = boto3.client("s3", endpoint_url=s3_endpoint, region_name="us-east-1", **KEYS)
    client.put_object_acl(Bucket=bucket.url.removeprefix("s3://"), Key="folder/a b.txt", ACL="public-read")
    storage = open_storage(f"{s3_endpoint}/{bucket.url.removeprefix('s3://')}/folder{slash}")
    assert storage.read("a b.txt") == b"0123456789"
    assert storage.read_ranges("a b.txt", [1, 8], [2, 2]) == [b"12", b"89"]
    assert storage.open("a b.txt").read() == b"0123456789"
    assert storage.size("a b.txt") == 10
    assert not storage.exists("nothing")


def test_a_bucket_that_does_not_exist(bucket):
    storage = open_storage("s3://no-such-bucket", options=bucket.options)
    with pytest.raises(StorageError, match="s3://no-such-bucket/x: does not exist") as error:
        storage.write("x", b"1")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("url", "remote"),
    [
        ("s3://bucket/a", True),
        ("https://host/a", True),
        ("file:///a", False),
        ("/a/b", False),
        ("a:b", False),
        ("./s3://x", False),
        ("", False),
    ],
)
def test_is_remote(url, remote):
    assert is_remote(url) is remote


NAMES = st.text(
    st.characters(blacklist_characters="/", blacklist_categories=["Cc", "Cs", "Zs", "Zl", "Zp"]), min_size=1
)


@given(st.lists(NAMES, min_size=1, max_size=3).map("/".join))
def test_web_names_survive_quoting(name):
    root, found = split_url(f"https://host.org:8080/{quote(name)}")
    assert (root, found) == ("https://host.org:8080", name)
    assert is_remote(f"{root}/{quote(name)}")


@given(st.lists(NAMES, min_size=1, max_size=3).map("/".join))
def test_object_names_are_taken_as_they_are(name):
    assert split_url(f"s3://bucket/{name}") == ("s3://bucket", name)


@pytest.mark.parametrize("url", ["s3://bucket", "s3://bucket/", "https:///name", "name"])
def test_urls_that_name_nothing(url):
    with pytest.raises(StorageError, match="expected <scheme>"):
        split_url(url)


def test_web_queries_are_refused():
    with pytest.raises(StorageError, match="query"):
        split_url("https://host/name?token=1")
