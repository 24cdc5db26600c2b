"""Embedding pictures and sounds that are in memory: one file or some, without shards."""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from avid_pipeline.clips.batch import Recipe
from avid_pipeline.clips.in_memory import clips_in_memory
from avid_pipeline.clips.loader import evaluation_batches
from avid_pipeline.clips.reading import EvaluationChoice
from avid_pipeline.clips.settings import ClipSettings
from avid_pipeline.embedding import MeanDirections, evaluation_mode
from avid_pipeline.errors import ConfigError, SampleError
from avid_pipeline.evaluate.checkpoint import open_checkpoint
from avid_pipeline.models import AVModel
from avid_pipeline.shards_spec.manifest import Modality, SpectrogramStatistics
from avid_pipeline.shards_spec.sample import Sample
from avid_pipeline.shards_spec.spectrogram import NUM_FREQUENCIES

__all__ = ["Embedder"]

Samples = Sample | Sequence[Sample]


@dataclass(frozen=True)
class Embedder:
    """Embeds samples as :func:`~avid_pipeline.embedding.embed_dataset` embeds those of a data set.

    A sample comes from a file (``avid_pipeline.preprocess.single_file.read_media``) or from shards
    (:meth:`ShardReader.read <avid_pipeline.shards_spec.reader.ShardReader.read>`).

    Attributes:
        model: on the device where it is to run; its weights' dtype is that of its inputs.
        clip: length and size of clips; their modalities do not matter.
        statistics: what sound is normalised with; None refuses sound.
        batch_size: clips in a forward pass.
        workers: threads that decode; None for one for each core this process may use.
        source: what messages call the model.
    """

    model: AVModel
    clip: ClipSettings
    statistics: SpectrogramStatistics | None = None
    batch_size: int = 32
    workers: int | None = None
    source: str = "the model"

    @classmethod
    def load(
        cls,
        checkpoint: str | os.PathLike[str],
        *,
        options: Mapping[str, str] | None = None,
        device: str | torch.device | None = None,
        statistics: SpectrogramStatistics | None = None,
    ) -> "Embedder":
        """Load a checkpoint with what it was trained to see.

        Args:
            checkpoint: run folder (its newest checkpoint), checkpoint folder, published ``.pth.tar`` file, or weights
                alone (``.safetensors``); a path or URL.
            options: of the object store, as :func:`~avid_pipeline.shards_spec.storage.open_storage` takes them.
            device: of the model, for example ``cuda``; the CPU by default.
            statistics: what sound is normalised with, instead of what the checkpoint says. Weights alone do not say:
                give those of the training data (``open_dataset(root).manifest.spectrogram_statistics``).

        Raises:
            CheckpointError: there is no such checkpoint, it is damaged, or of another architecture.
            StorageError: it is there and cannot be read now.
        """
        name = os.fspath(checkpoint)
        found = open_checkpoint(name, options, device=torch.device("cpu" if device is None else device))
        return cls(found.model, found.clip, statistics or found.statistics, source=name)

    def video(self, samples: Samples, clips: int = 10) -> Tensor:
        """Embed the picture of samples.

        Args:
            samples: one, or several.
            clips: evaluation clips, spread evenly over each sample; its vector is their mean direction.

        Returns:
            Float32 unit vectors on the CPU: [D] for one sample, [N, D] for several.

        Raises:
            ConfigError: what is given is no sample, or ``clips`` is no positive number.
            SampleError: a sample has no picture, or one that cannot be decoded; the message names it.
        """
        return self._embed(samples, clips, "video", self.model.embed_video)

    def sound(self, samples: Samples, clips: int = 10) -> Tensor:
        """Embed the sound of samples.

        Args:
            samples: one, or several.
            clips: evaluation clips, spread evenly over each sample; its vector is their mean direction.

        Returns:
            Float32 unit vectors on the CPU: [D] for one sample, [N, D] for several.

        Raises:
            ConfigError: it is not known what sound is normalised with, what is given is no sample, or ``clips`` is no
                positive number.
            SampleError: a sample has no sound, or one that is damaged; the message names it.
        """
        if self.statistics is None:
            raise ConfigError(
                f"{self.source}: does not say what sound is normalised with; give the statistics of the data that it "
                "was trained on: Embedder.load(…, statistics=open_dataset(root).manifest.spectrogram_statistics)"
            )
        return self._embed(samples, clips, "audio", self.model.embed_audio)

    def _embed(self, samples: Samples, clips: int, modality: Modality, embed: Callable[[Tensor], Tensor]) -> Tensor:
        given = _checked(samples, modality)
        if clips < 1:
            raise ConfigError(f"clips: expected at least 1 of each sample, found {clips}")
        recipe = self._recipe(modality, clips)
        # The batches of embed_dataset, so that not even rounding differs.
        batches = evaluation_batches(len(given), clips, self.batch_size)
        means = MeanDirections(len(given), self.model.projection[-1])
        weight = next(self.model.parameters())
        made = clips_in_memory(given, batches, recipe, self.workers)
        with evaluation_mode(self.model), torch.inference_mode(), closing(made):
            for batch in made:
                means.add(batch["index"], embed(batch[modality].to(weight.device, weight.dtype)))
        vectors = means.vectors()
        return vectors[0] if isinstance(samples, Sample) else vectors

    def _recipe(self, modality: Modality, clips: int) -> Recipe:
        clip = self.clip.model_copy(update={"modalities": (modality,)})
        if self.statistics is None:
            mean, std = np.zeros(NUM_FREQUENCIES, dtype=np.float32), np.ones(NUM_FREQUENCIES, dtype=np.float32)
        else:
            mean, std = self.statistics.arrays()
        return Recipe(clip, EvaluationChoice(clips), mean, std)


def _checked(samples: object, modality: Modality) -> list[Sample]:
    """Samples that all have a modality."""
    given = []
    for sample in samples if isinstance(samples, Sequence) and not isinstance(samples, str) else [samples]:
        if not isinstance(sample, Sample):
            raise ConfigError(
                f"samples: expected a Sample or several, found {type(sample).__name__}; make one from a file with "
                "avid_pipeline.preprocess.single_file.read_media, or read one from shards"
            )
        if (sample.video if modality == "video" else sample.spectrogram) is None:
            what, other = ("picture", "sound") if modality == "video" else ("sound", "picture")
            raise SampleError(
                f"{sample.record.source}: has no {what} to embed; give a file with {what}, or its {other}"
            )
        given.append(sample)
    return given
