"""AudioSet: any tree of files, and the official segments CSV."""

import importlib.resources
import os
import re
from collections.abc import Iterator, Mapping, Sequence

from avid_pipeline.preprocess.sources.annotated import Annotation, Reading, annotated_sources, check_unique
from avid_pipeline.preprocess.sources.base import SourceList
from avid_pipeline.preprocess.sources.csv_table import (
    BadRow,
    RowError,
    bad_row_source,
    check_some_rows,
    count,
    parse_interval,
    parse_rows,
    parse_table,
)
from avid_pipeline.preprocess.sources.tree import list_tree, printable, read_text

CLASS_LIST = "audioset_class_labels_indices.csv"
_EXPECTED = 'YTID, start_seconds, end_seconds, "label,label,…"'
_NUMBER = r"([0-9]{1,12}(?:\.[0-9]{1,6})?)"
_WITH_START = re.compile(rf"(.+)_{_NUMBER}", re.DOTALL)
_WITH_BOTH = re.compile(rf"(.+)_{_NUMBER}_{_NUMBER}", re.DOTALL)


def list_audioset(
    root: str | os.PathLike[str],
    annotations: str | os.PathLike[str],
    split: str = "train",
    options: Mapping[str, str] | None = None,
    trim: bool = False,
) -> SourceList:
    """List the clips of a segments CSV.

    A clip's file may be anywhere below the root and be called ``<id>``, ``Y<id>``, ``<id>_<start>`` or
    ``<id>_<start>_<end>`` with any ending, times being seconds or milliseconds. The classes are the display names of
    all 527 classes, in the order of their official numbers.

    Args:
        root: path or URL of the folder that holds the files.
        annotations: path or URL of the CSV: ``YTID, start_seconds, end_seconds, positive_labels``, where lines that
            begin with ``#`` are comments.
        split: what this part of the data set is called.
        options: of the object store.
        trim: cut files called ``<id>.<ending>`` to the row's times, for they are whole videos.

    Raises:
        PreprocessError: the folder or the CSV does not exist, is empty or is no such CSV.
        StorageError: the object store cannot be read.
    """
    where = printable(os.fspath(annotations))
    names = class_names()
    clips, bad = parse_segments(read_text(annotations, options), where, names)
    sources, notes = annotated_sources(
        list_tree(root, options), clips, file_name_readings, _key_name, trim=trim, table=annotations
    )
    unlabelled = sum(not clip.labels for clip in clips)
    if unlabelled:
        notes = (f"{count(unlabelled, 'row')} without a label.", *notes)
    rejected = tuple(bad_row_source(row, where.rsplit("/", 1)[-1]) for row in bad)
    return SourceList(
        "audioset", split, tuple(names.values()), check_unique(sources + rejected), notes=notes, trim=trim
    )


def class_names() -> dict[str, str]:
    """Machine identifier (for example ``/m/09x0r``) to display name of all classes, in their official order."""
    package = importlib.resources.files("avid_pipeline.preprocess.sources")
    text = package.joinpath(CLASS_LIST).read_text(encoding="utf-8")
    rows = parse_table(text, CLASS_LIST, ("index", "mid", "display_name")).rows
    return {row.text("mid"): row.text("display_name") for row in sorted(rows, key=lambda r: int(r.text("index")))}


def parse_segments(text: str, where: str, names: Mapping[str, str]) -> tuple[list[Annotation], list[BadRow]]:
    """The clips of a segments CSV, and the rows that are none.

    Args:
        text: the CSV.
        where: the file, for messages.
        names: machine identifier to class name.

    Raises:
        PreprocessError: no row is a clip, or the CSV cannot be parsed.
    """
    clips: list[Annotation] = []
    bad: list[BadRow] = []
    for row in parse_rows(text, where, comments=True, spaces=True):
        if isinstance(row, BadRow):
            bad.append(row)
            continue
        line, fields = row
        if fields[0].strip() == "YTID":
            continue
        try:
            clips.append(_parse(line, [field.strip() for field in fields], names))
        except RowError as error:
            bad.append(BadRow(line, str(error)))
    if not clips and not bad:
        bad.append(BadRow(1, "there is no row"))
    check_some_rows(len(clips), bad, where, _EXPECTED)
    return clips, bad


def _parse(line: int, fields: Sequence[str], names: Mapping[str, str]) -> Annotation:
    if len(fields) != 4 or not fields[0]:
        raise RowError(f"expected {_EXPECTED}, found {len(fields)} fields")
    start, end = parse_interval(fields[1], fields[2], ("start_seconds", "end_seconds"))
    first, last = round(start * 1000), round(end * 1000)
    if last <= first:
        raise RowError(f"end_seconds: expected a millisecond after {fields[1]} at least, found {fields[2]}")
    identifiers = [text.strip() for text in fields[3].split(",") if text.strip()]
    for identifier in identifiers:
        if identifier not in names:
            raise RowError(f"positive_labels: {identifier[:40]!r} is none of the {len(names)} classes")
    return Annotation(line, fields[0], first, last, tuple(names[text] for text in dict.fromkeys(identifiers)))


def file_name_readings(stem: str) -> Iterator[Reading]:
    """All ways to read a file name without its ending as a clip, the likeliest first."""
    yield Reading(stem, None, None, cut=False)
    for text in (stem, stem[1:]) if stem.startswith("Y") and len(stem) > 1 else (stem,):
        if text != stem:
            yield Reading(text, None, None, cut=True)
        if both := _WITH_BOTH.fullmatch(text):
            for start, end in zip(_milliseconds(both[2]), _milliseconds(both[3]), strict=False):
                yield Reading(both[1], start, end, cut=True)
        if one := _WITH_START.fullmatch(text):
            for start in _milliseconds(one[2]):
                yield Reading(one[1], start, None, cut=True)


def _milliseconds(text: str) -> list[int]:
    """What a number in a file name may mean: seconds, or, without decimals, milliseconds."""
    found = [round(float(text) * 1000)]
    return found if "." in text else [*found, int(text)]


def _key_name(clip: Annotation) -> str:
    return f"{clip.id}_{clip.start}_{clip.end}"
