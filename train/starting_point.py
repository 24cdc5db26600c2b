"""What a run can start from: the model, memory bank and partition function of another run or a published checkpoint."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from avid_pipeline.errors import CheckpointError, StorageError
from avid_pipeline.models.pretrained import WEIGHTS_NAME, PublishedCheckpoint, import_published, is_checkpoint_file
from avid_pipeline.models.published_statistics import published_statistics
from avid_pipeline.shards_spec.manifest import SpectrogramStatistics
from avid_pipeline.shards_spec.storage import Storage, open_storage
from avid_pipeline.streams.state import StreamState
from avid_pipeline.train.bank_snapshot import snapshot_shape
from avid_pipeline.train.checkpoint import restore_bank
from avid_pipeline.train.checkpoint_files import read_trainer_state, read_weights
from avid_pipeline.train.checkpoint_record import (
    BANK_NAME,
    TRAINER_NAME,
    CheckpointRecord,
    file_of,
    locate_checkpoint,
    read_record,
)
from avid_pipeline.train.memory_bank import MemoryBank

__all__ = ["StartingPoint", "open_starting_point"]


@dataclass(frozen=True)
class Origin:
    """What a checkpoint says of itself.

    Attributes:
        source: where it is.
        fingerprint: of the manifest it was trained on; None where it is not known.
        seed: of that run, if known.
        epoch: epochs it was trained for, if known.
        step: steps it was trained for, if known.
        subset: of the data that it was trained on; None for all.
        statistics: of spectrograms, that sound was normalised with; None where they are not known.
        num_instances: N, rows of its memory bank.
        dim: D, their length.
        partition_function: Z of its loss; None if it has seen no batch.
    """

    source: str
    fingerprint: str | None
    seed: int | None
    epoch: int | None
    step: int | None
    subset: str | None
    statistics: SpectrogramStatistics | None
    num_instances: int
    dim: int
    partition_function: float | None


class StartingPoint(ABC):
    """A checkpoint to start from; see :class:`Origin` for the meaning of its properties."""

    def __init__(self, origin: Origin) -> None:
        self.origin = origin
        self.source = origin.source
        self.fingerprint = origin.fingerprint
        self.seed = origin.seed
        self.epoch = origin.epoch
        self.step = origin.step
        self.subset = origin.subset
        self.statistics = origin.statistics
        self.num_instances: int | None = origin.num_instances
        self.dim = origin.dim
        self.partition_function = origin.partition_function

    @abstractmethod
    def _weights(self) -> tuple[Mapping[str, Tensor], str]:
        """The state dict, and the file that it is in."""

    @abstractmethod
    def _load_rows(self, bank: MemoryBank) -> None:
        """Load this rank's rows into a bank of the right size."""

    def load_model(self, model: nn.Module) -> None:
        """Load the weights into a model; all its tensors must be there, and no others.

        Raises:
            CheckpointError: the file is damaged, or a tensor is missing, unknown or of another shape.
        """
        weights, file = self._weights()
        _check_weights(weights, model.state_dict(), file)
        model.load_state_dict(dict(weights))

    def load_bank(self, bank: MemoryBank) -> None:
        """Load the rows that this rank owns into a bank.

        Raises:
            CheckpointError: the memory bank is damaged, or has another number of instances or dimensions.
        """
        if (self.num_instances, self.dim) != (bank.num_instances, bank.dim):
            raise CheckpointError(
                f"{self.source}: its memory bank holds {self.num_instances:,} instances of {self.dim} dimensions, but "
                f"this run's {bank.num_instances:,} of {bank.dim}; start with its model alone and fill the bank anew "
                "with --set memory.init=forward"
            )
        self._load_rows(bank)


def open_starting_point(path_or_url: str, options: Mapping[str, str] | None = None) -> StartingPoint:
    """Open a checkpoint to start from, on every rank alike. Of a damaged run, no earlier checkpoint is taken.

    Args:
        path_or_url: a run folder (its newest checkpoint), a checkpoint folder, or a published ``.pth.tar`` file.
        options: of the object store that it is in.

    Raises:
        CheckpointError: it is none of these, or damaged.
    """
    if not is_checkpoint_file(path_or_url):
        return _open_folder(path_or_url, options)
    if path_or_url.endswith(".safetensors"):
        raise CheckpointError(
            f"{path_or_url}: holds only a model; give the folder of a checkpoint or run, which has a memory bank too"
        )
    return _PublishedStart(path_or_url, import_published(path_or_url, options=options, copy=False))


