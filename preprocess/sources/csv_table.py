"""CSV text as rows: one bad row is reported as such, a bad file is an error."""

import csv
import io
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from avid_pipeline.preprocess.errors import PreprocessError
from avid_pipeline.preprocess.sources.base import Source

MAX_SECONDS = 1e6
_NUMBER = re.compile(r"[0-9]+(\.[0-9]*)?|\.[0-9]+")


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used.

    Attributes:
        line: the file's line on which it begins, from 1.
        problem: what is wrong with it.
    """

    line: int
    problem: str


@dataclass(frozen=True)
class Row:
    """A row of a table: ``fields`` is column name to text, exactly as it is there."""

    line: int
    fields: dict[str, str]

    def text(self, column: str) -> str:
        """A column's text without the spaces around it; empty where there is no such column."""
        return self.fields.get(column, "").strip()


class RowError(Exception):
    """A value of one row is not what was expected; the text says what was. It never leaves this package."""


@dataclass(frozen=True)
class Table:
    """A table with a header.

    Attributes:
        columns: their names.
        rows: those that have as many fields as the header.
        bad: the others.
    """

    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    bad: tuple[BadRow, ...]


def parse_table(text: str, where: str, required: Sequence[str]) -> Table:
    """Parse a CSV whose first row names the columns.

    Args:
        text: the CSV.
        where: the file, for messages.
        required: columns that must be there.

    Raises:
        PreprocessError: it is empty, lacks a column, has a column twice, or a quote is never closed.
    """
    rows: list[Row] = []
    bad: list[BadRow] = []
    columns: tuple[str, ...] = ()
    for found in parse_rows(text, where):
        if not columns:
            columns = _header(found, where, required)
        elif isinstance(found, BadRow):
            bad.append(found)
        elif len(found[1]) != len(columns):
            bad.append(BadRow(found[0], f"expected {len(columns)} fields, found {len(found[1])}"))
        else:
            rows.append(Row(found[0], dict(zip(columns, found[1], strict=True))))
    if not rows and not bad:
        problem = "holds a header and no row" if columns else "is empty"
        raise PreprocessError(f"{where}: {problem}; expected a CSV with the columns {', '.join(required)}")
    return Table(columns, tuple(rows), tuple(bad))


def _header(found: tuple[int, list[str]] | BadRow, where: str, required: Sequence[str]) -> tuple[str, ...]:
    if isinstance(found, BadRow):
        raise PreprocessError(f"{where}: line {found.line}: {found.problem}; expected a header")
    columns = tuple(name.strip() for name in found[1])
    for name in required:
        if name not in columns:
            shown = ", ".join(columns)[:200]
            raise PreprocessError(
                f"{where}: has no column {name!r}; expected the columns {', '.join(required)} in the first row, "
                f"found {shown}"
            )
    repeated = sorted({name for name in columns if name and columns.count(name) > 1})
    if repeated:
        raise PreprocessError(f"{where}: the column {repeated[0]!r} is there twice; remove one")
    return columns


def parse_rows(
    text: str, where: str, *, comments: bool = False, spaces: bool = False
) -> Iterator[tuple[int, list[str]] | BadRow]:
    """Rows of a CSV as line number and fields; empty lines, and rows of empty fields, are passed over.

    Args:
        text: the CSV.
        where: the file, for messages.
        comments: whether lines beginning with ``#`` are comments.
        spaces: whether spaces after a comma do not count, also before a quote.

    Raises:
        PreprocessError: a quote is never closed, so that the rest of the file would be one field.
    """
    stream = io.StringIO(text, newline="")
    lines: Iterable[str] = ("\n" if line.startswith("#") else line for line in stream) if comments else stream
    reader = csv.reader(lines, strict=True, skipinitialspace=spaces)
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "unexpected end of data" in str(error):
                raise PreprocessError(f"{where}: line {line}: a quote is opened and never closed; close it") from error
            yield BadRow(line, f"is no CSV: {error}")
            continue
        if any(field.strip() for field in fields):
            yield line, fields


def parse_seconds(text: str, field: str) -> float:
    """A time in seconds, from 0 to a million, as plain decimal digits.

    Raises:
        RowError: it is none.
    """
    value = float(text) if _NUMBER.fullmatch(text) else math.nan
    if not value <= MAX_SECONDS:
        raise RowError(f"{field}: expected seconds such as 12.5, found {text[:40]!r}")
    return value


def parse_interval(start: str, end: str, fields: tuple[str, str]) -> tuple[float, float]:
    """Start and end in seconds.

    Raises:
        RowError: one is no time, or the end is not after the start.
    """
    first, last = parse_seconds(start, fields[0]), parse_seconds(end, fields[1])
    check_interval(first, last, fields)
    return first, last


def check_interval(first: float, last: float, fields: tuple[str, str]) -> None:
    """Refuse an interval that is not one.

    Raises:
        RowError: the end is not after the start.
    """
    if last <= first:
        raise RowError(f"{fields[1]}: expected more than {fields[0]} ({seconds(first)}), found {seconds(last)}")


def seconds(value: float) -> str:
    """Seconds as text, to the microsecond, without needless zeros."""
    return f"{value:.6f}".rstrip("0").rstrip(".")


def bad_row_source(row: BadRow, file: str) -> Source:
    """What stands in the listing, and then in the quarantine, for a row that cannot be used."""
    name = f"line {row.line} of {file}"
    return Source(name, None, name, key_name=f"line-{row.line}", rejection=("bad_annotation", row.problem))


def check_some_rows(good: int, bad: Sequence[BadRow], where: str, expected: str) -> None:
    """Refuse a file of which no row can be used: it is most likely another file.

    Raises:
        PreprocessError: there is no good row.
    """
    if not good and bad:
        raise PreprocessError(
            f"{where}: not one of {len(bad)} rows can be used; line {bad[0].line}: {bad[0].problem}; "
            f"expected {expected}"
        )


def some(names: Sequence[str]) -> str:
    """The first of some names, for a message."""
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3:,} more" if len(names) > 3 else shown


def count(number: int, thing: str) -> str:
    """``1 file``, ``2 files``."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
