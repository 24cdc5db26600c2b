"""What AVID and AVID+CMA have in common: a training step against the memory bank, its state and its checks."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (the name everyone knows)
from torch import Tensor

from avid_pipeline.errors import CheckpointError, ConfigError
from avid_pipeline.train.contrast import Contrast, contrastive_loss, estimate_partition_function
from avid_pipeline.train.memory_bank import MODALITIES, MemoryBank
from avid_pipeline.train.negatives import draw_negatives

__all__ = ["MemoryCriterion", "Term"]


@dataclass(frozen=True)
class Term:
    """Two contrasts with one coefficient: one from each modality.

    Attributes:
        prefix: Begins the names of its contrasts and of their mean, for example ``positive_``, or nothing.
        is_cross: Whether queries meet the memory of the other modality, or of their own.
        coefficient: Its share of the loss before shares are divided by their sum; 0 leaves the term out.
        positives: Columns of the candidate table that hold the positives.
        negatives: Columns of the candidate table that hold the negatives.
    """

    prefix: str
    is_cross: bool
    coefficient: float
    positives: range
    negatives: range

    @property
    def name(self) -> str:
        """Name of the mean of the two contrasts."""
        return f"{self.prefix}{'cross' if self.is_cross else 'within'}"

    def contrasts(self, weight: float) -> list[Contrast]:
        """Video's contrast, then audio's, each with half the term's weight in the loss."""
        memories = reversed(MODALITIES) if self.is_cross else MODALITIES
        return [
            Contrast(f"{self.prefix}{query}_to_{memory}", query, memory, self.positives, self.negatives, weight / 2)
            for query, memory in zip(MODALITIES, memories, strict=True)
        ]


