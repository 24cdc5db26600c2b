"""Checkpoints: one folder each, complete only when its ``checkpoint.json`` is there; ``latest`` names the newest.

Files of a checkpoint folder:

- ``model.safetensors``: the model's state dict, with the published names;
- ``trainer.pt``: optimizer and loss state, loadable with ``weights_only``;
- ``memory_bank.zarr``: the memory bank and the positives, see :mod:`avid_pipeline.train.bank_snapshot`;
- ``checkpoint.json``: configuration, place in the run, versions and checksums; written last.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from avid_pipeline.collectives import RankGroup
from avid_pipeline.errors import CheckpointError, StorageError
from avid_pipeline.models import AVModel
from avid_pipeline.models.pretrained import LATEST_NAME, WEIGHTS_NAME
from avid_pipeline.shards_spec.manifest import SpectrogramStatistics
from avid_pipeline.shards_spec.storage import Storage
from avid_pipeline.streams.state import StreamState
from avid_pipeline.together import run_together, try_together
from avid_pipeline.train.bank_snapshot import POSITIVES, BankLayout, has_positives, read_rows, write_bank
from avid_pipeline.train.checkpoint_files import (
    clear_folder,
    current_versions,
    read_trainer_state,
    read_weights,
    remove_old,
    set_aside,
    write_durably,
    write_files,
    write_record,
)
from avid_pipeline.train.checkpoint_record import (
    BANK_NAME,
    RECORD_NAME,
    TRAINER_NAME,
    CheckpointRecord,
    checkpoint_name,
    file_of,
    has_record,
    latest_checkpoint,
    list_checkpoints,
    named_latest,
    read_record,
)
from avid_pipeline.train.config import TrainConfig
from avid_pipeline.train.memory_bank import MODALITIES, MemoryBank

__all__ = [
    "BANK_NAME",
    "RECORD_NAME",
    "TRAINER_NAME",
    "CheckpointRecord",
    "has_record",
    "latest_checkpoint",
    "list_checkpoints",
    "read_record",
    "read_weights",
    "restore_bank",
    "restore_model",
    "restore_positives",
    "restore_trainer_state",
    "resume_newest",
    "save_checkpoint",
]


def save_checkpoint(
    root: Storage,
    *,
    stream: StreamState,
    config: TrainConfig,
    statistics: SpectrogramStatistics,
    model: AVModel,
    trainer_state: dict[str, Any],
    bank: MemoryBank,
    positives: Tensor | None = None,
    keep: int | None = None,
    model_state: dict[str, Tensor] | None = None,
) -> str:
    """Write a checkpoint below a run's root and make it the latest.

    Every rank must call this: each writes its own rows of the memory bank, the first rank the rest. A step whose
    complete checkpoint is the latest already is not written again: it holds the same, and replacing it would leave the
    run without it for a while.

    Args:
        root: of the run.
        stream: where the run stands.
        config: the run's.
        statistics: what sound is normalised with.
        model: its state dict is written.
        trainer_state: tensors and plain values that ``torch.load`` takes with ``weights_only``.
        bank: the memory bank.
        positives: of this rank's rows, int64 [len(bank.rows), k].
        keep: newest checkpoints that stay; None for all.
        model_state: written instead of the model's state dict.

    Returns:
        The checkpoint's name, relative to the root.

    Raises:
        StorageError: on all ranks, if one cannot write; the message names the rank and the file.
        CheckpointError: on all ranks, if another run's checkpoint has this name, or the positives do not fit the bank.
        ConfigError: on all ranks, if they do not save the same step.
    """
    name, group = checkpoint_name(stream.step), bank.group
    num_positives = None if positives is None else positives.shape[-1]
    group.require_equal({"step of the checkpoint": stream.step, "positives of an instance": num_positives})

    def begin() -> bool:
        if group.rank > 0:
            return True
        if _is_saved(root, name, stream):
            write_durably(root, LATEST_NAME, f"{name}\n".encode())
            return False
        clear_folder(root, name)
        BankLayout.of(bank, num_positives).write_metadata(root, file_of(name, BANK_NAME))
        return True

    def write_parts() -> dict[str, str]:
        weights = model.state_dict() if model_state is None else model_state
        metadata = file_of(name, f"{BANK_NAME}/zarr.json")
        if not root.exists(metadata):
            raise StorageError(
                f"{root.url_of(metadata)}: written by rank 0, but rank {group.rank} does not see it; --output must be "
                "storage that all machines share, or a URL"
            )
        sha256 = write_files(root, name, weights, trainer_state) if group.rank == 0 else {}
        write_bank(root, file_of(name, BANK_NAME), bank, positives)
        return sha256

    def complete(sha256: dict[str, str]) -> None:
        record = CheckpointRecord(
            stream=stream.to_dict(),
            config=config.model_dump(mode="json"),
            spectrogram_statistics=statistics,
            versions=current_versions(),
            sha256=sha256,
        )
        write_record(root, name, record)
        write_durably(root, LATEST_NAME, f"{name}\n".encode())
        if keep is not None:
            remove_old(root, name, keep)

    if run_together(group, begin)[0]:
        sha256 = run_together(group, write_parts)[0]
        run_together(group, lambda: complete(sha256) if group.rank == 0 else None)
    return name


def _is_saved(root: Storage, name: str, stream: StreamState) -> bool:
    """Whether a checkpoint is complete and the one that the run would go on from."""
    if not root.exists(file_of(name, RECORD_NAME)):
        return False
    named = named_latest(root)
    if named != name and named in list_checkpoints(root):
        return False
    try:
        record = read_record(root, name)
    except CheckpointError:
        return False  # Nothing can go on from it, so that nothing is lost when it is replaced.
    try:
        StreamState.from_dict(record.stream).check(stream.manifest_fingerprint, stream.seed)
    except CheckpointError as error:
        raise CheckpointError(
            f"{root.url_of(name)}: is the checkpoint of another run and would be replaced; give another output: {error}"
        ) from error
    return True


def restore_model(root: Storage, name: str, record: CheckpointRecord, model: AVModel) -> None:
    """Load the model's weights of a checkpoint.

    Every rank reads the file and checks its checksum: what must be right is what this rank got, and there is nothing
    to wait for.

    Raises:
        CheckpointError: the file is damaged or has other tensors.
    """
    weights = read_weights(root, name, record)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"{root.url_of(file_of(name, WEIGHTS_NAME))}: does not fit the model: {error}") from error


def restore_trainer_state(root: Storage, name: str, record: CheckpointRecord) -> dict[str, Any]:
    """Read ``trainer.pt`` of a checkpoint.

    Raises:
        CheckpointError: the file is damaged.
    """
    return read_trainer_state(root, name, record)


def restore_bank(root: Storage, name: str, bank: MemoryBank) -> None:
    """Load the rows that this rank owns; a checkpoint loads at any world size.

    Raises:
        CheckpointError: the snapshot is missing, damaged, or has another number of instances or dimensions.
    """
    folder = file_of(name, BANK_NAME)
    rows = [read_rows(root, folder, modality, bank.rows, bank.num_instances, bank.dim) for modality in MODALITIES]
    bank.load_local(*(torch.from_numpy(of_modality) for of_modality in rows))


def restore_positives(root: Storage, name: str, bank: MemoryBank) -> Tensor | None:
    """Positives of the rows that this rank owns, int64 [len(bank.rows), k]; None if the checkpoint has none.

    Raises:
        CheckpointError: they are damaged, or of another number of instances.
    """
    folder = file_of(name, BANK_NAME)
    if not has_positives(root, folder):
        return None
    return torch.from_numpy(read_rows(root, folder, POSITIVES, bank.rows, bank.num_instances))


def resume_newest(
    root: Storage,
    group: RankGroup,
    attempt: Callable[[str, CheckpointRecord], None],
    warn: Callable[[str], object],
) -> str | None:
    """Take up the newest checkpoint that is whole on every rank; every rank must call this.

    The one that ``latest`` names is tried first, then the others, newest first. After falling back, ``latest`` names
    the one that was taken up, and those that were not whole count as incomplete from then on, so that saves replace
    them and keep none of them in place of a good one.

    Args:
        root: of the run.
        group: the ranks.
        attempt: restores everything from a checkpoint, given its name and record; called again with an earlier one
            when it raises CheckpointError on any rank. It must not wait for other ranks.
        warn: called on the first rank with every reason to fall back.

    Returns:
        The checkpoint's name, the same on all ranks; None if there is no checkpoint at all.

    Raises:
        CheckpointError: there are checkpoints, but none is whole; the message is about the newest.
        AvidPipelineError: on all ranks, if ``attempt`` raised any other error of ours on one; so does what cannot be
            read now but is there, for it may be whole.
    """
    named, complete = run_together(group, lambda: (named_latest(root), list_checkpoints(root)))[0]
    candidates = [name for name in complete if name == named] + [name for name in reversed(complete) if name != named]
    reasons: list[str] = []
    if named is not None and named not in complete:
        reasons.append(f"{root.url_of(LATEST_NAME)}: names {named[:100]!r}, which is missing or incomplete")
    for place, name in enumerate(candidates):
        if reasons and group.rank == 0:
            warn(f"{reasons[-1]}; falling back to {name}")
        _, failure = try_together(group, lambda name=name: attempt(name, read_record(root, name)))  # type: ignore[misc]
        if failure is None:
            damaged = candidates[:place]
            run_together(group, lambda: _make_latest(root, name, damaged) if group.rank == 0 else None)  # noqa: B023
            return name
        if not issubclass(failure.kind, CheckpointError):
            raise failure.kind(failure.reason)
        reasons.append(failure.reason)
    if reasons:
        raise CheckpointError(f"{reasons[0]}; no checkpoint of {root.url} is whole, {len(complete)} tried")
    return None


def _make_latest(root: Storage, name: str, damaged: list[str]) -> None:
    if named_latest(root) != name:
        write_durably(root, LATEST_NAME, f"{name}\n".encode())
    for each in damaged:
        set_aside(root, each)
