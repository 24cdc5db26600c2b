"""Accuracy of each class, and which classes are taken for which: numbers from a confusion matrix, and their HTML."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from avid_pipeline.streams.batches import IntArray

MOST_NAMED = 60

_MOST_OPEN = 30
_ENDS = 5
_MOST_CONFUSIONS = 10


@dataclass(frozen=True)
class ClassAccuracy:
    """How well one class is recognised.

    Attributes:
        label: its place in the list of classes.
        name: of the class.
        correct: its samples that were recognised.
        samples: all its test samples.
        taken_for: the wrong class that most of its samples were taken for; None without a mistake.
        times: how many were taken for that.
    """

    label: int
    name: str
    correct: int
    samples: int
    taken_for: str | None
    times: int

    @property
    def accuracy(self) -> float | None:
        """Share of its samples that were recognised; None without samples."""
        return self.correct / self.samples if self.samples else None


@dataclass(frozen=True)
class FrequentConfusion:
    """Samples of one class that were taken for another: how many, of how many."""

    true: str
    predicted: str
    times: int
    samples: int


def class_accuracies(classes: Sequence[str], counts: IntArray) -> list[ClassAccuracy]:
    """Accuracy of every class, the best first, those without a test sample last.

    Args:
        classes: C names.
        counts: int64 [C, C], rows the true class, columns the predicted one.
    """
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    found = []
    for label, name in enumerate(classes):
        other = int(wrong[label].argmax())
        times = int(wrong[label, other])
        correct, samples = int(counts[label, label]), int(counts[label].sum())
        found.append(ClassAccuracy(label, name, correct, samples, classes[other] if times else None, times))
    return sorted(found, key=lambda entry: (entry.accuracy is None, -(entry.accuracy or 0), -entry.samples))


def frequent_confusions(
    classes: Sequence[str], counts: IntArray, most: int = _MOST_CONFUSIONS
) -> list[FrequentConfusion]:
    """The pairs of classes that are confused most often, the most frequent first.

    Args:
        classes: C names.
        counts: int64 [C, C], rows the true class, columns the predicted one.
        most: how many pairs at most.
    """
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    samples = counts.sum(1)
    order = np.argsort(-wrong, axis=None, kind="stable")[:most]
    pairs = [divmod(int(place), len(classes)) for place in order]
    return [
        FrequentConfusion(classes[true], classes[predicted], int(wrong[true, predicted]), int(samples[true]))
        for true, predicted in pairs
        if wrong[true, predicted]
    ]


def classes_html(classes: Sequence[str], counts: IntArray) -> str:
    """Accuracy of each class and the most frequent confusions, as HTML.

    Args:
        classes: C names.
        counts: int64 [C, C], rows the true class, columns the predicted one.
    """
    ordered = class_accuracies(classes, counts)
    table = _class_table(ordered, numbered=len(classes) > MOST_NAMED)
    parts = [_summary(ordered)]
    if len(ordered) <= _MOST_OPEN:
        parts += ["<h3>Accuracy of each class</h3>", table]
    else:
        summary = f"<summary>Accuracy of all {len(ordered):,} classes</summary>"
        parts += [_ends(ordered), f"<details>{summary}\n{table}\n</details>"]
    parts += ["<h3>Most frequent confusions</h3>", _confusion_list(frequent_confusions(classes, counts))]
    return "\n".join(parts)


def _ends(ordered: Sequence[ClassAccuracy]) -> str:
    """The best and the worst classes side by side."""
    tested = [entry for entry in ordered if entry.samples]
    if not tested:
        return ""
    columns = (("Easiest classes", tested[:_ENDS]), ("Hardest classes", tested[: -_ENDS - 1 : -1]))
    content = "\n".join(f"<div><h3>{title}</h3>\n{_class_table(shown, short=True)}</div>" for title, shown in columns)
    return f'<div class="pair">\n{content}\n</div>'


def _summary(ordered: Sequence[ClassAccuracy]) -> str:
    accuracies = [entry.accuracy for entry in ordered if entry.accuracy is not None]
    if not accuracies:
        return "<p>No class has a test sample.</p>"
    samples = sum(entry.samples for entry in ordered)
    correct = sum(entry.correct for entry in ordered)
    text = (
        f"{correct:,} of {samples:,} samples are recognised ({correct / samples:.1%}); "
        f"the mean accuracy of the classes is {np.mean(accuracies):.1%}."
    )
    missing = len(ordered) - len(accuracies)
    if missing:
        text += f" {_classes_have(missing)} no test sample."
    never = accuracies.count(0.0)
    if never:
        text += f" No sample of {never:,} class{'es' if never > 1 else ''} is recognised."
    return f"<p>{text.replace('%', '&nbsp;%')}</p>"


def _classes_have(count: int) -> str:
    return f"{count:,} classes have" if count > 1 else "1 class has"


def _class_table(entries: Sequence[ClassAccuracy], *, numbered: bool = False, short: bool = False) -> str:
    heads = ['<th scope="col" class="left">class</th>']
    if numbered:
        heads.append('<th scope="col">number</th>')
    heads += ["<td></td>", '<th scope="col">accuracy</th>', '<th scope="col">correct</th>']
    if not short:
        heads.append('<th scope="col" class="left taken">most often taken for</th>')
    rows = "\n".join(_class_row(entry, numbered, short) for entry in entries)
    return f'<table class="classes"><thead><tr>{"".join(heads)}</tr></thead>\n<tbody>\n{rows}\n</tbody></table>'


def _class_row(entry: ClassAccuracy, numbered: bool, short: bool) -> str:
    cells = [f'<th scope="row"><span class="name">{escape(entry.name)}</span></th>']
    if numbered:
        cells.append(f"<td>{entry.label}</td>")
    if entry.accuracy is None:
        cells += ['<td class="bar"></td>', "<td>-</td>", "<td>-</td>"]
    else:
        bar = f'<span class="track"><i style="width:{100 * entry.accuracy:.1f}%"></i></span>'
        cells += [
            f'<td class="bar">{bar}</td>',
            f"<td>{100 * entry.accuracy:.1f} %</td>",
            f"<td>{entry.correct:,} of {entry.samples:,}</td>",
        ]
    if not short:
        taken = f'<span class="name">{escape(entry.taken_for or "")}</span> ({entry.times:,})' if entry.times else ""
        cells.append(f'<td class="taken">{taken}</td>')
    return f"<tr>{''.join(cells)}</tr>"


def _confusion_list(confusions: Sequence[FrequentConfusion]) -> str:
    if not confusions:
        return "<p>No sample is taken for another class.</p>"
    items = "\n".join(
        f'<li><span><span class="name">{escape(entry.true)}</span> <span class="muted">taken for</span> '
        f'<span class="name">{escape(entry.predicted)}</span></span>'
        f"<span>{entry.times:,} of {entry.samples:,} ({100 * entry.times / entry.samples:.1f} %)</span></li>"
        for entry in confusions
    )
    return f'<ol class="confusions">\n{items}\n</ol>'
