"""The folders of cached features below an evaluation's output."""

import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from avid_pipeline.clips.reading import ClipChoice, EvaluationChoice
from avid_pipeline.collectives import RankGroup
from avid_pipeline.errors import StorageError
from avid_pipeline.evaluate.checkpoint import EvaluatedModel
from avid_pipeline.evaluate.classification.cached import CachedSource, classify_cached
from avid_pipeline.evaluate.classification.config import LinearConfig
from avid_pipeline.evaluate.classification.data import Task
from avid_pipeline.evaluate.classification.testing import Classifier, Outcome
from avid_pipeline.evaluate.data import EvaluationData
from avid_pipeline.evaluate.extraction import FeatureRequest, extract_features
from avid_pipeline.evaluate.feature_store import FeatureStore
from avid_pipeline.shards_spec.manifest import fingerprint
from avid_pipeline.shards_spec.storage import Storage, open_storage
from avid_pipeline.together import run_together

__all__ = ["FeatureCache"]

_PREFIX = "features-"
_HASH_DIGITS = 12
_FOLDER = re.compile(rf"({_PREFIX}(?:train|test)-[0-9a-f]{{{_HASH_DIGITS}}})/")
_DELETED_AT_ONCE = 8


@dataclass(frozen=True)
class FeatureCache:
    """Features of training clips and of the clips of the tests between epochs.

    A folder is called after what its features are of, so that those of other settings are never taken for them:
    ``features-train-…`` and ``features-test-…``.

    Attributes:
        evaluated: the frozen model.
        task: the data.
        config: the settings.
        output: folder of the evaluation.
        group: the ranks, which compute and read the features together.
        say: is told of clips that cannot be decoded.
        options: of the object store that ``output`` is in.
    """

    evaluated: EvaluatedModel
    task: Task
    config: LinearConfig
    output: Storage
    group: RankGroup
    say: Callable[[str], object]
    options: Mapping[str, str] | None

    def training_source(self) -> CachedSource:
        """Compute what is missing of the training clips' features, and open them.

        Raises:
            AvidPipelineError: as :func:`~avid_pipeline.evaluate.extraction.extract_features` does.
        """
        config = self.config
        store = self._extract(self.task.train, config.data.clips_per_instance, self.task.training_choice)
        return CachedSource(
            store,
            config.features,
            self.task.train,
            self.group,
            batch_size=config.data.batch_size,
            seed=config.seed,
            mixed=config.cache.mixed_chunks,
        )

    def test(self, classify: Classifier) -> Callable[[], Outcome]:
        """Compute what is missing of the test clips' features; returns what classifies them.

        Raises:
            AvidPipelineError: as :func:`~avid_pipeline.evaluate.extraction.extract_features` does.
        """
        clips = self.config.test.clips_per_instance
        store = self._extract(self.task.test, clips, EvaluationChoice(clips))
        return lambda: classify_cached(store, self.config.features, self.task.test, classify, self.group)

    def remove_others(self) -> None:
        """Remove cached features that are not those of these settings; every rank calls this.

        Raises:
            StorageError: they cannot be removed.
        """
        clips = self.config.test.clips_per_instance
        kept = {
            self._name(self.task.train, self.config.data.clips_per_instance, self.task.training_choice),
            self._name(self.task.test, clips, EvaluationChoice(clips)),
        }

        def remove() -> None:
            if self.group.rank > 0:
                return
            for folder in {found[1] for name in self.output.names() if (found := _FOLDER.match(name))} - kept:
                _remove_folder(self.output, folder)

        run_together(self.group, remove)

    def _extract(self, data: EvaluationData, clips: int, choice: ClipChoice) -> FeatureStore:
        name = self._name(data, clips, choice)

        return extract_features(
            self.evaluated,
            data,
            self._request(clips, choice),
            open_storage(self.output.url_of(name), create=True, options=self.options),
            self.group,
            loading=self.config.data,
            say=self.say,
        )

    def _request(self, clips: int, choice: ClipChoice) -> FeatureRequest:
        config = self.config
        return FeatureRequest(
            names=tuple(config.features.values()),
            clips=clips,
            choice=choice,
            batch_size=config.test.batch_size,
            dtype=config.cache.dtype,
            precision="bfloat16" if config.compute.precision == "bfloat16" else "float32",
            clip=config.clip,
        )

    def _name(self, data: EvaluationData, clips: int, choice: ClipChoice) -> str:
        config, request = self.config, self._request(clips, choice)
        augmented = None if isinstance(choice, EvaluationChoice) else choice.augmentation.model_dump(mode="json")
        sound = self.task.statistics if config.modality == "audio" else None
        facts = {
            "checkpoint": self.evaluated.identity.key,
            "data": data.identity().model_dump(mode="json", exclude={"role", "url"}),
            "features": request.names,
            "clips": clips,
            "clip": config.clip.model_dump(mode="json"),
            "statistics": sound and fingerprint(sound.model_dump(mode="json")),
            "augmented": augmented and {"seed": config.seed, **augmented},
            "dtype": request.dtype,
            "precision": config.compute.precision,
        }
        return f"{_PREFIX}{data.role}-{fingerprint(facts).removeprefix('sha256:')[:_HASH_DIGITS]}"


def _remove_folder(root: Storage, folder: str) -> None:
    path = root.local_path(folder)
    if path is None:
        with ThreadPoolExecutor(_DELETED_AT_ONCE) as pool:
            list(pool.map(root.delete, root.names(folder)))
        return
    try:
        shutil.rmtree(path)
    except OSError as error:
        raise StorageError(f"{path}: cannot remove: {error.strerror}; remove it by hand") from error
