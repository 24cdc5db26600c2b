"""Training objectives: AVID, audio-visual instance discrimination."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (the name everyone knows)
from torch import Tensor

from avid_pipeline.errors import CheckpointError, ConfigError
from avid_pipeline.train.contrast import Contrast, contrastive_loss, estimate_partition_function
from avid_pipeline.train.memory_bank import MemoryBank
from avid_pipeline.train.negatives import draw_negatives

__all__ = ["AVIDLoss"]


class AVIDLoss:
    """Audio-visual instance discrimination by noise-contrastive estimation (Morgado et al., CVPR 2021, section 3).

    An instance's video and audio embeddings must each tell the instance's own memory from those of K random
    others: in the other modality (cross) and in their own (within). The loss is the mean over both directions,
    with ``cross`` and ``within`` divided by their sum; a term whose coefficient is 0 is not computed.

    In a process group the batch is that of all ranks together and the loss is its mean, whatever their number;
    gradients are scaled for ``DistributedDataParallel``, which averages them over ranks. All ranks must be given
    batches of one size at every step.

    Args:
        bank: The memory bank; its seed also draws the negatives. Every call updates it.
        num_negatives: K, negatives drawn for every sample, uniformly with replacement from the other instances.
        temperature: Divides the cosines.
        cross: Coefficient of the terms between modalities.
        within: Coefficient of the terms within a modality.

    Attributes:
        step: Number of batches seen. It decides which negatives come next; settable, on all ranks alike.

    Raises:
        ConfigError: If an argument is out of range.
    """

    def __init__(
        self,
        bank: MemoryBank,
        num_negatives: int = 1024,
        temperature: float = 0.07,
        cross: float = 1.0,
        within: float = 0.0,
    ) -> None:
        if num_negatives < 1:
            raise ConfigError(f"AVID loss: num_negatives must be at least 1, not {num_negatives}")
        if not 0 < temperature < math.inf:
            raise ConfigError(f"AVID loss: temperature must be a positive number, not {temperature}")
        if not (0 <= cross < math.inf and 0 <= within < math.inf and cross + within > 0):
            raise ConfigError(
                "AVID loss: cross and within must not be negative and one must be positive, but they are "
                f"{cross} and {within}"
            )
        self.bank = bank
        self.num_negatives = num_negatives
        self.temperature = temperature
        self.cross = cross
        self.within = within
        self.step = 0
        self._partition_function: float | None = None
        self._agreed_batch_size: int | None = None

    @property
    def partition_function(self) -> float | None:
        """Z, the mean of exp(score) over the first batch's first negatives; None before it. Set it on all ranks."""
        return self._partition_function

    @partition_function.setter
    def partition_function(self, value: float | None) -> None:
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"AVID loss: partition_function must be a positive number or None, not {value}")
        self._partition_function = None if value is None else float(value)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs besides the memory bank: ``step`` and ``partition_function``."""
        return {"step": self.step, "partition_function": self.partition_function}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up the state of :meth:`state_dict`, on all ranks alike.

        Raises:
            CheckpointError: If an entry is missing, unknown or of the wrong kind.
        """
        if set(state) != {"step", "partition_function"}:
            raise CheckpointError(
                f"state of the AVID loss: expected entries step and partition_function, found {sorted(state)}"
            )
        step, partition_function = state["step"], state["partition_function"]
        if not isinstance(step, int) or step < 0:
            raise CheckpointError(f"state of the AVID loss: step must be an integer >= 0, not {step!r}")
        if partition_function is not None and not (
            isinstance(partition_function, float) and 0 < partition_function < math.inf
        ):
            raise CheckpointError(
                "state of the AVID loss: partition_function must be a positive float or None, not "
                f"{partition_function!r}"
            )
        self.partition_function = partition_function
        self.step = step
        self._agreed_batch_size = None

    def __call__(
        self, video_emb: Tensor, audio_emb: Tensor, index: Tensor, negatives: Tensor | None = None
    ) -> tuple[Tensor, dict[str, float]]:
        """Computes the loss of a batch, then updates the memories of its instances.

        The memories are read before they are updated. If an instance occurs more than once in the global batch
        (ranks' batches in rank order), its last occurrence updates the memory.

        Args:
            video_emb: Video embeddings of any length, ``[B, D]``, in any floating type.
            audio_emb: Audio embeddings, ``[B, D]``.
            index: Instances, int64 ``[B]``, on any device; checking it on the CPU does not wait for the GPU.
            negatives: Instances to use as negatives instead of drawn ones, int64 ``[B, K]``. Unlike drawn ones, they
                are sent to all ranks, and all ranks must give them or none.

        Returns:
            The loss, a float32 scalar, and its parts by name: ``video_to_audio``, ``audio_to_video`` and their
            mean ``cross``; ``video_to_video``, ``audio_to_audio`` and their mean ``within``.

        Raises:
            ConfigError: If the arguments do not fit the bank or, at the first step, each other on all ranks.
        """
        self._check_batch(video_emb, audio_emb, index, negatives)
        group, device = self.bank.group, self.bank.device
        index = index.to(device)
        with torch.autocast(device.type, enabled=False):
            embeddings = torch.stack([video_emb.float(), audio_emb.float()], dim=1)
            local_queries = F.normalize(embeddings, dim=2)
            queries = group.all_gather(local_queries.detach())
            index = group.all_gather(index)
            candidates = torch.cat([index[:, None], self._global_negatives(index, negatives)], dim=1)
            owned = self.bank.find_owned(candidates)
            contrasts = self._contrasts(candidates.shape[1] - 1)
            if self._partition_function is None:
                self._partition_function = estimate_partition_function(
                    self.bank, queries, owned, contrasts[0], self.temperature
                )
            loss, terms = contrastive_loss(
                self.bank,
                local_queries,
                queries,
                owned,
                contrasts,
                temperature=self.temperature,
                partition_function=self._partition_function,
            )
            self.bank.update(index, queries)
        self.step += 1
        return loss, self._name_terms(contrasts, terms.tolist())

    def _global_negatives(self, index: Tensor, forced: Tensor | None) -> Tensor:
        """Negatives of the global batch ``[W*B, K]``."""
        if forced is not None:
            return self.bank.group.all_gather(forced.to(index.device))
        bank = self.bank
        return draw_negatives(index, self.num_negatives, bank.num_instances, seed=bank.seed, step=self.step)

    def _contrasts(self, num_negatives: int) -> list[Contrast]:
        """The active directions; the first of them sees the first scores and so fixes the partition function."""
        total = 2 * (self.cross + self.within)
        own, others = range(1), range(1, 1 + num_negatives)
        cross = [
            Contrast("video_to_audio", "video", "audio", own, others, self.cross / total),
            Contrast("audio_to_video", "audio", "video", own, others, self.cross / total),
        ]
        within = [
            Contrast("video_to_video", "video", "video", own, others, self.within / total),
            Contrast("audio_to_audio", "audio", "audio", own, others, self.within / total),
        ]
        return (cross if self.cross > 0 else []) + (within if self.within > 0 else [])

    def _name_terms(self, contrasts: list[Contrast], losses: list[float]) -> dict[str, float]:
        terms = {contrast.name: loss for contrast, loss in zip(contrasts, losses, strict=True)}
        if self.cross > 0:
            terms["cross"] = (terms["video_to_audio"] + terms["audio_to_video"]) / 2
        if self.within > 0:
            terms["within"] = (terms["video_to_video"] + terms["audio_to_audio"]) / 2
        return terms

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
        self._check_instances("index", index, [len(video_emb)])
        if negatives is not None:
            self._check_instances("negatives", negatives, [len(video_emb), *negatives.shape[-1:]])
        bank.group.check_current()
        if bank.group.size > 1:
            self._check_ranks(len(video_emb), negatives)

    def _check_instances(self, name: str, instances: Tensor, shape: list[int]) -> None:
        if instances.dtype != torch.int64 or list(instances.shape) != shape or instances.numel() == 0:
            raise ConfigError(
                f"{name} must be int64 of shape {shape}, but is {instances.dtype} of shape {list(instances.shape)}"
            )
        smallest, largest = (int(bound) for bound in instances.aminmax())
        if smallest < 0 or largest >= self.bank.num_instances:
            found = smallest if smallest < 0 else largest
            raise ConfigError(
                f"{name} holds instance {found}, but the memory bank has rows 0 to {self.bank.num_instances - 1} "
                f"(num_instances={self.bank.num_instances}); make the bank for the dataset that is read"
            )

    def _check_ranks(self, batch_size: int, negatives: Tensor | None) -> None:
        """Refuses what would hang or corrupt a process group: once among ranks, then each rank against itself."""
        if self._agreed_batch_size is None:
            bank = self.bank
            self.bank.group.require_equal(
                {
                    "batch size": batch_size,
                    "number of forced negatives": 0 if negatives is None else negatives.shape[1],
                    "num_negatives": self.num_negatives,
                    "temperature": self.temperature,
                    "coefficients (cross, within)": (self.cross, self.within),
                    "step": self.step,
                    "partition_function": self._partition_function,
                    "memory bank (num_instances, dim, seed)": (bank.num_instances, bank.dim, bank.seed),
                    "momentum": bank.momentum,
                }
            )
            self._agreed_batch_size = batch_size
        if batch_size != self._agreed_batch_size:
            raise ConfigError(
                f"this rank's batch has {batch_size} samples after batches of {self._agreed_batch_size}; in a process "
                "group all batches must have one size (drop the last incomplete one)"
            )
