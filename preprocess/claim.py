"""Whose root it is: a conversion goes on only where the same conversion was begun."""

import json
import shutil
from collections.abc import Iterator
from typing import Any

from avid_pipeline.preprocess.build import BUILDING_PREFIX, PROGRESS_FOLDER
from avid_pipeline.preprocess.errors import PreprocessError
from avid_pipeline.preprocess.settings import Settings
from avid_pipeline.preprocess.sources.base import SourceList
from avid_pipeline.shards_spec.manifest import MANIFEST_NAME, QUARANTINE_NAME, Parameters, fingerprint
from avid_pipeline.shards_spec.storage import Storage

_JOB_NAME = f"{PROGRESS_FOLDER}/job.json"


def describe(listing: SourceList, parameters: Parameters, settings: Settings) -> dict[str, Any]:
    """All that decides what a conversion writes, as JSON; limits and timeouts may change from run to run."""
    sources = [
        [source.name, source.id, list(source.labels), list(source.subsets), source.key_name]
        for source in sorted(listing.sources, key=lambda source: source.name)
    ]
    return {
        "dataset": listing.dataset,
        "split": listing.split,
        "modalities": list(listing.modalities),
        "missing_audio": settings.missing_audio,
        "trim": listing.trim,
        "classes_fingerprint": fingerprint(list(listing.classes)),
        "sources": len(listing.sources),
        "sources_fingerprint": fingerprint(sources),
        "parameters": parameters.model_dump(mode="json"),
    }


def claim(storage: Storage, job: dict[str, Any], overwrite: bool) -> None:
    """Make the root this job's: go on with the same job, refuse another, or remove it when told to."""
    if storage.exists(_JOB_NAME):
        found = _parse_job(storage.read(_JOB_NAME))
        if found == job and not overwrite:
            return
        if not overwrite:
            changes = "; ".join(_differences(found, job))
            raise PreprocessError(
                f"{storage.url}: holds a conversion that differs from this one: {changes}. "
                "Give another folder, the same options, or --overwrite to start anew"
            )
        _remove(storage)
    elif storage.exists(MANIFEST_NAME):
        raise PreprocessError(f"{storage.url}: holds a finished data set from elsewhere; give another folder")
    storage.write(_JOB_NAME, json.dumps(job, indent=1, ensure_ascii=False).encode())


def _parse_job(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return "unreadable"


def _differences(found: Any, wanted: Any, field: str = "") -> Iterator[str]:
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in sorted(found.keys() | wanted.keys()):
            yield from _differences(found.get(key), wanted.get(key), f"{field}.{key}" if field else key)
    elif found != wanted:
        yield f"{field} was {found!r} and is now {wanted!r}"


def _remove(storage: Storage) -> None:
    """Remove a conversion, the manifest first so that nothing half removed looks finished."""
    storage.delete(MANIFEST_NAME)
    storage.delete(QUARANTINE_NAME)
    for name in list(storage.names()):
        if name.startswith(("shard-", f"{PROGRESS_FOLDER}/")):
            storage.delete(name)
    remove_leftovers(storage)


def remove_leftovers(storage: Storage) -> None:
    """Remove the unfinished shards of workers that were killed."""
    if storage.local_root is not None:
        for folder in storage.local_root.glob(f"{BUILDING_PREFIX}*"):
            shutil.rmtree(folder, ignore_errors=True)
