"""``report.html``: an evaluation as one page that needs nothing else, to read, print and send on."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from avid_pipeline.evaluate.report_classes import MOST_NAMED, classes_html
from avid_pipeline.evaluate.report_curves import curves_picture
from avid_pipeline.evaluate.report_pictures import confusion_picture, png_data_url
from avid_pipeline.evaluate.report_style import style_sheet
from avid_pipeline.evaluate.results import (
    REPORT_NAME,
    RESULTS_NAME,
    CheckpointIdentity,
    DataIdentity,
    Results,
    Table,
    column_names,
    format_value,
)
from avid_pipeline.shards_spec.storage import Storage
from avid_pipeline.streams.batches import IntArray

_COMMANDS = {
    "finetune": "Fine-tuning",
    "linear": "Linear classification",
    "knn": "Nearest neighbours",
    "retrieval": "Cross-modal retrieval",
}
_KINDS = {
    "ours": "Checkpoint of avid-pipeline",
    "published": "Published AVID-CMA checkpoint",
    "weights": "Weights alone",
    "random": "Random weights, which have learned nothing",
}
# The page may show itself and nothing else, whatever a class is called.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@dataclass(frozen=True)
class Confusion:
    """Which classes were taken for which.

    Attributes:
        title: what it belongs to, for example a fold.
        classes: C class names.
        counts: test samples, int64 [C, C]: rows the true class, columns the predicted one.

    Raises:
        ValueError: the counts do not match the classes, or one is negative.
    """

    title: str
    classes: tuple[str, ...]
    counts: IntArray

    def __post_init__(self) -> None:
        size = len(self.classes)
        if not size or self.counts.shape != (size, size) or not np.issubdtype(self.counts.dtype, np.integer):
            raise ValueError(
                f"confusion {self.title!r}: expected at least one class and whole numbers of shape {(size, size)}, "
                f"found {self.counts.dtype} of shape {self.counts.shape}"
            )
        if self.counts.min() < 0:
            raise ValueError(f"confusion {self.title!r}: expected counts of at least 0, found {self.counts.min()}")


@dataclass(frozen=True)
class Curves:
    """Lines in one picture: name to ``(x, y)`` points; points that are not finite leave gaps."""

    title: str
    x_label: str
    y_label: str
    lines: dict[str, list[tuple[float, float]]]


@dataclass(frozen=True)
class Picture:
    """A finished picture, as the bytes of a PNG file."""

    title: str
    png: bytes
    caption: str = ""


@dataclass(frozen=True)
class Report:
    """An evaluation's results, and what a page shows beside their tables."""

    results: Results
    confusions: tuple[Confusion, ...] = ()
    curves: tuple[Curves, ...] = ()
    pictures: tuple[Picture, ...] = ()


def write_report(root: Storage, report: Report) -> None:
    """Write ``report.html``, then ``results.json``, whose presence says that both are complete.

    Raises:
        StorageError: the root cannot be written.
    """
    root.write(REPORT_NAME, render_report(report).encode())
    root.write(RESULTS_NAME, report.results.to_json())


