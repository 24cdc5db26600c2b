"""How often AVID+CMA's positives share a class with their instance, where the data have labels."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from avid_pipeline.collectives import RankGroup
from avid_pipeline.errors import ConfigError

__all__ = ["LabelTable"]

_BITS = 64
# Buffered clips of a rank before they are exchanged: 300 kB for 527 classes.
_MOST_BUFFERED = 4096


class LabelTable:
    """Classes of the instances whose memories this rank owns, learned from the batches that pass by.

    A row is a bit mask of classes, one of 64-bit words; an instance not seen yet, or without a label, has none. Ranks
    talk when purity is asked for, and when a buffer of 4096 clips is full, never at every step.

    Args:
        rows: rows of the memory bank that this rank owns.
        num_classes: of the data, the same on all ranks; 0 where they have no labels.
        group: the ranks that share the bank.
    """

    def __init__(self, rows: range, num_classes: int, group: RankGroup) -> None:
        self._rows, self._num_classes, self._group = rows, num_classes, group
        self._words = -(-num_classes // _BITS)
        self._masks = torch.zeros(len(rows), self._words, dtype=torch.int64)
        self._buffer: list[Tensor] = []
        self._buffered = 0

    def learn(self, rows: Tensor, labels: Sequence[tuple[int, ...]]) -> None:
        """Take note of a batch's labels; every rank calls this with the same number of clips.

        Args:
            rows: of the memory bank, int64 [B].
            labels: all classes of each clip.

        Raises:
            ConfigError: a label is no class of the data; or buffers are full and are not of one length.
        """
        if len(rows) != len(labels):
            raise ConfigError(f"labels: expected those of {len(rows)} clips, found {len(labels)}")
        if self._num_classes == 0:
            return
        self._buffer.append(torch.cat([rows.cpu()[:, None], self._pack(labels)], dim=1))
        self._buffered += len(rows)
        if self._buffered >= _MOST_BUFFERED:
            self._require_alike()
            self._exchange()

    def purity(self, index: Tensor, candidates: Tensor) -> float | None:
        """The share of pairs of an instance and one of its candidates that have a class in common.

        All ranks call this with the same arguments and get the same answer. Only pairs of two instances whose labels
        are known count. The labels of the queries travel, as one bit for each class, and two counts come back; nothing
        depends on the number of instances.

        Args:
            index: rows of the global batch, int64 [Q].
            candidates: of each, int64 [Q, k], for example its positives, or random rows for what chance reaches.

        Returns:
            The share; None where the labels of no pair are known.

        Raises:
            ConfigError: the shapes do not fit, or ranks differ in them or in the number of clips learned.
        """
        index, candidates = index.cpu(), candidates.cpu()
        if index.ndim != 1 or candidates.ndim != 2 or len(index) != len(candidates):
            raise ConfigError(
                f"class purity: expected index [Q] and candidates [Q, k], found {list(index.shape)} and "
                f"{list(candidates.shape)}"
            )
        if self._num_classes == 0:
            return None
        self._require_alike(len(index), candidates.shape[1])
        self._exchange()
        query_masks = self._group.all_reduce_sum(self._masks_of(index))
        queries, columns = self._is_owned(candidates).nonzero(as_tuple=True)
        theirs = self._masks[candidates[queries, columns] - self._rows.start]
        ours = query_masks[queries]
        known = (ours != 0).any(dim=1) & (theirs != 0).any(dim=1)
        alike = ((ours & theirs) != 0).any(dim=1)
        counts = self._group.all_reduce_sum(torch.stack([alike.sum(), known.sum()]))
        agreeing, pairs = counts.tolist()
        return agreeing / pairs if pairs else None

    def _pack(self, labels: Sequence[tuple[int, ...]]) -> Tensor:
        """Bit masks of classes, int64 [B, words]."""
        masks = np.zeros((len(labels), self._words), dtype=np.uint64)
        for place, classes in enumerate(labels):
            for label in classes:
                if not 0 <= label < self._num_classes:
                    raise ConfigError(
                        f"label {label}: expected a class from 0 to {self._num_classes - 1}, as the manifest lists "
                        "them; look at the data with avid-shards validate"
                    )
                masks[place, label // _BITS] |= np.uint64(1 << label % _BITS)
        return torch.from_numpy(masks.view(np.int64))

    def _exchange(self) -> None:
        """Every rank's buffer goes to all, and each keeps its own rows."""
        if self._buffered:
            learned = self._group.all_gather(torch.cat(self._buffer))
            own = learned[self._is_owned(learned[:, 0])]
            self._masks[own[:, 0] - self._rows.start] = own[:, 1:]
        self._buffer, self._buffered = [], 0

    def _masks_of(self, index: Tensor) -> Tensor:
        """Bit masks of rows, int64 [Q, words]: zeros for those that other ranks own, so that sums are the masks."""
        masks = torch.zeros(len(index), self._words, dtype=torch.int64)
        owned = self._is_owned(index)
        masks[owned] = self._masks[index[owned] - self._rows.start]
        return masks

    def _is_owned(self, rows: Tensor) -> Tensor:
        return (rows >= self._rows.start) & (rows < self._rows.stop)

    def _require_alike(self, num_queries: int = 0, num_candidates: int = 0) -> None:
        """One small collective, of one shape wherever it is called, keeps unequal ranks from hanging in another."""
        of_ranks = self._group.all_gather(torch.tensor([[self._buffered, num_queries, num_candidates]]))
        names = ("number of clips whose labels were learned", "number of queries", "number of candidates")
        for name, found in zip(names, of_ranks.T.tolist(), strict=True):
            if len(set(found)) > 1:
                raise ConfigError(f"class purity: the {name} must be the same on all ranks but is {found} (by rank)")