class MemoryCriterion(ABC):
    """A loss that tells instances apart by noise-contrastive estimation against the memory bank.

    In a process group the batch is that of all ranks together and the loss is its mean, whatever their number;
    gradients are scaled for ``DistributedDataParallel``, which averages them over ranks. All ranks must be given
    batches of one size at every step.

    Attributes:
        bank: The memory bank; its seed also draws the negatives.
        num_negatives: K, negatives drawn for every sample.
        temperature: Divides the cosines.
        step: Number of batches seen. It decides which negatives come next; settable, on all ranks alike.
    """

    _title: str

    def __init__(
        self, bank: MemoryBank, num_negatives: int, temperature: float, coefficients: Mapping[str, float]
    ) -> None:
        if num_negatives < 1:
            raise ConfigError(f"{self._title}: num_negatives must be at least 1, not {num_negatives}")
        if not 0 < temperature < math.inf:
            raise ConfigError(f"{self._title}: temperature must be a positive number, not {temperature}")
        values = coefficients.values()
        if not (all(0 <= value < math.inf for value in values) and sum(values) > 0):
            raise ConfigError(
                f"{self._title}: {_enumerate(coefficients)} must not be negative and one must be positive, but they "
                f"are {_enumerate(values)}"
            )
        self.bank = bank
        self.num_negatives = num_negatives
        self.temperature = temperature
        self.step = 0
        self._coefficients = dict(coefficients)
        self._partition_function: float | None = None
        self._agreed_batch_size: int | None = None
        self._kept_back: list[tuple[Tensor, Tensor]] = []

    @property
    def partition_function(self) -> float | None:
        """Z, the mean of exp(score) over the first batch's first negatives; None before it. Set it on all ranks."""
        return self._partition_function

    @partition_function.setter
    def partition_function(self, value: float | None) -> None:
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"{self._title}: partition_function must be a positive number or None, not {value}")
        self._partition_function = None if value is None else float(value)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs besides the memory bank: ``step`` and ``partition_function``.

        Between the parts of a step, the state and the bank are those from before the step (but for the partition
        function, which the very first part fixes).
        """
        return {"step": self.step, "partition_function": self.partition_function}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up the state of :meth:`state_dict`, on all ranks alike; drops the parts of an unfinished step.

        Raises:
            CheckpointError: If an entry is missing, unknown or of the wrong kind.
        """
        owner = f"state of the {self._title}"
        if set(state) != {"step", "partition_function"}:
            raise CheckpointError(f"{owner}: expected entries step and partition_function, found {sorted(state)}")
        step, partition_function = state["step"], state["partition_function"]
        if not isinstance(step, int) or step < 0:
            raise CheckpointError(f"{owner}: step must be an integer >= 0, not {step!r}")
        if partition_function is not None and not (
            isinstance(partition_function, float) and 0 < partition_function < math.inf
        ):
            raise CheckpointError(
                f"{owner}: partition_function must be a positive float or None, not {partition_function!r}"
            )
        self.partition_function = partition_function
        self.step = step
        self._agreed_batch_size = None
        self._kept_back = []

    def __call__(
        self,
        video_emb: Tensor,
        audio_emb: Tensor,
        index: Tensor,
        negatives: Tensor | None = None,
        *,
        end_of_step: bool = True,
    ) -> tuple[Tensor, dict[str, float]]:
        """Computes the loss of a batch, then updates the memories of its instances.

        The memories are read before they are updated. If an instance occurs more than once in the global batch
        (ranks' batches in rank order), its last occurrence updates the memory.

        A batch may come in parts, to accumulate gradients: with ``end_of_step=False`` memories and ``step`` stay as
        they are until the part that ends the step; of an instance in several parts the last one counts. The parts'
        losses, gradients and terms then have the mean of those of the whole batch, if parts are of one size. Only the
        partition function differs where the loss has to fix it itself: the first part of the first step does.

        Args:
            video_emb: Video embeddings of any length, ``[B, D]``, in any floating type.
            audio_emb: Audio embeddings, ``[B, D]``.
            index: Instances, int64 ``[B]``, on any device; checking it on the CPU does not wait for the GPU.
            negatives: Instances to use as negatives instead of drawn ones, int64 ``[B, K]``. Unlike drawn ones, they
                are sent to all ranks, and all ranks must give them or none.
            end_of_step: Whether this is a whole batch, or the last of its parts; the same on all ranks.

        Returns:
            The loss, a float32 scalar, and its parts by name, as the class lists them.

        Raises:
            ConfigError: If the arguments do not fit the bank or, at the first step, each other on all ranks.
        """
        self._check_batch(video_emb, audio_emb, index, negatives)
        bank = self.bank
        with torch.autocast(bank.device.type, enabled=False):
            local_queries = F.normalize(torch.stack([video_emb.float(), audio_emb.float()], dim=1), dim=2)
            queries = bank.group.all_gather(local_queries.detach())
            index = bank.group.all_gather(index.to(bank.device))
            candidates = self._candidates(index, negatives)
            owned = bank.find_owned(candidates)
            terms = [term for term in self._terms(candidates.shape[1]) if term.coefficient > 0]
            total = sum(self._coefficients.values())
            contrasts = [contrast for term in terms for contrast in term.contrasts(term.coefficient / total)]
            if self._partition_function is None:
                self._partition_function = estimate_partition_function(
                    bank, queries, owned, contrasts[0], self.temperature
                )
            loss, losses = contrastive_loss(
                bank,
                local_queries,
                queries,
                owned,
                contrasts,
                temperature=self.temperature,
                partition_function=self._partition_function,
            )
            self._kept_back.append((index.clone(), queries))  # The caller may use index's memory again.
            if end_of_step:
                self._update_memories()
        return loss, _name_losses(terms, contrasts, losses.tolist())

    @abstractmethod
    def _terms(self, num_candidates: int) -> list[Term]:
        """The terms; the first active one sees the first scores and so fixes the partition function."""

    def _positives(self, index: Tensor) -> Tensor | None:
        """Positives of the global batch besides the instances themselves, int64 ``[W*B, k]``; all ranks call."""
        return None

    def _must_agree(self) -> dict[str, Any]:
        """Name and value of what else must be the same on all ranks."""
        return {}

    def _candidates(self, index: Tensor, forced: Tensor | None) -> Tensor:
        """What the global batch is scored against: its instances, their positives and negatives, ``[W*B, R]``."""
        positives = self._positives(index)
        if forced is not None:
            negatives = self.bank.group.all_gather(forced.to(index.device))
        else:
            negatives = draw_negatives(
                index,
                self.num_negatives,
                self.bank.num_instances,
                seed=self.bank.seed,
                step=self.step,
                positives=positives,
            )
        tables = [index[:, None], negatives] if positives is None else [index[:, None], positives, negatives]
        return torch.cat(tables, dim=1)

    def _update_memories(self) -> None:
        indices, queries = zip(*self._kept_back, strict=True)
        self._kept_back = []
        self.bank.update(torch.cat(indices), torch.cat(queries))
        self.step += 1

    def _check_batch(self, video_emb: Tensor, audio_emb: Tensor, index: Tensor, negatives: Tensor | None) -> None:
        bank = self.bank
        for name, embeddings in (("video", video_emb), ("audio", audio_emb)):
            if embeddings.ndim != 2 or embeddings.shape[1] != bank.dim or embeddings.shape[0] < 1:
                raise ConfigError(f"{name} embeddings have shape {list(embeddings.shape)}, not [B, {bank.dim}]")
            if embeddings.device != bank.device:
                raise ConfigError(
                    f"{name} embeddings are on {embeddings.device} but the memory bank is on {bank.device}; "
                    "move it with bank.to(device)"
                )
        if len(video_emb) != len(audio_emb):
            raise ConfigError(f"there are {len(video_emb)} video embeddings but {len(audio_emb)} audio embeddings")
        bank.check_instances("index", index, [len(video_emb)])
        if negatives is not None:
            bank.check_instances("negatives", negatives, [len(video_emb), *negatives.shape[-1:]])
        bank.group.check_current()
        if bank.group.size > 1:
            self._check_ranks(len(video_emb), negatives)

    def _check_ranks(self, batch_size: int, negatives: Tensor | None) -> None:
        """Refuses what would hang or corrupt a process group: once among ranks, then each rank against itself."""
        if self._agreed_batch_size is None:
            bank = self.bank
            bank.group.require_equal(
                {
                    "batch size": batch_size,
                    "number of forced negatives": 0 if negatives is None else negatives.shape[1],
                    "num_negatives": self.num_negatives,
                    "temperature": self.temperature,
                    f"coefficients {_enumerate(self._coefficients)}": tuple(self._coefficients.values()),
                    "step": self.step,
                    "partition_function": self._partition_function,
                    "memory bank (num_instances, dim, seed)": (bank.num_instances, bank.dim, bank.seed),
                    "momentum": bank.momentum,
                    **self._must_agree(),
                }
            )
            self._agreed_batch_size = batch_size
        if batch_size != self._agreed_batch_size:
            raise ConfigError(
                f"this rank's batch has {batch_size} samples after batches of {self._agreed_batch_size}; in a process "
                "group all batches must have one size (drop the last incomplete one)"
            )


def _enumerate(values: Iterable[object]) -> str:
    """For example "1, 2 and 3"."""
    *first, last = map(str, values)
    return f"{', '.join(first)} and {last}" if first else last


def _name_losses(terms: Sequence[Term], contrasts: Sequence[Contrast], losses: list[float]) -> dict[str, float]:
    """Every contrast's loss and, after its two, every term's, which is their mean."""
    named: dict[str, float] = {}
    for number, term in enumerate(terms):
        two = slice(2 * number, 2 * number + 2)
        named |= {contrast.name: loss for contrast, loss in zip(contrasts[two], losses[two], strict=True)}
        named[term.name] = sum(losses[two]) / 2
    return named
