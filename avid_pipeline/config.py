"""Typed configuration from YAML: an unknown key or a wrong type is an error that names the field."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from avid_pipeline.errors import ConfigError


class Settings(BaseModel):
    """Base of everything that a configuration file holds: unknown fields are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


SettingsType = TypeVar("SettingsType", bound=Settings)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, save that ``2e-4`` is a number, as everyone expects."""


_Loader.yaml_implicit_resolvers = {
    first: list(resolvers) for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def load_config(path: Path, kind: type[SettingsType], overrides: Sequence[str] = ()) -> SettingsType:
    """Read a YAML file into a configuration.

    Args:
        path: the file.
        kind: the configuration's class.
        overrides: ``key=value`` strings; keys are dotted paths, values are YAML.

    Raises:
        ConfigError: the file is missing or no YAML mapping, a key is unknown, or a value has the wrong type; the
            message names the field.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: does not exist; see configs/ for the published experiments") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a mapping of settings, found {type(content).__name__}")
    for override in overrides:
        _apply(content, override)
    return parse_config(content, kind, str(path))


def parse_config(content: Any, kind: type[SettingsType], where: str) -> SettingsType:
    """Check plain data (as from YAML or JSON) against a configuration class.

    Raises:
        ConfigError: an unknown key or a wrong type; the message names the field and, for unknown keys, the known.
    """
    try:
        # By way of JSON, where strict checks still take lists for tuples and whole numbers for floats.
        return kind.model_validate_json(json.dumps(content))
    except ValidationError as error:
        problems = "; ".join(_describe(item, kind) for item in error.errors())
        raise ConfigError(f"{where}: {problems}") from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: holds a value that is no number, text, list or mapping: {error}") from error


def _apply(content: dict[Any, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override}: expected key=value, for example --set optimizer.learning_rate=1e-4")
    try:
        value = yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: the value is no YAML: {' '.join(str(error).split())}") from error
    *folders, last = key.split(".")
    place = content
    for folder in folders:
        place = place.setdefault(folder, {})
        if not isinstance(place, dict):
            raise ConfigError(f"--set {override}: {folder} is a value, not a group of settings")
    place[last] = value


def _describe(item: Any, kind: type[BaseModel]) -> str:
    field = ".".join(str(part) for part in item["loc"])
    if item["type"] == "missing":
        return f"{field}: is missing and has no default"
    if item["type"] == "value_error":
        return f"{field}: {item['ctx']['error']}" if field else str(item["ctx"]["error"])
    if item["type"] != "extra_forbidden":
        return f"{field}: {item['msg']}, found {item['input']!r}" if field else str(item["msg"])
    owner: Any = kind
    for part in item["loc"][:-1]:
        owner = owner.model_fields[part].annotation if part in getattr(owner, "model_fields", {}) else None
    known = f"; known here: {', '.join(owner.model_fields)}" if owner is not None else ""
    return f"{field}: unknown key{known}"