def render_report(report: Report) -> str:
    """The page as HTML; it fetches nothing and runs nothing."""
    results = report.results
    title = _title(results)
    sections = [
        *(_table_section(table) for table in results.tables),
        *(_confusion_section(confusion) for confusion in report.confusions),
        *(
            _section(curves.title, f"<figure>{curves_picture(curves.x_label, curves.y_label, curves.lines)}</figure>")
            for curves in report.curves
        ),
        *(_picture_section(picture) for picture in report.pictures),
        _section("Checkpoint", _definitions(_checkpoint_facts(results.checkpoint))),
        _section("Data", "\n".join(_definitions(_data_facts(data)) for data in results.data)),
        _section("Settings", _tree(results.settings) if results.settings else "<p>None.</p>"),
        _section("Versions", _definitions(results.versions)),
    ]
    body = "\n".join(sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>
{style_sheet()}</style>
</head>
<body>
<main>
{_headline(results, title)}
{body}
</main>
</body>
</html>
"""


def _title(results: Results) -> str:
    command = _COMMANDS.get(results.command, results.command)
    names = list(dict.fromkeys(data.dataset for data in results.data))
    return f"{command} on {' and '.join(names)}" if names else command


def _headline(results: Results, title: str) -> str:
    checkpoint = results.checkpoint
    step = f", step {checkpoint.step:,}" if checkpoint.step is not None else ""
    data = "\n".join(f"<li>{_data_line(entry)}</li>" for entry in results.data)
    warning = ""
    if results.undecodable:
        count = results.undecodable
        found = "instances cannot be decoded and are" if count > 1 else "instance cannot be decoded and is"
        warning = f'\n<p class="warning">{count:,} {found} left out.</p>'
    return (
        f'<header>\n<h1>{escape(title)}</h1>\n<p><span class="muted">{_KINDS[checkpoint.kind]}{step}:</span> '
        f"<code>{escape(checkpoint.path)}</code></p>\n<ul>\n{data}\n</ul>{warning}\n</header>"
    )


def _data_line(data: DataIdentity) -> str:
    subset = f", subset {escape(data.subset)}" if data.subset is not None else ""
    return (
        f'<span class="muted">{escape(data.role.capitalize())}:</span> {escape(data.dataset)} {escape(data.split)}'
        f"{subset}, {data.instances:,} instance{'s' if data.instances != 1 else ''}"
    )


def _section(title: str, content: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{content}\n</section>"


def _table_section(table: Table) -> str:
    columns = column_names(table)
    heads = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    rows = "\n".join(
        f'<tr><th scope="row"><span class="name">{escape(name)}</span></th>'
        + "".join(f"<td>{format_value(column, values.get(column))}</td>" for column in columns)
        + "</tr>"
        for name, values in table.rows.items()
    )
    note = f'\n<p class="note">{escape(table.note)}</p>' if table.note else ""
    return _section(
        table.title,
        f'<div class="scroll"><table class="figures"><thead><tr><td></td>{heads}</tr></thead>\n'
        f"<tbody>\n{rows}\n</tbody></table></div>{note}",
    )


def _confusion_section(confusion: Confusion) -> str:
    size = len(confusion.classes)
    told = "Each row is one true class; a cell is the share of its samples that were given the column's class."
    if size > MOST_NAMED:
        told += " The table of all classes has their numbers."
    if (confusion.counts.sum(1) == 0).any():
        told += " The rows of classes without a test sample are empty."
    picture = confusion_picture(confusion.classes, confusion.counts)
    return _section(
        confusion.title,
        f"{classes_html(confusion.classes, confusion.counts)}\n<h3>Confusion matrix</h3>\n"
        f'<figure><div class="scroll">{picture}</div><figcaption>{told}</figcaption></figure>',
    )


def _picture_section(picture: Picture) -> str:
    caption = f"<figcaption>{escape(picture.caption)}</figcaption>" if picture.caption else ""
    image = f'<img src="{png_data_url(picture.png)}" alt="{escape(picture.title)}">'
    return _section(picture.title, f"<figure>{image}{caption}</figure>")


def _checkpoint_facts(checkpoint: CheckpointIdentity) -> dict[str, str]:
    return {
        "kind": _KINDS[checkpoint.kind],
        "path": checkpoint.path,
        "sha256": checkpoint.sha256 or "-",
        "step": f"{checkpoint.step:,}" if checkpoint.step is not None else "-",
    }


def _data_facts(data: DataIdentity) -> dict[str, str]:
    return {
        "role": data.role,
        "data set": f"{data.dataset} {data.split}",
        "subset": data.subset if data.subset is not None else "-",
        "instances": f"{data.instances:,}",
        "root": data.url,
        "fingerprint": data.fingerprint,
    }


def _definitions(facts: Mapping[str, str]) -> str:
    entries = "\n".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    return f"<dl>\n{entries}\n</dl>"


def _tree(value: Mapping[str, Any]) -> str:
    """Nested settings as nested lists."""
    items = []
    for name, inner in value.items():
        shown = _tree(inner) if isinstance(inner, dict) and inner else escape(_plain(inner))
        items.append(f"<li><b>{escape(str(name))}:</b> {shown}</li>")
    return f'<ul class="settings">\n{"".join(items)}\n</ul>'


def _plain(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple) and not any(isinstance(item, dict | list | tuple) for item in value):
        return ", ".join(_plain(item) for item in value) or "-"
    return json.dumps(value, ensure_ascii=False, default=str)
