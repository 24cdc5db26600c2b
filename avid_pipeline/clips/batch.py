"""A batch of clips, and what it is made for."""

from dataclasses import dataclass
from typing import NotRequired, TypedDict

import torch

from avid_pipeline.clips.augmentation import FloatArray
from avid_pipeline.clips.reading import ClipChoice, Decode, HostClip, read_clip
from avid_pipeline.clips.settings import ClipSettings
from avid_pipeline.shards_spec.manifest import Modality
from avid_pipeline.shards_spec.sample import Sample


class ClipBatch(TypedDict):
    """A batch of clips.

    ``video`` float32 [B, 3, T, H, W] and ``audio`` float32 [B, 1, frames, 257], each only where it is wanted;
    ``index`` int64 [B] (instance indices), ``visit`` int64 [B], ``label`` int64 [B] (first label, -1 without one),
    ``labels`` (all labels of each clip).
    """

    video: NotRequired[torch.Tensor]
    audio: NotRequired[torch.Tensor]
    index: torch.Tensor
    visit: torch.Tensor
    label: torch.Tensor
    labels: list[tuple[int, ...]]


@dataclass(frozen=True)
class Recipe:
    """What clips are made of.

    Attributes:
        clip: their length, size and modalities.
        choice: how they are chosen and augmented.
        mean: float32 [257], subtracted from the sound.
        std: float32 [257]; the sound is divided by it plus 1e-5.
    """

    clip: ClipSettings
    choice: ClipChoice
    mean: FloatArray
    std: FloatArray

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """What clips have."""
        return self.clip.modalities or ()

    def read(self, sample: Sample, instance: int, visit: int, decode: Decode) -> HostClip:
        """A clip of a sample before augmentation; see :func:`~avid_pipeline.clips.reading.read_clip`."""
        return read_clip(sample, instance, visit, self.clip, self.choice, decode)


def describe(clips: list[HostClip], visits: torch.Tensor) -> ClipBatch:
    """All of a batch but picture and sound."""
    return ClipBatch(
        index=torch.tensor([clip.index for clip in clips], dtype=torch.int64),
        visit=visits,
        label=torch.tensor([clip.label for clip in clips], dtype=torch.int64),
        labels=[clip.labels for clip in clips],
    )
