"""The data that a model is evaluated on: which instances, of which modalities, with which classes."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np

from avid_pipeline.clips.settings import ClipSettings, resolve_modalities
from avid_pipeline.errors import ConfigError
from avid_pipeline.evaluate.results import DataIdentity
from avid_pipeline.shards_spec.manifest import Manifest, Modality
from avid_pipeline.shards_spec.reader import ShardReader, open_dataset
from avid_pipeline.streams.batches import IntArray

__all__ = ["EvaluationData", "embeddings_of", "folds_of", "open_data", "open_fold", "require_same_classes"]

_FOLD = re.compile(r"fold(\d+)-(train|test)")


@dataclass(frozen=True)
class EvaluationData:
    """Instances of a data set.

    Attributes:
        reader: of the data set.
        subset: named subset of its manifest; None for all of it.
        instances: their indices, int64 [N], ascending.
        role: what the data are for, in results: ``train``, ``test``, ``gallery``, ``queries`` or ``data``.
    """

    reader: ShardReader
    subset: str | None
    instances: IntArray
    role: str = "data"

    @property
    def manifest(self) -> Manifest:
        """What the data set holds."""
        return self.reader.manifest

    @property
    def url(self) -> str:
        """Root of the data set."""
        return self.reader.storage.url

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; a label is a position among them."""
        return self.manifest.classes

    def identity(self) -> DataIdentity:
        """What results say of the data."""
        return DataIdentity(
            role=self.role,
            url=self.url,
            dataset=self.manifest.dataset,
            split=self.manifest.split,
            fingerprint=self.manifest.fingerprint(),
            subset=self.subset,
            instances=len(self.instances),
        )

    def clip_settings(self, clip: ClipSettings, modalities: tuple[Modality, ...]) -> ClipSettings:
        """Clip settings that read these modalities.

        Raises:
            ConfigError: not every instance has them; the message names the data set.
        """
        wanted = clip.model_copy(update={"modalities": modalities})
        try:
            return resolve_modalities(wanted, self.manifest, self.subset)
        except ConfigError as error:
            raise ConfigError(f"{self.url}: this evaluation needs {' and '.join(modalities)}: {error}") from error

    def require_classes(self) -> None:
        """Check that the data have labels to learn and to compare with.

        Raises:
            ConfigError: they have no classes.
        """
        if not self.classes:
            raise ConfigError(f"{self.url}: has no classes in its manifest, and this evaluation needs labels")


def open_data(
    root: str, options: Mapping[str, str] | None = None, *, subset: str | None = None, role: str = "data"
) -> EvaluationData:
    """Open a data set, or a named subset of it.

    Args:
        root: folder or URL of shards.
        options: of the object store.
        subset: of the manifest; None for all instances.
        role: see :class:`EvaluationData`.

    Raises:
        StorageError: the root cannot be read.
        ManifestError: it is no data set, or has no such subset.
        ConfigError: there is no instance.
    """
    reader = open_dataset(root, options)
    return _of_reader(reader, subset, role)


def open_fold(
    root: str, fold: int, options: Mapping[str, str] | None = None, *, roles: tuple[str, str] = ("train", "test")
) -> tuple[EvaluationData, EvaluationData]:
    """The training and the test instances of a fold.

    Args:
        root: folder or URL of shards that have folds as subsets, as those of UCF101, HMDB51 and ESC-50.
        fold: from 1.
        options: of the object store.
        roles: of the two.

    Raises:
        StorageError: the root cannot be read.
        ManifestError: it is no data set.
        ConfigError: it has no such fold, or a part of it is empty; the message lists the folds that there are.
    """
    reader = open_dataset(root, options)
    folds = folds_of(reader.manifest)
    if fold not in folds:
        known = f"it has {', '.join(map(str, folds))}" if folds else "it has none"
        remedy = "" if folds else "; were the official lists there when it was converted (docs/datasets.md)?"
        raise ConfigError(f"{reader.storage.url}: there is no fold {fold} in this data set: {known}{remedy}")
    train, test = (
        _of_reader(reader, f"fold{fold}-{part}", role) for part, role in zip(("train", "test"), roles, strict=True)
    )
    return train, test


def embeddings_of(data: EvaluationData) -> tuple[Modality, ...]:
    """The modalities that every instance has, which are the names of its embeddings, video first."""
    return resolve_modalities(ClipSettings(), data.manifest, data.subset).modalities or ()


def require_same_classes(first: EvaluationData, second: EvaluationData) -> None:
    """Check that labels mean the same in two data sets.

    Raises:
        ConfigError: they have other classes; the message says the first difference.
    """
    if first.classes == second.classes:
        return
    pairs = zip_longest(first.classes, second.classes)
    place, pair = next((n, pair) for n, pair in enumerate(pairs) if pair[0] != pair[1])
    ours, theirs = ("no such class" if name is None else repr(name) for name in pair)
    raise ConfigError(
        f"{second.url}: expected the classes of {first.url} in the same order, for labels are places among them: class "
        f"{place} is {ours} there and {theirs} here; convert both with one list of classes"
    )


def folds_of(manifest: Manifest) -> tuple[int, ...]:
    """Numbers of the folds that have both a training and a test subset, ascending."""
    parts = {found.groups() for name in manifest.subsets if (found := _FOLD.fullmatch(name))}
    numbers = {int(number) for number, _ in parts}
    return tuple(sorted(n for n in numbers if {(str(n), "train"), (str(n), "test")} <= parts))


def _of_reader(reader: ShardReader, subset: str | None, role: str) -> EvaluationData:
    instances = np.arange(len(reader), dtype=np.int64) if subset is None else reader.manifest.subset_indices(subset)
    if len(instances) == 0:
        what = "the data set" if subset is None else f"its subset {subset}"
        raise ConfigError(f"{reader.storage.url}: {what} has no instances, so there is nothing to evaluate")
    return EvaluationData(reader, subset, instances, role)
