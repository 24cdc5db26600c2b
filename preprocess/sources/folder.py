"""Any folder of files, or any list of them: CSV or JSONL."""

import json
import os
import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from avid_pipeline.preprocess.errors import PreprocessError
from avid_pipeline.preprocess.quarantine import Reason
from avid_pipeline.preprocess.sources.annotated import check_unique, stem
from avid_pipeline.preprocess.sources.base import RemoteFile, Segment, Source, SourceList
from avid_pipeline.preprocess.sources.csv_table import (
    MAX_SECONDS,
    BadRow,
    RowError,
    bad_row_source,
    check_interval,
    check_some_rows,
    count,
    parse_interval,
    parse_table,
    seconds,
    some,
)
from avid_pipeline.preprocess.sources.tree import list_tree, printable, read_text
from avid_pipeline.shards_spec.errors import StorageError
from avid_pipeline.shards_spec.manifest import Modality
from avid_pipeline.shards_spec.storage import is_remote, split_url

_FIELDS = ("url", "label", "start", "end", "id")
_LISTS = (".csv", ".jsonl")
_SCHEMES = ("s3", "s3a", "gs", "az", "azure", "adl", "abfs", "abfss", "http", "https")


@dataclass(frozen=True)
class Entry:
    """One entry of a list.

    Attributes:
        line: on which it stands, from 1.
        url: a path or URL as written.
        labels: class names.
        segment: the part of the file, or None for all of it.
        id: as given, or None.
    """

    line: int
    url: str
    labels: tuple[str, ...]
    segment: Segment | None
    id: str | None


def list_folder(
    source: str | os.PathLike[str],
    options: Mapping[str, str] | None = None,
    modalities: tuple[Modality, ...] = ("video", "audio"),
    dataset: str = "folder",
    split: str = "train",
) -> SourceList:
    """List a tree of files without labels, or what a list names.

    A list is a file ending in ``.csv`` or ``.jsonl``, with ``url`` and optionally ``label``, ``start`` and ``end`` in
    seconds, and ``id``. In CSV several labels are separated by ``;``; in JSONL ``label`` is a string or a list of
    strings. Paths are relative to the list's folder. Other fields do not matter, and are noted.

    Args:
        source: path or URL of a folder or of a list.
        options: of the object store.
        modalities: what to convert of each file.
        dataset: its name.
        split: what this part of it is called.

    Raises:
        PreprocessError: the folder or list does not exist, is empty, or is no such list.
        StorageError: the object store cannot be read.
    """
    text = os.fspath(source)
    path = Path(text.removeprefix("file://")).expanduser()
    local = not is_remote(text)
    if not text.lower().endswith(_LISTS) or (local and path.is_dir()):
        if local and path.is_file():
            raise PreprocessError(f"{printable(text)}: expected a folder, or a list that ends in .csv or .jsonl")
        tree = list_tree(source, options)
        sources = tuple(Source(name, location, stem(name)) for name, location in tree.files.items())
        return SourceList(dataset, split, (), sources, modalities)
    where = printable(text)
    content = read_text(text, options)
    parse = parse_csv if text.lower().endswith(".csv") else parse_jsonl
    entries, bad, notes = parse(content, where)
    check_some_rows(len(entries), bad, where, "url and optionally label, start, end, id")
    base = str(path.absolute()) if local else text
    listed, more = _sources(entries, base.rpartition("/")[0])
    rejected = [bad_row_source(row, where.rsplit("/", 1)[-1]) for row in bad]
    classes = tuple(sorted({label for item in listed for label in item.labels}))
    return SourceList(dataset, split, classes, check_unique(listed + rejected), modalities, notes=tuple(notes + more))


def parse_csv(text: str, where: str) -> tuple[list[Entry], list[BadRow], list[str]]:
    """The entries of a CSV list, the rows that are none, and notes.

    Raises:
        PreprocessError: it is empty, has no column ``url``, or cannot be parsed.
    """
    table = parse_table(text, where, ("url",))
    entries: list[Entry] = []
    bad = list(table.bad)
    for row in table.rows:
        try:
            entries.append(
                Entry(
                    row.line,
                    _checked_url(row.fields["url"]),
                    _distinct(row.text("label").split(";")),
                    _csv_segment(row.text("start"), row.text("end")),
                    row.text("id") or None,
                )
            )
        except RowError as error:
            bad.append(BadRow(row.line, str(error)))
    return entries, bad, _unknown(table.columns, "column")


def parse_jsonl(text: str, where: str) -> tuple[list[Entry], list[BadRow], list[str]]:
    """The entries of a JSONL list, the lines that are none, and notes.

    Raises:
        PreprocessError: it is empty.
    """
    entries: list[Entry] = []
    bad: list[BadRow] = []
    fields: dict[str, None] = {}
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            values = _parse_object(line)
            entries.append(
                Entry(
                    number,
                    _checked_url(_text(values, "url")),
                    _json_labels(values.get("label")),
                    _json_segment(values.get("start"), values.get("end")),
                    _text(values, "id").strip() or None,
                )
            )
            fields.update(dict.fromkeys(values))
        except RowError as error:
            bad.append(BadRow(number, str(error)))
    if not entries and not bad:
        raise PreprocessError(f"{where}: is empty; expected one JSON object with a url on each line")
    return entries, bad, _unknown(tuple(fields), "field")


