"""What an evaluation found: ``results.json``, and its tables on the terminal."""

import importlib.metadata
import json
import math
import platform
import re
from typing import Any, Literal

from pydantic import ConfigDict, ValidationError
from tabulate import tabulate

from avid_pipeline import __version__
from avid_pipeline.errors import AvidPipelineError
from avid_pipeline.shards_spec.manifest import Record, describe_validation_error
from avid_pipeline.shards_spec.storage import Storage

RESULTS_NAME = "results.json"
REPORT_NAME = "report.html"

Rows = dict[str, dict[str, float | None]]

_FORMAT_VERSION: Literal[1] = 1
# Beyond this, figures would be wider than a line.
_LARGEST = 1e12
_NUMBER_COLUMN = re.compile(r"\b(rank|loss|seconds|instances)$")


class ResultsError(AvidPipelineError):
    """``results.json`` is missing, damaged or of another version."""


class CheckpointIdentity(Record):
    """Which model was evaluated.

    Attributes:
        path: path or URL of the checkpoint; what random weights are of.
        sha256: of its weights file, in hexadecimal; None where there is no file.
        kind: a checkpoint of this package, a published one, a file of weights alone, or random weights.
        step: of training; None where it is not known.
    """

    path: str
    sha256: str | None
    kind: Literal["ours", "published", "weights", "random"]
    step: int | None

    @property
    def key(self) -> str:
        """The same for the same weights, wherever they lie."""
        return self.sha256 or self.path


class DataIdentity(Record):
    """Which data a model was evaluated on.

    Attributes:
        role: what the data served for: ``data``, ``queries``, ``gallery``, ``train`` or ``test``.
        url: root of the data set.
        dataset: its name.
        split: its split, for example ``train``.
        fingerprint: of its manifest.
        subset: name of the subset that was used; None for all of it.
        instances: how many were used.
    """

    role: str
    url: str
    dataset: str
    split: str
    fingerprint: str
    subset: str | None
    instances: int


class Table(Record):
    """Figures with a title.

    Attributes:
        title: what the table shows.
        rows: row name to column name to value. A column whose name ends in the word ``rank``, ``loss``, ``seconds``
            or ``instances`` holds plain numbers; every other one holds shares of 1, shown in per cent. None and
            missing values are shown as ``-``.
        note: what a reader must know; empty for nothing.
    """

    # JSON has no numbers for these, and a missing value is something else.
    model_config = ConfigDict(ser_json_inf_nan="strings")

    title: str
    rows: Rows
    note: str = ""


class Results(Record):
    """``results.json``: what was evaluated on what, how, and what was found.

    Numbers that are not finite are written as the strings ``NaN``, ``Infinity`` and ``-Infinity``, for JSON has none.

    Attributes:
        format_version: of this file, 1.
        command: of ``avid-evaluate``: ``finetune``, ``linear``, ``knn`` or ``retrieval``.
        checkpoint: the model.
        data: the data, each with its role.
        settings: of the evaluation, as plain data.
        versions: of what computed it; see :func:`versions`.
        undecodable: how many instances were left out because they cannot be decoded.
        tables: the figures, the most important first.
    """

    model_config = ConfigDict(ser_json_inf_nan="strings")

    format_version: Literal[1] = _FORMAT_VERSION
    command: str
    checkpoint: CheckpointIdentity
    data: tuple[DataIdentity, ...]
    settings: dict[str, Any]
    versions: dict[str, str]
    undecodable: int = 0
    tables: tuple[Table, ...]

    def to_json(self) -> bytes:
        """UTF-8 JSON."""
        return (self.model_dump_json(indent=1) + "\n").encode()


def versions() -> dict[str, str]:
    """Versions of avid-pipeline, torch and Python."""
    return {
        "avid-pipeline": __version__,
        "torch": importlib.metadata.version("torch"),
        "python": platform.python_version(),
    }


def column_names(table: Table) -> list[str]:
    """Columns of a table in the order in which its rows first name them."""
    return list(dict.fromkeys(column for row in table.rows.values() for column in row))


def format_value(column: str, value: float | None) -> str:
    """A value of a table as text.

    Args:
        column: its column, whose name says whether it is a plain number or a share of 1; see :class:`Table`.
        value: what to show.

    Returns:
        For example ``29.0 %``, ``12.5`` or ``1,784,108``; ``-`` for None.
    """
    if value is None:
        return "-"
    if not math.isfinite(value) or abs(value) >= _LARGEST:
        return f"{value:g}"
    if not _NUMBER_COLUMN.search(column.lower()):
        return f"{100 * value:.1f} %"
    if float(value).is_integer():
        return f"{value:,.0f}"
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.1f}"


def terminal_table(table: Table) -> str:
    """A table for the terminal: its title, its rows in aligned columns, and its note if it has one."""
    columns = column_names(table)
    rows = [
        [name, *(format_value(column, values.get(column)) for column in columns)] for name, values in table.rows.items()
    ]
    grid = tabulate(rows, headers=["", *columns], stralign="right", disable_numparse=True)
    return "\n".join(part for part in (table.title, grid, table.note) if part)


def read_results(storage: Storage, name: str = RESULTS_NAME) -> Results:
    """Read and check the results below a root.

    Raises:
        StorageError: the root cannot be read.
        ResultsError: there are none, or they are not JSON, of another version, or damaged; the message names the field.
    """
    where = storage.url_of(name)
    if not storage.exists(name):
        raise ResultsError(f"{where}: does not exist, so this is no finished evaluation; run avid-evaluate (again)")
    try:
        content = json.loads(storage.read(name))
    except ValueError as error:
        raise ResultsError(f"{where}: is not JSON: {error}; run avid-evaluate again") from error
    if not isinstance(content, dict):
        raise ResultsError(f"{where}: expected a JSON object, found {type(content).__name__}; run avid-evaluate again")
    version = content.get("format_version")
    if version != _FORMAT_VERSION:
        raise ResultsError(
            f"{where}: format_version: expected {_FORMAT_VERSION}, found {version!r}; "
            "run avid-evaluate again or use the avid-pipeline release that wrote it"
        )
    try:
        return Results.model_validate(content)
    except ValidationError as error:
        problems = describe_validation_error(error)
        raise ResultsError(f"{where}: {problems}; run avid-evaluate again") from error
