"""Retrieval on held-out data while a run trains."""

from collections.abc import Callable, Mapping

import numpy as np
import torch

from avid_pipeline.clips.failures import Failure
from avid_pipeline.clips.settings import ClipSettings, resolve_modalities
from avid_pipeline.collectives import RankGroup
from avid_pipeline.embedding import embed_dataset
from avid_pipeline.errors import ConfigError
from avid_pipeline.models import AVModel
from avid_pipeline.retrieval import RetrievalResult, chance, retrieve
from avid_pipeline.shards_spec.manifest import WITH_AUDIO, Manifest, SpectrogramStatistics
from avid_pipeline.shards_spec.reader import open_dataset
from avid_pipeline.streams.batches import IntArray
from avid_pipeline.train.config import TrainConfig

__all__ = ["RetrievalHook"]


class RetrievalHook:
    """Embeds held-out data and ranks each instance's own sound and picture among those of all.

    The data are opened here, so that what is wrong with them shows before a run trains, not hours later.

    Args:
        config: of the run; ``config.evaluation`` says what is held out.
        statistics: of the training data's spectrograms, which the model sees sound normalised with.
        options: of the object store that the held-out data are in.

    Attributes:
        url: root of the held-out data.
        instances: those embedded, int64 [N]: all, or the subset ``with-audio`` where some have no sound.

    Raises:
        StorageError: the data cannot be read.
        ManifestError: they are no data set.
        ConfigError: they lack picture or sound, there are fewer than two instances, or the run has no evaluation.
    """

    def __init__(
        self, config: TrainConfig, statistics: SpectrogramStatistics, options: Mapping[str, str] | None = None
    ) -> None:
        if config.evaluation is None:
            raise ConfigError("evaluation: this run has none; say in evaluation.data what data are held out")
        self._config, self._settings, self._statistics = config, config.evaluation, statistics
        self._reader = open_dataset(config.evaluation.data, options)
        self.url = self._reader.storage.url
        self.instances = _with_both(self._reader.manifest, config.clip, self.url)
        if len(self.instances) < 2:
            raise ConfigError(
                f"evaluation.data: {self.url}: expected at least 2 instances with picture and sound, found "
                f"{len(self.instances)}"
            )

    def run(
        self, model: AVModel, group: RankGroup, on_failure: Callable[[Failure], object] | None = None
    ) -> dict[str, float]:
        """Evaluate a model; all ranks of the group call this, and all get the same numbers.

        Args:
            model: the same weights and batch norm statistics on all ranks; its mode stays as it is.
            group: ranks that divide the instances.
            on_failure: called for every instance that cannot be decoded, which is left out; ``data.max_failure_rate``
                of them may fail. None makes it an error.

        Returns:
            By TensorBoard tags below ``retrieval/``: recalls, median rank and, where there are labels, class precision
            of both directions and of ``chance``, and the number of ``instances`` that were ranked.

        Raises:
            ConfigError: an embedding is not finite, or fewer than two instances could be decoded.
            ShardError: a shard is damaged; this and what follows on the rank that reads it.
            SampleError: a sample cannot be decoded, or too many cannot.
        """
        config = self._config
        embeddings = embed_dataset(
            model,
            self._reader,
            config.clip,
            clips_per_instance=self._settings.clips_per_instance,
            batch_size=self._settings.batch_size,
            statistics=self._statistics,
            workers=config.data.workers,
            device=config.data.device,
            instances=self.instances,
            group=group,
            precision=torch.bfloat16 if config.compute.precision == "bfloat16" else None,
            max_failure_rate=config.data.max_failure_rate,
            on_failure=on_failure,
        )
        found = embeddings.found
        video, audio, first_labels = embeddings.video[found], embeddings.audio[found], embeddings.labels[found]
        labels = first_labels if bool((first_labels >= 0).any()) else None
        return {
            **_tagged("video_to_audio", retrieve(video, audio, labels)),
            **_tagged("audio_to_video", retrieve(audio, video, labels)),
            **_tagged("chance", chance(len(video), labels)),
            "retrieval/instances": float(len(video)),
        }


def _with_both(manifest: Manifest, clip: ClipSettings, url: str) -> IntArray:
    """The instances with picture and sound."""
    both = clip.model_copy(update={"modalities": ("video", "audio")})
    subset = WITH_AUDIO if "audio" not in manifest.modalities and WITH_AUDIO in manifest.subsets else None
    try:
        resolve_modalities(both, manifest, subset)
    except ConfigError as error:
        raise ConfigError(f"evaluation.data: {url}: retrieval needs picture and sound: {error}") from error
    return np.arange(manifest.num_samples, dtype=np.int64) if subset is None else manifest.subset_indices(subset)


def _tagged(name: str, result: RetrievalResult) -> dict[str, float]:
    values = {f"retrieval/{name}_R@{k}": recall for k, recall in result.recall.items()}
    values[f"retrieval/{name}_median_rank"] = result.median_rank
    if result.class_precision is not None:
        values[f"retrieval/{name}_class_precision"] = result.class_precision
    return values
