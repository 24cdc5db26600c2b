"""The commands ``retrieval`` and ``knn``: what the neighbours in frozen features know."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import click

from avid_pipeline.errors import ConfigError
from avid_pipeline.evaluate.command_options import feature_options, loading_of, names_option, split_names
from avid_pipeline.evaluate.data import EvaluationData, embeddings_of, open_data, open_fold, require_same_classes
from avid_pipeline.evaluate.extraction import FeatureRequest
from avid_pipeline.evaluate.feature_store import FeatureStore
from avid_pipeline.evaluate.knn import classify
from avid_pipeline.evaluate.layers import modalities_of
from avid_pipeline.evaluate.neighbour_picture import draw_neighbours
from avid_pipeline.evaluate.report import Report, write_report
from avid_pipeline.evaluate.results import REPORT_NAME, Results, Table, terminal_table, versions
from avid_pipeline.evaluate.retrieval import by_gallery, within_and_across
from avid_pipeline.evaluate.session import Session, open_session
from avid_pipeline.shards_spec.command_line import FriendlyCommand
from avid_pipeline.shards_spec.storage import Storage
from avid_pipeline.together import run_together

__all__ = ["knn", "retrieval"]

_FEATURES, _GALLERY_FEATURES = "features", "gallery-features"


@dataclass(frozen=True)
class _Evaluation:
    """Queries and, where it is apart, the gallery: data, features, and where results go."""

    session: Session
    output: Storage
    data: EvaluationData
    gallery: EvaluationData | None
    store: FeatureStore
    gallery_store: FeatureStore | None
    settings: dict[str, Any]

    def results(self, command: str, tables: Sequence[Table]) -> Results:
        stores = [self.store] if self.gallery_store is None else [self.store, self.gallery_store]
        return Results(
            command=command,
            checkpoint=self.session.evaluated.identity,
            data=tuple(data.identity() for data in (self.data, self.gallery) if data is not None),
            settings=self.settings,
            versions=versions(),
            undecodable=sum(int((~store.found().any(axis=0)).sum()) for store in stores),
            tables=tuple(tables),
        )

    def finish(self, report: Report) -> None:
        write_report(self.output, report)
        for table in report.results.tables:
            click.echo(f"\n{terminal_table(table)}")
        left_out = report.results.undecodable
        if left_out:
            click.echo(f"{left_out} instances could not be decoded and were left out")
        click.echo(f"\nwritten to {self.output.url_of(REPORT_NAME)} and results.json beside it")


def _data_options(command: Any) -> Any:
    options = [
        click.option("--data", required=True, help="Root of the data: a folder or URL of shards."),
        click.option("--subset", help="Named subset of the data's manifest, instead of all."),
        click.option("--gallery", help="Root of the gallery, as a rule the training set, instead of the data itself."),
        click.option("--fold", type=click.IntRange(min=1), help="Search the training part of a fold for its test part "
                     "(UCF101, HMDB51, ESC-50)."),
        click.option("--output", help="Folder or URL of results; computed features stay there.  [default: evaluation/ "
                     "below a local CHECKPOINT folder, else below the current one]"),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


@click.command(cls=FriendlyCommand)
@feature_options(clips=10)
@_data_options
@names_option("What to search with.  [default: the embeddings; with a gallery or fold video.pool, or audio.pool]")
def retrieval(**arguments: Any) -> None:
    """Nearest neighbours: R@1, 5, 10 and 20, by instance and by class.

    Without a gallery, every instance's picture is to find its own sound and the other way round, clips of even number
    those of odd number, and neighbours of the query's class. With --gallery or --fold, instances of the gallery are to
    be found that have the query's class, as in the literature on UCF101 and HMDB51.
    """
    with _open("retrieval", settings={}, **arguments) as evaluation:

        def finish() -> None:
            if evaluation.session.group.rank > 0:
                return
            store, gallery_store = evaluation.store, evaluation.gallery_store
            if gallery_store is None:
                tables, found = within_and_across(store)
            else:
                tables, found = by_gallery(store, gallery_store)
            gallery = evaluation.gallery or evaluation.data
            pictures = tuple(draw_neighbours(each, evaluation.data, gallery) for each in found)
            evaluation.finish(Report(evaluation.results("retrieval", tables), pictures=pictures))

        run_together(evaluation.session.group, finish)


@click.command(cls=FriendlyCommand)
@feature_options(clips=10)
@_data_options
@click.option("--k", "ks", default=(1, 5, 20), show_default=True, multiple=True, type=click.IntRange(min=1),
              help="Neighbours that vote; may be repeated.")  # fmt: skip
@click.option("--temperature", default=0.07, show_default=True, type=click.FloatRange(0, min_open=True),
              help="Of the votes' weights.")  # fmt: skip
@names_option("What to compare by.  [default: video.pool and video, or audio.pool and audio, as the data have]")
def knn(ks: tuple[int, ...], temperature: float, **arguments: Any) -> None:
    """Classify by the nearest neighbours of frozen features: the quick check of a model.

    Neighbours come from --gallery (the training set), from the training part of a --fold, or, without either, from the
    data themselves, each instance leaving itself out.
    """
    settings = {"k": sorted(set(ks)), "temperature": temperature}
    with _open("knn", settings=settings, **arguments) as evaluation:

        def finish() -> None:
            if evaluation.session.group.rank == 0:
                classes = evaluation.data.classes
                table, confusion = classify(
                    evaluation.store, evaluation.gallery_store, classes, sorted(set(ks)), temperature
                )
                evaluation.finish(Report(evaluation.results("knn", [table]), confusions=confusion))

        run_together(evaluation.session.group, finish)


@contextmanager
def _open(
    command: str,
    checkpoint: str,
    data: str,
    subset: str | None,
    gallery: str | None,
    fold: int | None,
    output: str | None,
    names: str | None,
    clips: int,
    batch_size: int,
    precision: Any,
    random_weights: int | None,
    overwrite: bool,
    storage_option: dict[str, str],
    settings: dict[str, Any],
    **loading: Any,
) -> Iterator[_Evaluation]:
    """Everything up to the features of queries and gallery."""
    if (gallery is not None or subset is not None) and fold is not None:
        raise ConfigError("--fold: says what the gallery and the queries are; give it alone, or --gallery and --subset")
    with open_session(checkpoint, loading_of(**loading), storage_option, random_weights) as session:
        queries, searched = _open_data(data, subset, gallery, fold, storage_option)
        wanted = split_names(names) or _default_names(command, queries, searched)
        if command == "knn" or searched is not None:
            queries.require_classes()
        for each in (queries, *([] if searched is None else [searched])):
            each.clip_settings(session.evaluated.clip, modalities_of(wanted))
        if searched is not None:
            session = _with_statistics(session, searched)
        request = FeatureRequest(wanted, clips, batch_size=batch_size, precision=precision)
        name = _name(command, queries, searched)
        url = output or session.default_output(checkpoint, name)
        root = session.output(url, (_FEATURES, _GALLERY_FEATURES) if overwrite else None)
        yield _Evaluation(
            session=session,
            output=root,
            data=queries,
            gallery=searched,
            store=session.features(queries, request, root, _FEATURES),
            gallery_store=None if searched is None else session.features(searched, request, root, _GALLERY_FEATURES),
            settings={"clips": clips, "precision": precision, "features": list(wanted), **settings},
        )


def _with_statistics(session: Session, gallery: EvaluationData) -> Session:
    """Sound of both is normalised alike, by the training data's statistics where the model's are not known."""
    evaluated = session.evaluated
    statistics = evaluated.statistics or gallery.manifest.spectrogram_statistics
    return replace(session, evaluated=replace(evaluated, statistics=statistics))


def _name(command: str, queries: EvaluationData, gallery: EvaluationData | None) -> str:
    """Of the output, unless one is given."""
    parts = [command, queries.manifest.dataset, queries.manifest.split, queries.subset]
    if gallery is not None:
        parts += ["from", gallery.manifest.split if gallery.subset is None else gallery.subset]
    return "-".join(part for part in parts if part is not None)


def _open_data(
    data: str, subset: str | None, gallery: str | None, fold: int | None, options: dict[str, str]
) -> tuple[EvaluationData, EvaluationData | None]:
    """Queries, and the gallery where it is apart."""
    if fold is not None:
        train, test = open_fold(data, fold, options, roles=("gallery", "queries"))
        return test, train
    if gallery is None:
        return open_data(data, options, subset=subset), None
    queries = open_data(data, options, subset=subset, role="queries")
    searched = open_data(gallery, options, role="gallery")
    require_same_classes(queries, searched)
    return queries, searched


def _default_names(command: str, queries: EvaluationData, gallery: EvaluationData | None) -> tuple[str, ...]:
    both = embeddings_of(queries if gallery is None else gallery)
    embeddings = tuple(name for name in embeddings_of(queries) if name in both)
    if command == "retrieval" and gallery is None:
        return embeddings
    pooled = tuple(f"{modality}.pool" for modality in embeddings)
    return (*pooled, *embeddings) if command == "knn" else pooled
