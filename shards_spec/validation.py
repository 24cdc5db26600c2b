"""Checking a data set against the specification: everything is read once, every problem is named."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from avid_pipeline.shards_spec.deep_validation import SpectrogramSums, statistics_problems
from avid_pipeline.shards_spec.manifest import (
    MANIFEST_NAME,
    QUARANTINE_NAME,
    WITH_AUDIO,
    Manifest,
    ShardInfo,
    index_ranges,
    read_manifest,
)
from avid_pipeline.shards_spec.parallel import in_processes
from avid_pipeline.shards_spec.shard_validation import ShardCheck, ShardFindings, check_shard
from avid_pipeline.shards_spec.spectrogram import CEILING_DB, FLOOR_DB
from avid_pipeline.shards_spec.storage import Storage

# Below this, starting processes takes longer than hashing.
_WORTH_PROCESSES = 256 << 20


@dataclass
class ValidationReport:
    """What a validation found.

    Attributes:
        samples: how many samples were checked.
        bytes: how many bytes of shards were read.
        problems: one line each, naming shard and key; empty when the data set is sound.
    """

    samples: int = 0
    bytes: int = 0
    problems: list[str] = field(default_factory=list)


def validate(
    storage: Storage,
    on_shard: Callable[[ShardInfo], object] | None = None,
    *,
    deep: bool = False,
    workers: int = 1,
    on_sample: Callable[[], object] = lambda: None,
) -> ValidationReport:
    """Check every shard of a data set: checksums, counts, index, records and shapes.

    A worker holds one sample at a time, whatever the size of a shard. Shards are shared out over workers, so that no
    more of them are busy than there are shards.

    Args:
        storage: the root.
        on_shard: called after each shard, for progress.
        deep: decode every frame of every video and look at every spectrogram value, too.
        workers: number of processes.
        on_sample: called after each sample, for progress.

    Raises:
        StorageError: the root cannot be read.
        ManifestError: the manifest is missing or invalid; nothing can be checked then.
        AvidPipelineError: a worker process died.
    """
    manifest = read_manifest(storage)
    checks = [
        ShardCheck(storage, shard, manifest.parameters, manifest.modalities, len(manifest.classes), deep)
        for shard in manifest.shards
    ]
    if not deep and sum(shard.bytes for shard in manifest.shards) < _WORTH_PROCESSES:
        workers = 1
    findings = []
    for found in in_processes(check_shard, checks, workers, on_sample, lambda check: check.shard.name):
        findings.append(found)
        if on_shard is not None:
            on_shard(found.shard)
    findings.sort(key=lambda found: found.shard.first_index)
    report = ValidationReport(sum(len(found.keys) for found in findings), sum(found.bytes for found in findings))
    report.problems += [problem for found in findings for problem in found.problems]
    report.problems += _repeated_keys(findings)
    report.problems += _quarantine_problems(storage, manifest)
    report.problems += _statistics_problems(manifest, findings, deep)
    report.problems += _with_audio_problems(manifest, findings)
    return report


def _repeated_keys(findings: list[ShardFindings]) -> Iterator[str]:
    seen: dict[str, str] = {}
    for found in findings:
        for key in found.keys:
            if key.casefold() in seen:
                yield f"{found.shard.name}: key {key} was used in {seen[key.casefold()]} (case ignored)"
            seen[key.casefold()] = found.shard.name


def _quarantine_problems(storage: Storage, manifest: Manifest) -> Iterator[str]:
    if not storage.exists(QUARANTINE_NAME):
        if manifest.quarantined:
            yield f"{QUARANTINE_NAME}: does not exist, expected {manifest.quarantined} lines as in the manifest"
        return
    count = 0
    for line in _lines(storage):
        count += 1
        try:
            entry = json.loads(line)
        except ValueError as error:
            yield f"{QUARANTINE_NAME}: line {count} is not JSON: {error}"
            continue
        fields = ("source", "reason", "detail")
        if not isinstance(entry, dict) or not all(isinstance(entry.get(name), str) for name in fields):
            yield f"{QUARANTINE_NAME}: line {count}: expected an object with the texts {', '.join(fields)}"
    if count != manifest.quarantined:
        yield f"{QUARANTINE_NAME}: expected {manifest.quarantined} lines as in the manifest, found {count}"


def _lines(storage: Storage) -> Iterator[bytes]:
    rest = b""
    for piece in storage.chunks(QUARANTINE_NAME):
        *lines, rest = (rest + piece).split(b"\n")
        yield from lines
    if rest:
        yield rest


def _statistics_problems(manifest: Manifest, findings: list[ShardFindings], deep: bool) -> Iterator[str]:
    statistics, where = manifest.spectrogram_statistics, f"{MANIFEST_NAME}: spectrogram_statistics"
    frames = sum(found.audio_frames for found in findings)
    if statistics is None:
        if frames:
            yield f"{where}: expected those of {frames} spectrogram frames, found null"
        return
    if statistics.frames != frames:
        yield f"{where}.frames: expected {frames} as in the shards, found {statistics.frames}"
    span = CEILING_DB - FLOOR_DB
    for name, values, least, most in (
        ("mean", statistics.mean, FLOOR_DB, CEILING_DB),
        ("std", statistics.std, 0.0, span / 2),
    ):
        for place, value in enumerate(values):
            if not (math.isfinite(value) and least <= value <= most):
                yield f"{where}.{name}: expected {least:g} to {most:g} dB, found {value} at frequency {place}"
                break
    sums = SpectrogramSums()
    for found in findings:
        sums.add(found.sums)
    if deep and sums.frames == statistics.frames:
        yield from statistics_problems(statistics, sums)


def _with_audio_problems(manifest: Manifest, findings: list[ShardFindings]) -> Iterator[str]:
    """Samples may have sound that the manifest does not promise; a subset must list exactly those then."""
    if any(len(found.keys) != found.shard.samples for found in findings):
        return  # The places of samples are not known; that was named already.
    with_audio = [index for found in findings for index in found.with_audio]
    where = f"{MANIFEST_NAME}: subsets.{WITH_AUDIO}"
    if WITH_AUDIO not in manifest.subsets:
        if with_audio and "audio" not in manifest.modalities:
            yield f"{where}: is missing, though {len(with_audio)} samples have sound"
        return
    if manifest.subsets[WITH_AUDIO] != index_ranges(with_audio):
        listed = set(manifest.subset_indices(WITH_AUDIO).tolist())
        wrong = sorted(listed.symmetric_difference(with_audio))
        state = "is listed but has no sound" if wrong[0] in listed else "has sound but is not listed"
        yield f"{where}: expected the {len(with_audio)} samples that have sound, found {len(listed)}; " + (
            f"the first difference is instance {wrong[0]}, which {state}"
        )
