"""Kinetics 400, 600 and 700: class folders ``SRC/<class>/<id>….mp4``, or any tree and the official CSV."""

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from avid_pipeline.preprocess.errors import PreprocessError
from avid_pipeline.preprocess.sources.annotated import Annotation, Reading, annotated_sources, check_unique
from avid_pipeline.preprocess.sources.base import Source, SourceList
from avid_pipeline.preprocess.sources.csv_table import (
    BadRow,
    Row,
    RowError,
    Table,
    bad_row_source,
    check_some_rows,
    count,
    parse_interval,
    parse_table,
)
from avid_pipeline.preprocess.sources.tree import SourceTree, list_tree, printable, read_text

_SPLIT_FOLDERS = {"train", "val", "validate", "validation", "test"}
_VALIDATION = {"val", "validate", "validation"}
_COLUMNS = ("youtube_id", "time_start", "time_end")
_TRIMMED = re.compile(r"(.+)_([0-9]{6})_([0-9]{6})", re.DOTALL)


def list_kinetics(
    root: str | os.PathLike[str],
    split: str = "train",
    options: Mapping[str, str] | None = None,
    annotations: str | os.PathLike[str] | None = None,
    trim: bool = False,
) -> SourceList:
    """List a tree of class folders, or the clips of an official CSV.

    Without ``annotations`` every file is listed, whatever its name: what is no video is quarantined later, with its
    reason, rather than passed over here; files outside a class folder are listed with a rejection. With
    ``annotations`` the rows of the split are listed, each with its file ``<id>.<ending>`` or
    ``<id>_<start>_<end>.<ending>`` (six digits each) anywhere below the root. The classes are then those of the whole
    CSV, whatever the split, so that labels of all its splits agree.

    Args:
        root: path or URL of the folder that holds the class folders, or the files.
        split: what this part of the data set is called; ``val``, ``validate`` and ``validation`` name the same rows.
        options: of the object store.
        annotations: path or URL of the CSV: ``label, youtube_id, time_start, time_end, split`` in any order; ``label``
            and ``split`` may be absent, other columns do not matter.
        trim: cut files called ``<id>.<ending>`` to the row's times, for they are whole videos.

    Raises:
        PreprocessError: the folder does not exist, is empty, or holds splits instead of classes; the CSV lacks a
            column or has no row of this split.
        StorageError: the object store cannot be read.
    """
    if annotations is not None:
        return _list_annotated(root, split, options, annotations, trim)
    if trim:
        raise PreprocessError("trim: times to cut videos to come from annotations; give the official CSV as well")
    tree = list_tree(root, options)
    if tree.folders and tree.folders <= _SPLIT_FOLDERS:
        example = f"{tree.root.rstrip('/')}/{min(tree.folders)}"
        raise PreprocessError(
            f"{tree.root}: holds splits ({', '.join(sorted(tree.folders))}), not classes; give {example}"
        )
    return SourceList("kinetics", split, tuple(sorted(tree.folders)), tuple(_class_folder_sources(tree)))


def _class_folder_sources(tree: SourceTree) -> Iterator[Source]:
    for name, location in tree.files.items():
        inside = "/" in name
        yield Source(
            name=name,
            location=location,
            id=Path(name).stem,
            labels=(name.split("/", 1)[0],) if inside else (),
            rejection=None
            if inside
            else ("no_class_folder", "expected the file inside a class folder; move or remove it"),
        )


def _list_annotated(
    root: str | os.PathLike[str],
    split: str,
    options: Mapping[str, str] | None,
    annotations: str | os.PathLike[str],
    trim: bool,
) -> SourceList:
    where = printable(os.fspath(annotations))
    table = parse_table(read_text(annotations, options), where, _COLUMNS)
    wanted, notes = _rows_of_split(table, split, where)
    clips: list[Annotation] = []
    bad = list(table.bad)
    for row in wanted:
        try:
            clips.append(_parse(row))
        except RowError as error:
            bad.append(BadRow(row.line, str(error)))
    check_some_rows(len(clips), bad, where, f"the columns {', '.join(_COLUMNS)}")
    unlabelled = sum(not clip.labels for clip in clips)
    if unlabelled:
        notes.append(f"{count(unlabelled, 'row')} without a label.")
    sources, more = annotated_sources(
        list_tree(root, options), clips, _readings, _key_name, trim=trim, table=annotations
    )
    rejected = tuple(bad_row_source(row, where.rsplit("/", 1)[-1]) for row in bad)
    classes = sorted({row.text("label") for row in table.rows} - {""})
    return SourceList(
        "kinetics", split, tuple(classes), check_unique(sources + rejected), notes=(*notes, *more), trim=trim
    )


def _rows_of_split(table: Table, split: str, where: str) -> tuple[list[Row], list[str]]:
    """The rows that belong to a split, or do not say, and what to tell about the others."""
    wanted: list[Row] = []
    others: Counter[str] = Counter()
    for row in table.rows:
        stated = row.text("split")
        if not stated or _split(stated) == _split(split):
            wanted.append(row)
        else:
            others[stated] += 1
    listed = ", ".join(f"{name} ({number:,})" for name, number in others.most_common(5))
    if others and not wanted:
        raise PreprocessError(f"{where}: no row is of the split {split!r}; found {listed}; give one of these")
    return wanted, [f"{count(others.total(), 'row')} of other splits left out: {listed}."] if others else []


def _split(name: str) -> str:
    lowered = name.strip().lower()
    return "val" if lowered in _VALIDATION else lowered


def _parse(row: Row) -> Annotation:
    identifier = row.text("youtube_id")
    if not identifier:
        raise RowError("youtube_id: is empty")
    start, end = parse_interval(row.text("time_start"), row.text("time_end"), ("time_start", "time_end"))
    if start % 1 or end % 1:
        raise RowError(f"expected whole seconds, found {start} and {end}")
    label = row.text("label")
    return Annotation(row.line, identifier, round(start) * 1000, round(end) * 1000, (label,) if label else ())


def _readings(stem: str) -> Iterator[Reading]:
    yield Reading(stem, None, None, cut=False)
    if trimmed := _TRIMMED.fullmatch(stem):
        identifier, start, end = trimmed.groups()
        yield Reading(identifier, int(start) * 1000, int(end) * 1000, cut=True)


def _key_name(clip: Annotation) -> str:
    return f"{clip.id}_{clip.start // 1000:06d}_{clip.end // 1000:06d}"