class _PublishedStart(StartingPoint):
    """A published file; its tensors are let go once they are loaded, and those on disk are only mapped."""

    def __init__(self, path_or_url: str, content: PublishedCheckpoint) -> None:
        num_instances, dim = content.video_memory.shape
        super().__init__(
            Origin(
                source=path_or_url,
                fingerprint=None,
                seed=None,
                epoch=content.epoch,
                step=None,
                subset=None,
                statistics=published_statistics(),
                num_instances=num_instances,
                dim=dim,
                partition_function=content.partition_function,
            )
        )
        self._content = content

    def _weights(self) -> tuple[Mapping[str, Tensor], str]:
        return self._content.model, self.source

    def load_model(self, model: nn.Module) -> None:
        super().load_model(model)
        self._content = replace(self._content, model={})

    def _load_rows(self, bank: MemoryBank) -> None:
        rows = slice(bank.rows.start, bank.rows.stop)
        bank.load_local(self._content.video_memory[rows], self._content.audio_memory[rows])
        nothing = torch.empty(0, self.dim)
        self._content = replace(self._content, video_memory=nothing, audio_memory=nothing)


class _FolderStart(StartingPoint):
    """A checkpoint folder of ours, of a run or imported."""

    def __init__(self, root: Storage, name: str, record: CheckpointRecord) -> None:
        stream = None if record.stream is None else StreamState.from_dict(record.stream)
        num_instances, dim = snapshot_shape(root, file_of(name, BANK_NAME))
        super().__init__(
            Origin(
                source=root.url_of(name) if name else root.url,
                fingerprint=None if stream is None else stream.manifest_fingerprint,
                seed=None if stream is None else stream.seed,
                epoch=None if stream is None else stream.epoch,
                step=None if stream is None else stream.step,
                subset=(record.config or {}).get("data", {}).get("subset"),
                statistics=record.spectrogram_statistics,
                num_instances=num_instances,
                dim=dim,
                partition_function=_partition_function(root, name, record),
            )
        )
        self._root, self._name, self._record = root, name, record

    def _weights(self) -> tuple[Mapping[str, Tensor], str]:
        weights = read_weights(self._root, self._name, self._record)
        return weights, self._root.url_of(file_of(self._name, WEIGHTS_NAME))

    def _load_rows(self, bank: MemoryBank) -> None:
        restore_bank(self._root, self._name, bank)


def _open_folder(path_or_url: str, options: Mapping[str, str] | None) -> StartingPoint:
    try:
        root = open_storage(path_or_url, options=options)
    except StorageError as error:
        raise CheckpointError(
            f"{path_or_url}: no such checkpoint; give a run folder, a checkpoint folder or a published .pth.tar file"
        ) from error
    name = locate_checkpoint(root)
    return _FolderStart(root, name, read_record(root, name))


def _partition_function(root: Storage, name: str, record: CheckpointRecord) -> float | None:
    criterion = read_trainer_state(root, name, record).get("criterion")
    if not isinstance(criterion, dict) or "partition_function" not in criterion:
        raise CheckpointError(
            f"{root.url_of(file_of(name, TRAINER_NAME))}: has no criterion.partition_function; it is of no AVID run"
        )
    value = criterion["partition_function"]
    return None if value is None else float(value)


def _check_weights(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], file: str) -> None:
    """Whether tensors are those of the model; the message names the first that is not."""
    advice = "set model.video_depth and model.projection to those of the checkpoint"
    for name, tensor in expected.items():
        if name not in weights:
            raise CheckpointError(f"{file}: has no tensor {name} {list(tensor.shape)}, which the model has; {advice}")
        if weights[name].shape != tensor.shape:
            raise CheckpointError(
                f"{file}: {name} has shape {list(weights[name].shape)}, in the model {list(tensor.shape)}; {advice}"
            )
    unknown = sorted(set(weights) - set(expected))
    if unknown:
        raise CheckpointError(
            f"{file}: has a tensor {unknown[0]} {list(weights[unknown[0]].shape)}, which the model does not have; "
            f"{advice}"
        )
