"""ESC-50: ``audio/*.wav`` and ``meta/esc50.csv``; sound alone."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace

from avid_pipeline.preprocess.errors import PreprocessError
from avid_pipeline.preprocess.sources.annotated import check_unique, stem
from avid_pipeline.preprocess.sources.base import Source, SourceList
from avid_pipeline.preprocess.sources.csv_table import (
    BadRow,
    Row,
    RowError,
    bad_row_source,
    check_some_rows,
    count,
    parse_table,
    some,
)
from avid_pipeline.preprocess.sources.folds import address
from avid_pipeline.preprocess.sources.tree import SourceTree, list_tree, read_text

_TABLE = "meta/esc50.csv"
_COLUMNS = ("filename", "fold", "target", "category")
_FOLDS = range(1, 6)


def list_esc50(root: str | os.PathLike[str], options: Mapping[str, str] | None = None) -> SourceList:
    """List the clips of ``meta/esc50.csv``, with subsets ``fold1-train``, ``fold1-test`` and so on.

    ``fold1-test`` is fold 1, ``fold1-train`` the other four. Classes are the categories in the order of their targets.

    Args:
        root: path or URL of the folder that holds ``audio`` and ``meta``, or of the one that it is alone in.
        options: of the object store.

    Raises:
        PreprocessError: the folder does not exist, the CSV is not there or not as expected, or a category has two
            targets.
        StorageError: the object store cannot be read.
    """
    tree = list_tree(root, options)
    folder = _table_folder(tree)
    where = f"{tree.root.rstrip('/')}/{folder}{_TABLE}"
    table = parse_table(read_text(address(tree.files[folder + _TABLE]), options), where, _COLUMNS)
    good: dict[str, list[Row]] = {}
    bad = list(table.bad)
    for row in table.rows:
        try:
            _check(row)
        except RowError as error:
            bad.append(BadRow(row.line, str(error)))
        else:
            good.setdefault(row.text("filename"), []).append(row)
    check_some_rows(len(good), bad, where, f"the columns {', '.join(_COLUMNS)}")
    classes = class_order([row for rows in good.values() for row in rows], where)
    sources = [_source(tree, f"{folder}audio/{file}", rows) for file, rows in good.items()]
    sources += [bad_row_source(row, _TABLE) for row in bad]
    subsets = tuple(f"fold{fold}-{part}" for fold in _FOLDS for part in ("train", "test"))
    notes = _notes(tree, folder, good)
    return SourceList("esc50", "all", classes, check_unique(sources), ("audio",), subsets, notes)


def class_order(rows: Sequence[Row], where: str) -> tuple[str, ...]:
    """Categories in the order of their targets.

    Raises:
        PreprocessError: a category has two targets, or a target two categories.
    """
    names: dict[int, str] = {}
    targets: dict[str, int] = {}
    for row in rows:
        target, category = int(row.text("target")), row.text("category")
        if names.setdefault(target, category) != category or targets.setdefault(category, target) != target:
            raise PreprocessError(
                f"{where}: line {row.line}: category {category!r} with target {target} contradicts earlier lines; "
                "expected one target for each category"
            )
    return tuple(names[target] for target in sorted(names))


def _table_folder(tree: SourceTree) -> str:
    if _TABLE in tree.files:
        return ""
    folders = [name.removesuffix(_TABLE) for name in tree.files if name.endswith(f"/{_TABLE}")]
    if len(folders) == 1:
        return folders[0]
    found = f"found it in {some(folders)}" if folders else "found none"
    raise PreprocessError(f"{tree.root}: expected {_TABLE}, {found}; give the folder that holds audio and meta")


def _check(row: Row) -> None:
    for column in _COLUMNS:
        if not row.text(column):
            raise RowError(f"{column}: is empty")
    if row.text("fold") not in map(str, _FOLDS):
        raise RowError(f"fold: expected 1 to 5, found {row.text('fold')[:40]!r}")
    target = row.text("target")
    if not (target.isascii() and target.isdigit() and len(target) < 7):
        raise RowError(f"target: expected a number, found {target[:40]!r}")


def _source(tree: SourceTree, name: str, rows: Sequence[Row]) -> Source:
    first = rows[0]
    labels = (first.text("category"),)
    identifier = stem(name)
    other = _other(rows)
    if other is not None:
        detail = f"lines {first.line} and {other.line} differ in fold or category; keep the right one"
        return Source(name, None, identifier, rejection=("bad_annotation", detail))
    own = int(first.text("fold"))
    subsets = tuple(f"fold{fold}-{'test' if fold == own else 'train'}" for fold in _FOLDS)
    source = Source(name, tree.files.get(name), identifier, labels, subsets=subsets)
    if source.location is None:
        detail = f"line {first.line} of {_TABLE} names {name.rpartition('/')[2]}, but there is no {name}"
        return replace(source, rejection=("source_not_found", detail))
    return source


def _other(rows: Sequence[Row]) -> Row | None:
    """The first row of the same file that contradicts its first row."""
    columns = ("fold", "category")
    return next((row for row in rows if any(row.text(name) != rows[0].text(name) for name in columns)), None)


def _notes(tree: SourceTree, folder: str, rows: Mapping[str, Sequence[Row]]) -> tuple[str, ...]:
    notes: list[str] = []
    prefix = f"{folder}audio/"
    unnamed = [name for name in tree.files if name.startswith(prefix) and name.removeprefix(prefix) not in rows]
    if unnamed:
        notes.append(f"{count(len(unnamed), 'file')} left out, for no row names them: {some(unnamed)}.")
    repeated = sum(len(same) - 1 for same in rows.values() if _other(same) is None)
    if repeated:
        notes.append(f"{count(repeated, 'row')} left out, for equal rows stand before them.")
    return tuple(notes)
