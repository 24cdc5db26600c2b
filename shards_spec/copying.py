"""Copying a data set between any two storages: checked on the way, and resumable.

Every shard's SHA-256 is computed while it passes, and compared with the manifest before the copy gets its name: what
is damaged is never committed. When shard and index are in place, ``_progress/copied-<shard>.json`` notes the size and
SHA-256 that passed. A later run skips a shard only with such a note that fits the manifest, and with both files there
at the noted sizes. The note is needed because no object store tells the SHA-256 of what it holds, and a size alone
does not tell a right shard from a wrong one; without the note all bytes would have to be read back. The manifest is
written last, so a root with a manifest is complete.
"""

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from pydantic import Field, ValidationError

from avid_pipeline.shards_spec.errors import AvidPipelineError, ShardError, StorageError
from avid_pipeline.shards_spec.manifest import (
    MANIFEST_NAME,
    QUARANTINE_NAME,
    Manifest,
    Record,
    ShardInfo,
    read_manifest,
)
from avid_pipeline.shards_spec.parallel import in_threads
from avid_pipeline.shards_spec.sequential import SequentialReader
from avid_pipeline.shards_spec.shard_file import parse_index
from avid_pipeline.shards_spec.storage import WRITING_PREFIX, Storage

PROGRESS_FOLDER = "_progress"
COPY_NAME = f"{PROGRESS_FOLDER}/copy.json"
_CONVERSION_NAME = f"{PROGRESS_FOLDER}/job.json"
_SHARDS_NAMED = 10
_LOOKING_THREADS = 16


class CopyNote(Record):
    """``_progress/copy.json``: which data set is being copied to this root."""

    kind: Literal["avid-shards copy"] = "avid-shards copy"
    manifest_fingerprint: str


class CopiedShard(Record):
    """``_progress/copied-<shard>.json``: a shard that is in its place, with its index.

    Attributes:
        name: of the shard.
        bytes: of the shard.
        sha256: of the bytes that were written.
        index_bytes: size of its index.
        index_sha256: of the index.
    """

    name: str
    bytes: int = Field(ge=0)
    sha256: str
    index_bytes: int = Field(ge=0)
    index_sha256: str


@dataclass(frozen=True)
class CopyResult:
    """What a copy did: shards and bytes copied now, and shards that were there already."""

    copied: int
    copied_bytes: int
    skipped: int


class _StoppedError(AvidPipelineError):
    """Another shard failed or the user interrupted: what is under way is given up."""


def copy_dataset(
    source: Storage,
    destination: Storage,
    *,
    workers: int = 4,
    on_planned: Callable[[int, int], object] = lambda total, done: None,
    on_bytes: Callable[[int], object] = lambda count: None,
) -> CopyResult:
    """Copy a data set; what an earlier, interrupted copy of it finished is kept.

    Memory is bounded by some tens of megabytes for every worker, whatever the size of a shard. A damaged shard does
    not stop the others; it is not committed, and the manifest is not written.

    Args:
        source: root of a finished data set.
        destination: root to write; must be empty, or hold this data set or a part of it.
        workers: shards under way at once (threads).
        on_planned: called once with the bytes of all shards and of those that are there already.
        on_bytes: called for every piece that was read, from any thread.

    Raises:
        StorageError: a root cannot be read or written, or the destination holds something else.
        ManifestError: the source's manifest is missing or invalid.
        ShardError: shards of the source are damaged; the message names them.
    """
    manifest = read_manifest(source)
    manifest_bytes = source.read(MANIFEST_NAME)
    _claim(source, destination, manifest)
    _remove_unfinished(destination)
    there = in_threads(lambda shard: _is_copied(destination, shard), manifest.shards, _LOOKING_THREADS)
    waiting = [shard for shard, copied in zip(manifest.shards, there, strict=True) if not copied]
    total, size = (sum(shard.bytes for shard in shards) for shards in (manifest.shards, waiting))
    on_planned(total, total - size)
    damaged = _copy_shards(source, destination, waiting, workers, on_bytes)
    if damaged:
        shown = "".join(f"\n  {error}" for error in damaged[:_SHARDS_NAMED])
        more = f"\n  … and {len(damaged) - _SHARDS_NAMED} more" if len(damaged) > _SHARDS_NAMED else ""
        raise ShardError(
            f"{source.url}: {len(damaged)} of {len(manifest.shards)} shards are damaged and were not copied; mend them "
            f"and run the command again (the others are kept):{shown}{more}"
        )
    _copy_quarantine(source, destination, manifest)
    destination.write(MANIFEST_NAME, manifest_bytes)
    return CopyResult(len(waiting), size, len(manifest.shards) - len(waiting))


def _claim(source: Storage, destination: Storage, manifest: Manifest) -> None:
    """Refuse a destination that holds anything but this data set or a part of it; note whose it is now."""
    if _same_place(source, destination):
        raise StorageError(f"{destination.url}: is the source itself; give another destination")
    fingerprint = manifest.fingerprint()
    other = f"{destination.url}: holds {{}}, not the one at {source.url}; give another, empty destination"
    if destination.exists(MANIFEST_NAME):
        found = read_manifest(destination)
        if found.fingerprint() != fingerprint:
            raise StorageError(other.format(f"a different data set ({found.dataset} {found.split})"))
    if destination.exists(COPY_NAME):
        try:
            note = CopyNote.model_validate_json(destination.read(COPY_NAME))
        except ValidationError as error:
            raise StorageError(
                f"{destination.url_of(COPY_NAME)}: is no note of a copy, so it is unknown what this root holds; give "
                "another, empty destination"
            ) from error
        if note.manifest_fingerprint != fingerprint:
            raise StorageError(other.format("a part of a different data set"))
        return
    if not destination.exists(MANIFEST_NAME):
        if destination.exists(_CONVERSION_NAME):
            raise StorageError(other.format("an unfinished conversion"))
        first = [name for shard in manifest.shards[:1] for name in (shard.name, shard.index_name)]
        for name in [QUARANTINE_NAME, *first]:
            if destination.exists(name):
                raise StorageError(other.format(f"{name} of an unknown data set"))
    note = CopyNote(manifest_fingerprint=fingerprint)
    destination.write(COPY_NAME, json.dumps(note.model_dump()).encode())


