"""AVID+CMA: instance discrimination with positives found by cross-modal agreement."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from avid_pipeline.errors import ConfigError
from avid_pipeline.train.criterion import MemoryCriterion, Term
from avid_pipeline.train.memory_bank import MemoryBank

__all__ = ["AVIDCMALoss"]


class AVIDCMALoss(MemoryCriterion):
    """AVID with cross-modal agreement (Morgado et al., CVPR 2021, section 4).

    Every instance has k positives: other instances that agree with it in both modalities. Its embeddings must tell its
    own memory (instance terms, as in AVID) and the memories of its positives (positive terms, the mean over them)
    from those of random other instances, which are never its positives; in the other modality (cross) and in their
    own (within). The loss is the mean over both directions, with the four coefficients divided by their sum; a term
    whose coefficient is 0 is not computed.

    The terms by name are ``instance_video_to_audio``, ``instance_audio_to_video`` and their mean ``instance_cross``;
    ``instance_video_to_video``, ``instance_audio_to_audio`` and ``instance_within``; and the same six with
    ``positive_``. Process groups, parts of a step: :class:`MemoryCriterion`.

    Each rank holds the positives of its own rows of the bank. Those of a global batch reach all ranks by adding up
    ``[W*B, k]`` numbers.

    Args:
        bank: The memory bank; its seed also draws the negatives. Every call updates it.
        positives: Positives of every instance, int64: of all, ``[N, k]``, or of this rank's rows,
            ``[len(bank.rows), k]``. k must be the same on all ranks.
        num_negatives: K, negatives drawn for every sample, uniformly with replacement from the instances that are
            neither the sample's own nor its positives.
        num_within_negatives: How many of the K, the first ones, the positive terms within a modality use.
        instance_cross: Coefficient of the instance terms between modalities.
        instance_within: Coefficient of the instance terms within a modality.
        positive_cross: Coefficient of the positive terms between modalities.
        positive_within: Coefficient of the positive terms within a modality.
        temperature: Divides the cosines.

    Raises:
        ConfigError: If an argument is out of range.
    """

    _title = "AVID+CMA loss"

    def __init__(
        self,
        bank: MemoryBank,
        positives: Tensor,
        num_negatives: int = 1024,
        num_within_negatives: int = 64,
        instance_cross: float = 1.0,
        instance_within: float = 0.0,
        positive_cross: float = 0.0,
        positive_within: float = 1.0,
        *,
        temperature: float = 0.07,
    ) -> None:
        coefficients = {
            "instance_cross": instance_cross,
            "instance_within": instance_within,
            "positive_cross": positive_cross,
            "positive_within": positive_within,
        }
        super().__init__(bank, num_negatives, temperature, coefficients)
        if not 1 <= num_within_negatives <= num_negatives:
            raise ConfigError(
                f"AVID+CMA loss: num_within_negatives must lie between 1 and num_negatives, which they are the first "
                f"of ({num_negatives}), but is {num_within_negatives}"
            )
        self.num_within_negatives = num_within_negatives
        self.positives = positives

    @property
    def positives(self) -> Tensor:
        """Positives of this rank's rows, int64 ``[len(bank.rows), k]``; set all ranks' rows or its own, on all ranks.

        Setting raises ConfigError if they do not fit the bank. They are no part of :meth:`state_dict`.
        """
        return self._stored.to(torch.int64, copy=True)

    @positives.setter
    def positives(self, value: Tensor) -> None:
        bank = self.bank
        lengths = (bank.num_instances, len(bank.rows))
        if value.ndim != 2 or len(value) not in lengths or value.shape[1] < 1 or value.dtype != torch.int64:
            raise ConfigError(
                f"AVID+CMA loss: positives must be int64 of shape [{lengths[0]}, k], of all instances, or "
                f"[{lengths[1]}, k], of the rows of rank {bank.group.rank}, with k >= 1, but are {value.dtype} of "
                f"shape {list(value.shape)}"
            )
        if bank.num_instances < value.shape[1] + 2:
            raise ConfigError(
                f"AVID+CMA loss: an instance and its {value.shape[1]} positives leave no negatives among "
                f"{bank.num_instances} instances; use at most {bank.num_instances - 2} positives"
            )
        if len(value) > 0:  # A rank may own no rows.
            bank.check_instances("positives", value, list(value.shape))
        own = value[bank.rows.start : bank.rows.stop] if len(value) == bank.num_instances else value
        fits = bank.num_instances <= torch.iinfo(torch.int32).max
        self._stored = own.to(bank.device, torch.int32 if fits else torch.int64, copy=True)
        self._agreed_batch_size = None  # Ranks compare k again at the next step.

    def positives_of(self, index: Tensor) -> Tensor:
        """Looks up the positives of any instances; all ranks call, with the same instances.

        Args:
            index: Instances, int64 ``[Q]``.

        Returns:
            Their positives, int64 ``[Q, k]`` on the bank's device, the same on all ranks.
        """
        bank = self.bank
        index = index.to(bank.device)
        self._stored = self._stored.to(bank.device)  # The bank may have moved.
        if bank.group.size == 1:
            return self._stored[index].to(torch.int64)
        is_owned = (index >= bank.rows.start) & (index < bank.rows.stop)
        found = self._stored.new_zeros(len(index), self._stored.shape[1])
        if len(bank.rows) > 0:
            local = torch.where(is_owned, index - bank.rows.start, 0)
            found = self._stored[local].masked_fill_(~is_owned[:, None], 0)
        return bank.group.all_reduce_sum(found).to(torch.int64)

    def _positives(self, index: Tensor) -> Tensor:
        return self.positives_of(index)

    def _terms(self, num_candidates: int) -> list[Term]:
        first = 1 + self._stored.shape[1]
        own, positives, others = range(1), range(1, first), range(first, num_candidates)
        fewer, shares = others[: self.num_within_negatives], self._coefficients
        return [
            Term("instance_", True, shares["instance_cross"], own, others),
            Term("instance_", False, shares["instance_within"], own, others),
            Term("positive_", True, shares["positive_cross"], positives, others),
            Term("positive_", False, shares["positive_within"], positives, fewer),
        ]

    def _must_agree(self) -> dict[str, Any]:
        return {
            "number of positives": self._stored.shape[1],
            "num_within_negatives": self.num_within_negatives,
        }
