"""What checkpoint folders are called, which are complete, and their ``checkpoint.json``."""

import hashlib
import json
import re
from typing import Any, Literal

from pydantic import ValidationError

from avid_pipeline.errors import CheckpointError, StorageError
from avid_pipeline.models.pretrained import LATEST_NAME
from avid_pipeline.shards_spec.manifest import Record, SpectrogramStatistics, describe_validation_error
from avid_pipeline.shards_spec.storage import Storage

RECORD_NAME = "checkpoint.json"
TRAINER_NAME = "trainer.pt"
BANK_NAME = "memory_bank.zarr"
FOLDER = "checkpoints"
_OWN_CHECKSUM = "own_sha256"
_STEP = re.compile(r"step-(\d{8,})")


class CheckpointRecord(Record):
    """``checkpoint.json``.

    Attributes:
        format_version: of checkpoint folders, 1.
        stream: where the run stands in its data; see :class:`~avid_pipeline.streams.state.StreamState`. None for a
            checkpoint of no run of ours.
        config: the run's configuration, as plain data; None where it is not known.
        spectrogram_statistics: what sound was normalised with; None where it is not known.
        versions: of avid-pipeline and torch.
        sha256: checksums of the other files, but the memory bank, whose chunks have their own.
        source: what a published checkpoint was imported from; None for our own.
    """

    format_version: Literal[1] = 1
    stream: dict[str, str | int] | None
    config: dict[str, Any] | None
    spectrogram_statistics: SpectrogramStatistics | None
    versions: dict[str, str]
    sha256: dict[str, str]
    source: str | None = None


def checkpoint_name(step: int) -> str:
    """Name of a step's checkpoint folder, relative to the run's root."""
    return f"{FOLDER}/step-{step:08d}"


def step_of(name: str) -> int:
    """The step of a name that :func:`checkpoint_name` made."""
    found = _STEP.fullmatch(name.removeprefix(f"{FOLDER}/"))
    if found is None:
        raise CheckpointError(f"{name}: is no checkpoint's name; expected one such as {checkpoint_name(100)}")
    return int(found[1])


def file_of(name: str, file: str) -> str:
    """A file of a checkpoint, relative to the root; the name of the root itself is empty."""
    return f"{name}/{file}" if name else file


def list_folders(root: Storage) -> dict[str, bool]:
    """Checkpoint folders below a run's root, oldest first, and whether each is complete.

    Raises:
        StorageError: the root cannot be listed.
    """
    folder = root.local_path(FOLDER)
    complete: dict[str, bool] = {}
    if folder is None:
        for path in root.names(FOLDER):
            name, _, file = path.removeprefix(f"{FOLDER}/").partition("/")
            complete[name] = complete.get(name, False) or file == RECORD_NAME
    elif folder.is_dir():
        try:
            complete = {path.name: (path / RECORD_NAME).is_file() for path in folder.iterdir() if path.is_dir()}
        except OSError as error:
            raise StorageError(f"{folder}: cannot list: {error.strerror}; is it readable?") from error
    names = {f"{FOLDER}/{name}": done for name, done in complete.items() if _STEP.fullmatch(name)}
    return dict(sorted(names.items(), key=lambda item: step_of(item[0])))


def list_checkpoints(root: Storage) -> list[str]:
    """Names of the complete checkpoints below a run's root, oldest first.

    Raises:
        StorageError: the root cannot be listed.
    """
    return [name for name, complete in list_folders(root).items() if complete]


def named_latest(root: Storage) -> str | None:
    """What a run's file ``latest`` says, be it true or not; None without that file.

    Raises:
        StorageError: it cannot be read.
    """
    if not root.exists(LATEST_NAME):
        return None
    return root.read(LATEST_NAME).decode(errors="replace").strip()


def latest_checkpoint(root: Storage) -> str | None:
    """The newest checkpoint's name below a run's root: what ``latest`` says, else the newest complete one, else None.

    Raises:
        StorageError: the root cannot be read.
    """
    named = named_latest(root)
    if named is not None:
        return named
    # A first save that was killed after its record and before ``latest``.
    return next(reversed(list_checkpoints(root)), None)


def locate_checkpoint(folder: Storage) -> str:
    """Where a checkpoint folder's (empty), or a run folder's newest checkpoint's files are, relative to the folder.

    Raises:
        CheckpointError: it is neither.
    """
    try:
        name = "" if folder.exists(RECORD_NAME) else latest_checkpoint(folder)
    except StorageError as error:
        raise CheckpointError(str(error)) from error
    if name is None:
        raise CheckpointError(
            f"{folder.url_of(RECORD_NAME)}: does not exist, nor does {LATEST_NAME}; give a finished checkpoint or run "
            "folder"
        )
    return name


def has_record(folder: Storage) -> bool:
    """Whether a folder is a checkpoint or run folder of ours."""
    return folder.exists(RECORD_NAME) or latest_checkpoint(folder) is not None


def read_record(folder: Storage, name: str | None = None) -> CheckpointRecord:
    """Read ``checkpoint.json``.

    Args:
        folder: a run or checkpoint folder.
        name: the checkpoint, relative to the folder; by default the folder itself, or the run's newest.

    Raises:
        CheckpointError: there is none, or it is damaged.
        StorageError: it is there and cannot be read now.
    """
    file = file_of(locate_checkpoint(folder) if name is None else name, RECORD_NAME)
    try:
        data = folder.read(file)
    except StorageError as error:
        if folder.exists(file):
            raise
        raise CheckpointError(f"{error} (expected a finished checkpoint or run folder)") from error
    return _parse(data, folder.url_of(file))


def record_bytes(record: CheckpointRecord) -> bytes:
    """The content of ``checkpoint.json``: a record, and the checksum of all that it says."""
    content = record.model_dump(mode="json")
    return (json.dumps(content | {_OWN_CHECKSUM: _digest(content)}, indent=1) + "\n").encode()


def _parse(data: bytes, url: str) -> CheckpointRecord:
    try:
        content = json.loads(data)
    except ValueError as error:
        raise CheckpointError(f"{url}: is no JSON ({error}); the file is damaged, use an earlier checkpoint") from error
    claimed = content.pop(_OWN_CHECKSUM, None) if isinstance(content, dict) else None
    try:
        record = CheckpointRecord.model_validate_json(json.dumps(content))
    except ValidationError as error:
        raise CheckpointError(f"{url}: {describe_validation_error(error)}") from error
    if claimed != _digest(content):
        raise CheckpointError(
            f"{url}: does not have the checksum that it gives as {_OWN_CHECKSUM}; the file is damaged or edited, use "
            "an earlier checkpoint"
        )
    return record


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