def _same_place(source: Storage, destination: Storage) -> bool:
    if source.local_root is not None and destination.local_root is not None:
        return source.local_root.samefile(destination.local_root)
    return bool(source.store == destination.store)


def _remove_unfinished(destination: Storage) -> None:
    """Remove what a killed run left behind in a local folder."""
    if destination.local_root is None:
        return
    for path in destination.local_root.glob(f"{WRITING_PREFIX}*"):
        path.unlink(missing_ok=True)


def _note_name(shard: ShardInfo) -> str:
    return f"{PROGRESS_FOLDER}/copied-{shard.name.removesuffix('.tar')}.json"


def _is_copied(destination: Storage, shard: ShardInfo) -> bool:
    """Whether a shard is in its place and right."""
    if not destination.exists(_note_name(shard)):
        return False
    try:
        note = CopiedShard.model_validate_json(destination.read(_note_name(shard)))
    except ValidationError:
        return False
    right = (note.name, note.bytes, note.sha256) == (shard.name, shard.bytes, shard.sha256)
    if not right or destination.size(shard.name) != note.bytes:
        return False
    return destination.size(shard.index_name) == note.index_bytes


def _copy_shards(
    source: Storage, destination: Storage, shards: list[ShardInfo], workers: int, on_bytes: Callable[[int], object]
) -> list[ShardError]:
    """Copy shards at once; return what is wrong with those that are damaged."""
    stop = threading.Event()
    causes: list[BaseException] = []

    def copy(shard: ShardInfo) -> ShardError | None:
        try:
            _copy_shard(source, destination, shard, on_bytes, stop)
        except ShardError as error:
            return error
        except BaseException as error:
            causes.append(error)
            stop.set()
            raise
        return None

    try:
        return [error for error in in_threads(copy, shards, workers, stop) if error is not None]
    except _StoppedError:
        # A shard that stopped because of another may come first in the order of shards.
        raise next(error for error in causes if not isinstance(error, _StoppedError)) from None


def _copy_shard(
    source: Storage, destination: Storage, shard: ShardInfo, on_bytes: Callable[[int], object], stop: threading.Event
) -> None:
    if stop.is_set():
        raise _StoppedError("stopped")
    index_data = _checked_index(source, shard)
    # A shard that is copied again must not look finished while it is not.
    destination.delete(_note_name(shard))
    destination.write(shard.index_name, index_data)
    destination.write_pieces(shard.name, _checked_pieces(source, shard, on_bytes, stop), shard.bytes)
    note = CopiedShard(
        name=shard.name,
        bytes=shard.bytes,
        sha256=shard.sha256,
        index_bytes=len(index_data),
        index_sha256=hashlib.sha256(index_data).hexdigest(),
    )
    destination.write(_note_name(shard), json.dumps(note.model_dump()).encode())


def _checked_index(source: Storage, shard: ShardInfo) -> bytes:
    where = source.url_of(shard.index_name)
    if not source.exists(shard.index_name):
        raise ShardError(f"{where}: does not exist")
    data = source.read(shard.index_name)
    samples = len(parse_index(data, where))
    if samples != shard.samples:
        raise ShardError(f"{where}: expected {shard.samples} samples as in the manifest, found {samples}")
    return data


def _checked_pieces(
    source: Storage, shard: ShardInfo, on_bytes: Callable[[int], object], stop: threading.Event
) -> Iterator[bytes]:
    """A shard's content; raises at its end, before it is committed, where it is not what the manifest says."""
    where = source.url_of(shard.name)
    size = source.size(shard.name)
    if size != shard.bytes:
        found = "none" if size is None else str(size)
        raise ShardError(f"{where}: expected {shard.bytes} bytes as in the manifest, found {found}")
    with SequentialReader(source, shard.name) as reader:
        for piece in reader.pieces():
            if stop.is_set():
                raise _StoppedError("stopped")
            on_bytes(len(piece))
            yield piece
        if reader.count != shard.bytes or reader.hexdigest() != shard.sha256:
            raise ShardError(
                f"{where}: expected sha256 {shard.sha256} over {shard.bytes} bytes as in the manifest, "
                f"found {reader.hexdigest()} over {reader.count}"
            )


def _copy_quarantine(source: Storage, destination: Storage, manifest: Manifest) -> None:
    size = source.size(QUARANTINE_NAME)
    if size is None:
        if manifest.quarantined:
            raise StorageError(
                f"{source.url_of(QUARANTINE_NAME)}: does not exist, though the manifest counts {manifest.quarantined} "
                "sources in it; the source is not complete"
            )
        return
    with SequentialReader(source, QUARANTINE_NAME) as reader:
        destination.write_pieces(QUARANTINE_NAME, reader.pieces(), size)
