"""Credentials from the files that AWS' own tools read."""

import pytest

from avid_pipeline.shards_spec.credentials import aws_profile_options, with_aws_profile
from avid_pipeline.shards_spec.errors import StorageError
from avid_pipeline.shards_spec.storage import open_storage

CREDENTIALS = """
[default]
aws_access_key_id = plain
aws_secret_access_key = secret%with=signs
[research]
aws_access_key_id = other
aws_secret_access_key = hidden
aws_session_token = short-lived
"""
CONFIG = """
[default]
region = eu-central-1
[profile research]
region = us-west-2
endpoint_url = http://storage:9000
"""


@pytest.fixture
def home(tmp_path):
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws" / "credentials").write_text(CREDENTIALS)
    (tmp_path / ".aws" / "config").write_text(CONFIG)
    return {"HOME": str(tmp_path)}


def test_profiles(home):
    assert aws_profile_options(home) == {
        "aws_access_key_id": "plain",
        "aws_secret_access_key": "secret%with=signs",
        "aws_region": "eu-central-1",
    }
    assert aws_profile_options({**home, "AWS_PROFILE": "research"}) == {
        "aws_access_key_id": "other",
        "aws_secret_access_key": "hidden",
        "aws_session_token": "short-lived",
        "aws_region": "us-west-2",
        "aws_endpoint": "http://storage:9000",
    }


def test_the_environment_and_given_options_go_first(home):
    in_environment = {**home, "AWS_ACCESS_KEY_ID": "mine", "AWS_REGION": "here"}
    assert aws_profile_options(in_environment) == {}
    given = {"access_key_id": "mine", "secret_access_key": "mine too", "endpoint": "http://elsewhere"}
    assert with_aws_profile(given, {**home, "AWS_PROFILE": "research"}) == {"aws_region": "us-west-2", **given}
    public = with_aws_profile({"aws_skip_signature": "true"}, home)
    assert public == {"aws_skip_signature": "true", "aws_region": "eu-central-1"}


def test_other_places_and_no_files(home, tmp_path):
    assert aws_profile_options({"HOME": str(tmp_path / "nobody")}) == {}
    moved = (tmp_path / ".aws" / "credentials").rename(tmp_path / "elsewhere")
    assert "aws_access_key_id" not in aws_profile_options(home)
    found = aws_profile_options({**home, "AWS_SHARED_CREDENTIALS_FILE": str(moved)})
    assert found["aws_access_key_id"] == "plain"


def test_mistakes_are_clear_errors(home, tmp_path):
    with pytest.raises(StorageError, match="AWS_PROFILE=nobody: no such profile"):
        aws_profile_options({**home, "AWS_PROFILE": "nobody"})
    (tmp_path / ".aws" / "credentials").write_text("no section\n")
    with pytest.raises(StorageError, match=r"credentials: is no AWS"):
        aws_profile_options(home)


def test_a_real_server_is_reached_with_a_profile_alone(home, make_bucket, tmp_path, monkeypatch):
    bucket = make_bucket()
    lines = "\n".join(f"{key} = {bucket.options[key]}" for key in ("aws_access_key_id", "aws_secret_access_key"))
    (tmp_path / ".aws" / "credentials").write_text(f"[default]\n{lines}\n")
    (tmp_path / ".aws" / "config").write_text(
        f"[default]\nregion = us-east-1\nendpoint_url = {bucket.options['aws_endpoint']}\n"
    )
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", home["HOME"])
    storage = open_storage(bucket.url)
    storage.write("x", b"content")
    assert storage.read("x") == b"content"