def _parse_object(line: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
        line.encode()
        json.dumps(values, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise RowError(f"is no JSON: {str(error)[:100]}") from error
    if not isinstance(values, dict):
        raise RowError(f"expected a JSON object, found {type(values).__name__}")
    return values


def _text(values: Mapping[str, Any], field: str) -> str:
    value = values.get(field)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RowError(f"{field}: expected a string, found {type(value).__name__}")
    return value


def _json_labels(value: Any) -> tuple[str, ...]:
    labels = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise RowError("label: expected a string or a list of strings")
    return _distinct(labels)


def _json_segment(start: Any, end: Any) -> Segment | None:
    if start is None and end is None:
        return None
    for field, value in (("start", start), ("end", end)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MAX_SECONDS:
            raise RowError(f"{field}: expected seconds such as 12.5 in both start and end, found {str(value)[:40]}")
    first, last = round(float(start), 6), round(float(end), 6)
    check_interval(first, last, ("start", "end"))
    return Segment(first, last)


def _csv_segment(start: str, end: str) -> Segment | None:
    if not start and not end:
        return None
    first, last = parse_interval(start, end, ("start", "end"))
    first, last = round(first, 6), round(last, 6)
    check_interval(first, last, ("start", "end"))
    return Segment(first, last)


def _checked_url(url: str) -> str:
    if not url.strip():
        raise RowError("url: is empty")
    if "\0" in url:
        raise RowError("url: has a NUL character")
    return url


def _distinct(labels: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(label.strip() for label in labels if label.strip()))


def _unknown(found: Sequence[str], kind: str) -> list[str]:
    unknown = [name for name in found if name not in _FIELDS]
    if not unknown:
        return []
    return [f"{count(len(unknown), kind)} ignored: {some(unknown)}; those known are {', '.join(_FIELDS)}."]


def _sources(entries: Sequence[Entry], base: str) -> tuple[list[Source], list[str]]:
    """Sources for entries, equal ones merged, contradicting ones rejected; and notes."""
    found: dict[str, tuple[Entry, Source]] = {}
    repeated = 0
    for entry, source in ((entry, _source(entry, base)) for entry in entries):
        first, kept = found.setdefault(source.name, (entry, source))
        if first is entry:
            continue
        if (set(first.labels), kept.id) == (set(entry.labels), source.id):
            repeated += 1
            continue
        detail = f"lines {first.line} and {entry.line} differ in label or id; keep the right one"
        found[source.name] = (
            first,
            Source(source.name, None, kept.id, segment=kept.segment, rejection=("bad_annotation", detail)),
        )
    notes = [f"{count(repeated, 'row')} left out, for equal rows stand before them."] if repeated else []
    return [source for _, source in found.values()], notes


def _source(entry: Entry, base: str) -> Source:
    rejection: tuple[Reason, str] | None = None
    location: Path | RemoteFile | None = None
    try:
        name, location = locate(entry.url, base)
        if isinstance(location, Path) and not _is_file(location):
            rejection = ("source_not_found", f"line {entry.line} names {printable(str(location))}, which is no file")
            location = None
    except RowError as error:
        name = entry.url
        rejection = ("bad_annotation", f"line {entry.line}: {error}")
    identifier = entry.id or stem(name)
    if entry.segment:
        name += f"#t={seconds(entry.segment.start)},{seconds(entry.segment.end)}"
    return Source(name, location, identifier, entry.labels, entry.segment, rejection=rejection)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        return False


def locate(url: str, base: str) -> tuple[str, Path | RemoteFile]:
    """A list's path or URL as a source's name and the place where the file is.

    Args:
        url: as written.
        base: path or URL of the list's folder.

    Raises:
        RowError: it is no path below the list's bucket or host, or no URL that can be read.
    """
    if is_remote(url):
        return url, _remote(url)
    text = url.removeprefix("file://")
    if is_remote(base) and not text.startswith("/"):
        name = posixpath.normpath(text)
        root = _remote(f"{base}/list")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(root.path), text))
        if path.startswith("../") or path in ("..", "."):
            raise RowError(f"url: {url[:80]!r} leads out of {root.root}")
        return name, RemoteFile(root.root, path)
    return posixpath.normpath(text), Path(base or "/") / text


def _remote(url: str) -> RemoteFile:
    scheme = url.split("://", 1)[0].lower()
    if scheme not in _SCHEMES:
        raise RowError(f"url: {scheme}:// is not supported; expected a path or one of {', '.join(_SCHEMES)}")
    try:
        return RemoteFile(*split_url(url))
    except (StorageError, ValueError) as error:
        raise RowError(f"url: {error}") from error
