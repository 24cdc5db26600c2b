"""Retrieval: between modalities and within one, by instance and by class."""

from dataclasses import dataclass

import torch
from torch import Tensor

from avid_pipeline.errors import ConfigError
from avid_pipeline.evaluate.feature_store import FeatureStore
from avid_pipeline.evaluate.neighbours import class_recall, class_recall_by_chance, nearest, share_a_class
from avid_pipeline.evaluate.results import Rows, Table
from avid_pipeline.evaluate.vectors import instance_vectors
from avid_pipeline.retrieval import RECALL_AT, RetrievalResult, chance, retrieve

__all__ = ["Neighbours", "by_gallery", "by_instance", "within_and_across"]

_SHOWN = 5


@dataclass(frozen=True)
class Neighbours:
    """The nearest neighbours of every query, for a picture.

    Attributes:
        title: what is searched with what, for example ``video to audio``.
        query_modality: of what is searched with, ``video`` or ``audio``.
        modality: of what is found.
        queries: instances, int64 [Q].
        found: instances of the gallery, int64 [Q, k], nearest first.
        alike: whether a neighbour has a class of its query, bool [Q, k].
    """

    title: str
    query_modality: str
    modality: str
    queries: Tensor
    found: Tensor
    alike: Tensor


@dataclass(frozen=True)
class _Side:
    """Vectors of the instances that could be decoded, and what is known of them."""

    instances: Tensor
    vectors: Tensor
    labels: Tensor

    @classmethod
    def of(cls, store: FeatureStore, name: str, found: Tensor) -> "_Side":
        vectors, _ = instance_vectors(store, name)
        labels = torch.from_numpy(store.label_sets())
        return cls(torch.from_numpy(store.index)[found], vectors[found], labels[found])


def within_and_across(store: FeatureStore) -> tuple[list[Table], list[Neighbours]]:
    """Retrieval among the instances of one data set, by instance and by class.

    Within every feature, and between the two embeddings, which share a space.

    Args:
        store: features of the data set.

    Returns:
        Tables, and the neighbours behind them.

    Raises:
        ConfigError: fewer than two instances could be decoded, vectors are not finite, or there is nothing to retrieve.
    """
    found = torch.from_numpy(store.found().any(axis=0))
    if int(found.sum()) < 2:
        raise ConfigError(f"{store.storage.url}: expected at least 2 instances to search, found {int(found.sum())}")
    sides = {name: _Side.of(store, name, found) for name in store.names}
    labels = next(iter(sides.values())).labels
    labelled = (labels != 0).any(dim=1)
    rows: Rows = {}
    neighbours = []
    for query, candidate in _pairs(store.names):
        title = f"{query} to {candidate}"
        _, order = nearest(sides[query].vectors, sides[candidate].vectors, max(RECALL_AT), exclude_own=True)
        shared = share_a_class(labels, labels, order)
        neighbours.append(_shown(title, sides[query], sides[candidate], order, shared, query, candidate))
        if bool(labelled.any()):
            rows[title] = _recalls(class_recall(shared[labelled], RECALL_AT))
    tables = [table for table in [by_instance(store)] if len(table.rows) > 1]
    if rows:
        rows["chance"] = _recalls(class_recall_by_chance(labels[labelled], labels, RECALL_AT, exclude_own=True))
        note = "share of queries with a neighbour of their class among the first k, their own instance left out"
        tables.append(Table(title="retrieval by class", rows=rows, note=note))
    if not tables:
        raise ConfigError(
            f"{store.storage.url}: one modality, one clip of each instance and no labels leave nothing to retrieve; "
            "give --clips 2 or more"
        )
    return tables, neighbours


