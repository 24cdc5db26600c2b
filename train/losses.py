"""Training objectives: AVID, audio-visual instance discrimination, and AVID+CMA, cross-modal agreement."""

from __future__ import annotations

from avid_pipeline.train.avid_cma import AVIDCMALoss
from avid_pipeline.train.criterion import MemoryCriterion, Term
from avid_pipeline.train.memory_bank import MemoryBank

__all__ = ["AVIDCMALoss", "AVIDLoss"]


class AVIDLoss(MemoryCriterion):
    """Audio-visual instance discrimination by noise-contrastive estimation (Morgado et al., CVPR 2021, section 3).

    An instance's video and audio embeddings must each tell the instance's own memory from those of K random
    others: in the other modality (cross) and in their own (within). The loss is the mean over both directions,
    with ``cross`` and ``within`` divided by their sum; a term whose coefficient is 0 is not computed.

    The terms by name are ``video_to_audio``, ``audio_to_video`` and their mean ``cross``; ``video_to_video``,
    ``audio_to_audio`` and their mean ``within``. Process groups, parts of a step: :class:`MemoryCriterion`.

    Args:
        bank: The memory bank; its seed also draws the negatives. Every call updates it.
        num_negatives: K, negatives drawn for every sample, uniformly with replacement from the other instances.
        temperature: Divides the cosines.
        cross: Coefficient of the terms between modalities.
        within: Coefficient of the terms within a modality.

    Raises:
        ConfigError: If an argument is out of range.
    """

    _title = "AVID loss"

    def __init__(
        self,
        bank: MemoryBank,
        num_negatives: int = 1024,
        temperature: float = 0.07,
        cross: float = 1.0,
        within: float = 0.0,
    ) -> None:
        super().__init__(bank, num_negatives, temperature, {"cross": cross, "within": within})

    def _terms(self, num_candidates: int) -> list[Term]:
        own, others, shares = range(1), range(1, num_candidates), self._coefficients
        return [Term("", True, shares["cross"], own, others), Term("", False, shares["within"], own, others)]
