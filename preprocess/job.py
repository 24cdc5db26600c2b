"""A whole conversion: plan the shards, have them built, write the manifest last."""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from avid_pipeline.preprocess.build import (
    BUILDING_PREFIX,
    PROGRESS_FOLDER,
    ShardReport,
    ShardTask,
    combine_sums,
    read_report,
    report_name,
)
from avid_pipeline.preprocess.errors import PreprocessError
from avid_pipeline.preprocess.quarantine import QuarantineEntry, to_jsonl
from avid_pipeline.preprocess.sources.base import Source, SourceList
from avid_pipeline.shards_spec.manifest import (
    MANIFEST_NAME,
    QUARANTINE_NAME,
    Manifest,
    Parameters,
    ShardInfo,
    fingerprint,
)
from avid_pipeline.shards_spec.sample import assign_keys
from avid_pipeline.shards_spec.storage import Storage, open_storage

_JOB_NAME = f"{PROGRESS_FOLDER}/job.json"


class Executor(Protocol):
    """Runs shard tasks somewhere and yields their reports in any order."""

    def run(self, tasks: list[ShardTask], on_source: Callable[[], object]) -> Iterator[ShardReport]:
        """Build all tasks; call ``on_source`` once for every source that is through."""


@dataclass(frozen=True)
class JobResult:
    """What a conversion gave: the manifest, and the sources that did not become samples."""

    manifest: Manifest
    quarantined: tuple[QuarantineEntry, ...]


def plan_tasks(listing: SourceList, parameters: Parameters, root: str) -> list[ShardTask]:
    """Divide a data set into shard tasks.

    Sources are sorted by name, then shuffled by ``numpy.random.default_rng(parameters.shuffle_seed)``; shard ``n``
    gets the ``n``-th run of ``samples_per_shard`` sources. What is quarantined later leaves its shard smaller, so
    that the plan depends on names and parameters alone.
    """
    ordered = sorted(listing.sources, key=lambda source: source.name)
    keys = assign_keys(_names_for_keys(ordered))
    positions = {name: position for position, name in enumerate(listing.classes)}
    items = [
        (source, key, tuple(positions[label] for label in source.labels))
        for source, key in zip(ordered, keys, strict=True)
    ]
    order = np.random.default_rng(parameters.shuffle_seed).permutation(len(items))
    shuffled = [items[place] for place in order]
    size = parameters.samples_per_shard
    return [
        ShardTask(number, root, tuple(shuffled[first : first + size]), parameters)
        for number, first in enumerate(range(0, len(shuffled), size))
    ]


def run_job(
    listing: SourceList,
    parameters: Parameters,
    root: str,
    executor: Executor,
    *,
    overwrite: bool = False,
    on_planned: Callable[[int, int], object] | None = None,
    on_source: Callable[[], object] = lambda: None,
) -> JobResult:
    """Convert a data set; shards that an earlier, interrupted run finished are kept.

    Args:
        listing: what to convert.
        parameters: how.
        root: URL of the data set to write.
        executor: what builds the shards.
        overwrite: remove a data set or an unfinished conversion that is there, instead of going on with it.
        on_planned: called once with the number of sources in all and of those already done.
        on_source: called for every source that is through.

    Raises:
        PreprocessError: the root holds a conversion of other sources or with other parameters, or nothing could
            be converted.
        StorageError: the root cannot be written.
    """
    storage = open_storage(root, create=True)
    tasks = plan_tasks(listing, parameters, storage.url)
    _claim(storage, _describe(listing, parameters), overwrite)
    finished = {task.number: report for task in tasks if (report := read_report(storage, task.number))}
    waiting = [task for task in tasks if task.number not in finished]
    if on_planned is not None:
        total = sum(len(task.sources) for task in tasks)
        on_planned(total, total - sum(len(task.sources) for task in waiting))
    for report in executor.run(waiting, on_source):
        finished[report.number] = report
    missing = [task.name for task in tasks if task.number not in finished]
    if missing:
        raise PreprocessError(
            f"{root}: {len(missing)} shards were not built, first {missing[0]}; run the command again"
        )
    return _conclude(storage, listing, parameters, [finished[task.number] for task in tasks])


def _conclude(storage: Storage, listing: SourceList, parameters: Parameters, reports: list[ShardReport]) -> JobResult:
    quarantined = tuple(
        sorted((entry for report in reports for entry in report.quarantined), key=lambda entry: entry.source)
    )
    storage.write(QUARANTINE_NAME, to_jsonl(quarantined))
    shards: list[ShardInfo] = []
    first_index = 0
    for report in reports:
        if report.samples:
            shards.append(
                ShardInfo(
                    name=report.name,
                    samples=report.samples,
                    bytes=report.bytes,
                    sha256=report.sha256,
                    first_index=first_index,
                )
            )
            first_index += report.samples
    if not shards:
        reasons = sorted({entry.reason for entry in quarantined})
        raise PreprocessError(
            f"{storage.url}: not one of {len(quarantined)} sources could be converted ({', '.join(reasons)}); "
            f"see {storage.url_of(QUARANTINE_NAME)}"
        )
    manifest = Manifest(
        dataset=listing.dataset,
        split=listing.split,
        parameters=parameters,
        parameters_fingerprint=parameters.fingerprint(),
        modalities=("video", "audio"),
        classes=listing.classes,
        spectrogram_statistics=combine_sums(reports),
        shards=tuple(shards),
        quarantined=len(quarantined),
    )
    storage.write(MANIFEST_NAME, manifest.to_json())
    _remove_leftovers(storage)
    return JobResult(manifest, quarantined)


def _names_for_keys(sources: list[Source]) -> list[str]:
    """The names that keys are made from: without ending, except where two would be equal then."""
    shortened = [_without_ending(source) for source in sources]
    wanted = Counter(shortened)
    whole = {source.name for source in sources}
    return [
        short if wanted[short] == 1 and short not in whole else source.name
        for source, short in zip(sources, shortened, strict=True)
    ]


def _without_ending(source: Source) -> str:
    folder, slash, file = source.name.rpartition("/")
    return folder + slash + (source.id if file.startswith(source.id) and source.id else file)


def _describe(listing: SourceList, parameters: Parameters) -> dict[str, Any]:
    return {
        "dataset": listing.dataset,
        "split": listing.split,
        "sources": len(listing.sources),
        "sources_fingerprint": fingerprint([[source.name, list(source.labels)] for source in listing.sources]),
        "parameters": parameters.model_dump(mode="json"),
    }


def _claim(storage: Storage, job: dict[str, Any], overwrite: bool) -> None:
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
    _remove_leftovers(storage)


def _remove_leftovers(storage: Storage) -> None:
    """Remove the unfinished shards of workers that were killed."""
    if storage.local_root is not None:
        for folder in storage.local_root.glob(f"{BUILDING_PREFIX}*"):
            shutil.rmtree(folder, ignore_errors=True)


__all__ = ["Executor", "JobResult", "plan_tasks", "report_name", "run_job"]