def by_instance(store: FeatureStore) -> Table:
    """Retrieval of a query's own counterpart among those of all instances.

    Between modalities, an instance's picture is to find its own sound and the other way round. Within a feature, the
    mean of its clips of even number is to find that of its clips of odd number; with a single clip of each, and a
    single feature, only chance is left.

    Raises:
        ConfigError: fewer than two instances could be decoded, or vectors are not finite.
    """
    found = torch.from_numpy(store.found().any(axis=0))
    labels = torch.from_numpy(store.labels())
    rows: Rows = {}
    for query, candidate in _pairs(store.names):
        if query != candidate:
            ours, theirs = (instance_vectors(store, name)[0][found] for name in (query, candidate))
            rows[f"{query} to {candidate}"] = _cells(retrieve(ours, theirs, _labels(labels[found])))
        elif store.clips >= 2:
            halves = range(0, store.clips, 2), range(1, store.clips, 2)
            (even, seen_even), (odd, seen_odd) = (instance_vectors(store, query, half) for half in halves)
            both = seen_even & seen_odd
            rows[f"{query} to {candidate}"] = _cells(retrieve(even[both], odd[both], _labels(labels[both])))
    rows["chance"] = _cells(chance(int(found.sum()), _labels(labels[found])))
    note = "share of queries whose own counterpart is among the first k"
    if store.clips >= 2:
        note += "; within a feature, clips of even number are to find those of odd number"
    return Table(title="retrieval by instance", rows=rows, note=note)


def by_gallery(query_store: FeatureStore, gallery_store: FeatureStore) -> tuple[list[Table], list[Neighbours]]:
    """Retrieval by class of a gallery's instances (training set) for queries (test set), as in the literature.

    Args:
        query_store: features of the queries.
        gallery_store: the same features of the gallery, whose classes are the same; each is a row of the table.

    Raises:
        ConfigError: no query has a label, or vectors are not finite.
    """
    rows: Rows = {}
    neighbours = []
    found = [torch.from_numpy(store.found().any(axis=0)) for store in (query_store, gallery_store)]
    for name in query_store.names:
        queries, gallery = (
            _Side.of(store, name, ok) for store, ok in zip((query_store, gallery_store), found, strict=True)
        )
        labelled = (queries.labels != 0).any(dim=1)
        if not bool(labelled.any()):
            raise ConfigError(f"{query_store.storage.url}: no query has a label, and retrieval by class needs labels")
        _, order = nearest(queries.vectors[labelled], gallery.vectors, max(RECALL_AT))
        shared = share_a_class(queries.labels[labelled], gallery.labels, order)
        rows[name] = _recalls(class_recall(shared, RECALL_AT))
        shown = gallery.instances[order[:, :_SHOWN]]
        modality = _modality(name)
        neighbours.append(Neighbours(name, modality, modality, queries.instances[labelled], shown, shared[:, :_SHOWN]))
    rows["chance"] = _recalls(class_recall_by_chance(queries.labels[labelled], gallery.labels, RECALL_AT))
    note = "share of queries with an instance of their class among the first k of the gallery"
    return [Table(title="retrieval from the gallery, by class", rows=rows, note=note)], neighbours


def _pairs(names: tuple[str, ...]) -> list[tuple[str, str]]:
    """What can be searched with what: embeddings first, between the modalities before within one."""
    across = [("video", "audio"), ("audio", "video")] if {"video", "audio"} <= set(names) else []
    return across + [(name, name) for name in names]


def _shown(
    title: str, queries: _Side, candidates: _Side, order: Tensor, shared: Tensor, query: str, candidate: str
) -> Neighbours:
    """What a picture shows; between modalities the own counterpart is a candidate: the one that should be found."""
    if query != candidate:
        _, order = nearest(queries.vectors, candidates.vectors, _SHOWN)
        shared = share_a_class(queries.labels, candidates.labels, order)
    found = candidates.instances[order[:, :_SHOWN]]
    return Neighbours(title, _modality(query), _modality(candidate), queries.instances, found, shared[:, :_SHOWN])


def _modality(name: str) -> str:
    return name.partition(".")[0]


def _labels(labels: Tensor) -> Tensor | None:
    return labels if bool((labels >= 0).any()) else None


def _recalls(recall: dict[int, float]) -> dict[str, float | None]:
    return {f"R@{k}": value for k, value in recall.items()}


def _cells(result: RetrievalResult) -> dict[str, float | None]:
    return {
        **_recalls(result.recall),
        "median rank": result.median_rank,
        **({} if result.class_precision is None else {"class P@1": result.class_precision}),
    }
