"""A whole conversion: plan the shards, have them built, write the manifest last."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from avid_pipeline.preprocess.build import ShardReport, ShardTask, read_report
from avid_pipeline.preprocess.claim import claim, describe, remove_leftovers
from avid_pipeline.preprocess.convert import PlannedSource
from avid_pipeline.preprocess.errors import PreprocessError
from avid_pipeline.preprocess.quarantine import QuarantineEntry, to_jsonl
from avid_pipeline.preprocess.settings import Settings
from avid_pipeline.preprocess.sources.base import Source, SourceList
from avid_pipeline.preprocess.spectrogram_file import SpectrogramSums
from avid_pipeline.shards_spec.manifest import (
    MANIFEST_NAME,
    QUARANTINE_NAME,
    WITH_AUDIO,
    Manifest,
    Modality,
    Parameters,
    ShardInfo,
    index_ranges,
)
from avid_pipeline.shards_spec.sample import assign_keys
from avid_pipeline.shards_spec.storage import Storage, open_storage


class Executor(Protocol):
    """Runs shard tasks somewhere and yields their reports in any order."""

    def run(self, tasks: list[ShardTask], on_source: Callable[[], object]) -> Iterator[ShardReport]:
        """Build all tasks; call ``on_source`` once for every source that is through."""


@dataclass(frozen=True)
class JobResult:
    """What a conversion gave: the manifest, and the sources that did not become samples."""

    manifest: Manifest
    quarantined: tuple[QuarantineEntry, ...]

    @property
    def quarantined_fraction(self) -> float:
        """Quarantined sources as a share of all."""
        return len(self.quarantined) / (len(self.quarantined) + self.manifest.num_samples)


def plan_tasks(
    listing: SourceList, parameters: Parameters, root: str, settings: Settings | None = None
) -> list[ShardTask]:
    """Divide a data set into shard tasks.

    Sources are sorted by name, then shuffled by ``numpy.random.default_rng(parameters.shuffle_seed)``; shard ``n``
    gets the ``n``-th run of ``samples_per_shard`` sources. What is quarantined later leaves its shard smaller, so
    that the plan depends on names and parameters alone.

    Raises:
        SampleError: two sources have the same name.
    """
    settings = settings or Settings(modalities=listing.modalities)
    ordered = sorted(listing.sources, key=lambda source: source.name)
    keys = assign_keys(_names_for_keys(ordered))
    positions = {name: position for position, name in enumerate(listing.classes)}
    items = [
        PlannedSource(source, key, tuple(positions[label] for label in source.labels))
        for source, key in zip(ordered, keys, strict=True)
    ]
    order = np.random.default_rng(parameters.shuffle_seed).permutation(len(items))
    shuffled = [items[place] for place in order]
    size = parameters.samples_per_shard
    return [
        ShardTask(number, root, tuple(shuffled[first : first + size]), parameters, settings)
        for number, first in enumerate(range(0, len(shuffled), size))
    ]


def run_job(
    listing: SourceList,
    parameters: Parameters,
    root: str,
    executor: Executor,
    *,
    settings: Settings | None = None,
    overwrite: bool = False,
    retry_quarantined: bool = False,
    on_planned: Callable[[int, int], object] | None = None,
    on_source: Callable[[], object] = lambda: None,
) -> JobResult:
    """Convert a data set; shards that an earlier, interrupted run finished are kept.

    Args:
        listing: what to convert.
        parameters: how to store it.
        root: URL of the data set to write.
        executor: what builds the shards.
        settings: what a source may cost, and so on; by default, and always for the modalities, as the listing says.
        overwrite: remove a data set or an unfinished conversion that is there, instead of going on with it.
        retry_quarantined: try sources again that an earlier run quarantined; their shards are built again, with the
            samples that they have. Instance indices change.
        on_planned: called once with the number of sources in all and of those already done.
        on_source: called for every source that is through.

    Raises:
        PreprocessError: the root holds a conversion of other sources or with other parameters, or nothing could
            be converted.
        StorageError: the root cannot be written.
    """
    settings = settings or Settings(modalities=listing.modalities)
    storage = open_storage(root, create=True, options=settings.storage_options)
    tasks = plan_tasks(listing, parameters, storage.url, settings)
    claim(storage, describe(listing, parameters, settings), overwrite)
    reports = {task.number: report for task in tasks if (report := read_report(storage, task.number))}
    finished = {number: report for number, report in reports.items() if not (retry_quarantined and report.quarantined)}
    waiting = [replace(task, retry=task.number in reports) for task in tasks if task.number not in finished]
    if on_planned is not None:
        total = sum(len(task.sources) for task in tasks)
        on_planned(total, total - sum(len(task.sources) for task in waiting))
    if waiting:
        storage.delete(MANIFEST_NAME)  # what has a manifest is complete
    for report in executor.run(waiting, on_source):
        finished[report.number] = report
    missing = [task.name for task in tasks if task.number not in finished]
    if missing:
        raise PreprocessError(
            f"{root}: {len(missing)} shards were not built, first {missing[0]}; run the command again"
        )
    return _conclude(storage, listing, tasks, [finished[task.number] for task in tasks])


def _conclude(storage: Storage, listing: SourceList, tasks: list[ShardTask], reports: list[ShardReport]) -> JobResult:
    quarantined = tuple(
        sorted((entry for report in reports for entry in report.quarantined), key=lambda entry: entry.source)
    )
    storage.write(QUARANTINE_NAME, to_jsonl(quarantined))
    shards = _shards(reports)
    if not shards:
        reasons = sorted({entry.reason for entry in quarantined})
        raise PreprocessError(
            f"{storage.url}: not one of {len(quarantined)} sources could be converted ({', '.join(reasons)}); "
            f"see {storage.url_of(QUARANTINE_NAME)}"
        )
    modalities, subsets = _contents(listing, tasks, reports)
    parameters = tasks[0].parameters
    sums = SpectrogramSums()
    for report in reports:
        sums = sums.plus(report.sums)
    manifest = Manifest(
        dataset=listing.dataset,
        split=listing.split,
        parameters=parameters,
        parameters_fingerprint=parameters.fingerprint(),
        modalities=modalities,
        classes=listing.classes,
        spectrogram_statistics=sums.statistics(),
        shards=shards,
        quarantined=len(quarantined),
        subsets=subsets,
    )
    storage.write(MANIFEST_NAME, manifest.to_json())
    remove_leftovers(storage)
    return JobResult(manifest, quarantined)


def _shards(reports: list[ShardReport]) -> tuple[ShardInfo, ...]:
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
    return tuple(shards)


def _contents(
    listing: SourceList, tasks: list[ShardTask], reports: list[ShardReport]
) -> tuple[tuple[Modality, ...], dict[str, tuple[tuple[int, int], ...]]]:
    """The modalities that every sample has, and the named subsets."""
    members: dict[str, list[int]] = {name: [] for name in listing.subsets}
    without_audio: set[int] = set()
    index = 0
    for task, report in zip(tasks, reports, strict=True):
        rejected = {entry.source for entry in report.quarantined}
        without_audio.update(index + place for place in report.without_audio)
        for planned in task.sources:
            if planned.source.name not in rejected:
                for name in planned.source.subsets:
                    members[name].append(index)
                index += 1
    modalities = listing.modalities
    if "audio" in modalities and without_audio:
        modalities = tuple(name for name in modalities if name != "audio")
        members[WITH_AUDIO] = [place for place in range(index) if place not in without_audio]
    return modalities, {name: index_ranges(places) for name, places in members.items()}


def _names_for_keys(sources: list[Source]) -> list[str]:
    """The names that keys are made from: without ending, except where two would be equal then."""
    shortened = [source.key_name or _without_ending(source) for source in sources]
    wanted = Counter(shortened)
    whole = {source.name for source in sources}
    return [
        short if wanted[short] == 1 and (short not in whole or short == source.name) else source.name
        for source, short in zip(sources, shortened, strict=True)
    ]


def _without_ending(source: Source) -> str:
    folder, slash, file = source.name.rpartition("/")
    return folder + slash + (source.id if file.startswith(source.id) and source.id else file)
