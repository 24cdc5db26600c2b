"""AWS credentials from the usual files, which the object store's client does not read by itself.

Environment variables, container and instance roles are the client's own business, and so are the files of Google and
Azure. Here are only the keys of a profile in ``~/.aws/credentials`` and ``~/.aws/config``.
"""

import configparser
import os
from collections.abc import Mapping
from pathlib import Path

from avid_pipeline.shards_spec.errors import StorageError

_KEYS = ("aws_access_key_id", "aws_secret_access_key", "aws_session_token")


def aws_profile_options(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Options for an ``s3://`` root from the AWS files.

    The profile is ``AWS_PROFILE`` or ``default``; the files are ``AWS_SHARED_CREDENTIALS_FILE`` and
    ``AWS_CONFIG_FILE``, or those in ``~/.aws``. Keys in the environment go before those in files, as everywhere;
    region and endpoint are taken from the files where the environment has none.

    Args:
        environment: instead of ``os.environ``.

    Returns:
        Options as :func:`~avid_pipeline.shards_spec.storage.open_storage` takes them; empty without files.

    Raises:
        StorageError: a file is damaged, or ``AWS_PROFILE`` names a profile that is in neither.
    """
    environment = os.environ if environment is None else environment
    home = Path(environment.get("HOME", "~")).expanduser() / ".aws"
    credentials = _read(Path(environment.get("AWS_SHARED_CREDENTIALS_FILE", home / "credentials")))
    config = _read(Path(environment.get("AWS_CONFIG_FILE", home / "config")))
    name = environment.get("AWS_PROFILE", "default")
    section = "default" if name == "default" else f"profile {name}"
    if "AWS_PROFILE" in environment and name not in credentials and section not in config:
        raise StorageError(f"AWS_PROFILE={name}: no such profile in the AWS credentials or config file; correct it")
    found = config.get(section, {}) | credentials.get(name, {})
    options = {} if "AWS_ACCESS_KEY_ID" in environment else {key: found[key] for key in _KEYS if key in found}
    if "region" in found and not environment.keys() & {"AWS_REGION", "AWS_DEFAULT_REGION"}:
        options["aws_region"] = found["region"]
    if "endpoint_url" in found and not environment.keys() & {"AWS_ENDPOINT", "AWS_ENDPOINT_URL"}:
        options["aws_endpoint"] = found["endpoint_url"]
    return options


def with_aws_profile(options: Mapping[str, str], environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Options of an ``s3://`` root, completed from the AWS files where they say nothing themselves.

    Raises:
        StorageError: as :func:`aws_profile_options`.
    """
    given = {name.lower().removeprefix("aws_") for name in options}
    found = aws_profile_options(environment)
    if "access_key_id" in given or "skip_signature" in given:
        found = {name: value for name, value in found.items() if name not in _KEYS}
    aliases = {"aws_region": {"region", "default_region"}, "aws_endpoint": {"endpoint", "endpoint_url"}}
    return {name: value for name, value in found.items() if not aliases.get(name, set()) & given} | dict(options)


def _read(path: Path) -> dict[str, dict[str, str]]:
    parser = configparser.ConfigParser(interpolation=None, default_section="")
    try:
        parser.read(path, encoding="utf-8")
    except (configparser.Error, UnicodeDecodeError, OSError) as error:
        raise StorageError(f"{path}: is no AWS credentials or config file: {error}; mend or move it") from error
    return {name: dict(parser[name]) for name in parser.sections()}
