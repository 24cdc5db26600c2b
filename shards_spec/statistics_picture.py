"""The statistics of a data set as a picture."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from avid_pipeline.shards_spec.preview import check_picture_format, save_picture
from avid_pipeline.shards_spec.statistics import DatasetStatistics, in_hours

_BARS = 40
_MOST_NAMED = 30
_RESOLUTIONS = 10
_FEWEST_ROWS = 4
_COLOURS = ("#3b528b", "#b5367a", "#2a9d8f", "#e07a3f")
_WIDE_RANGE = 50


def draw_statistics(statistics: DatasetStatistics, title: str, out: Path) -> None:
    """Draw histograms of durations and bytes, samples by class, and original resolutions.

    Args:
        statistics: what to draw.
        title: of the picture.
        out: the picture to write; its ending decides the format.

    Raises:
        StorageError: the picture cannot be written there or in that format.
    """
    check_picture_format(out)
    figure = Figure(figsize=(13, 8.6), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=13, parse_math=False)
    axes = figure.subplots(2, 2)
    durations = np.asarray(statistics.durations)
    _histogram(axes[0][0], durations, "duration in s", "s", f"Durations: {in_hours(durations.sum())}", _COLOURS[0])
    sizes = statistics.sample_bytes() / 1e3
    _histogram(axes[0][1], sizes, "kB a sample", "kB", f"Sizes: {sizes.sum() / 1e3:,.1f} MB", _COLOURS[1])
    _draw_classes(axes[1][0], statistics)
    _draw_resolutions(axes[1][1], statistics)
    save_picture(figure, out)


def _histogram(axes: Axes, values: npt.NDArray[np.float64], label: str, unit: str, title: str, colour: str) -> None:
    least, most = float(values.min()), float(values.max())
    if most - least < 1e-6 * max(abs(most), 1):
        # All alike: one bar, with room beside it.
        edges = np.linspace(least * 0.9, most * 1.1 or 1.0, 10)
    elif least > 0 and most / least > _WIDE_RANGE:
        edges = np.geomspace(least, most, _BARS + 1)
        axes.set_xscale("log")
    else:
        edges = np.linspace(least, most, _BARS + 1)
    axes.hist(values, bins=edges.tolist(), color=colour, edgecolor="white", linewidth=0.3)
    median = float(np.median(values))
    axes.axvline(median, color="black", linewidth=1, linestyle="--", label=f"median {median:,.4g} {unit}")
    axes.legend(frameon=False, fontsize=9)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    _label(axes, title, label, "samples")


def _draw_classes(axes: Axes, statistics: DatasetStatistics) -> None:
    counts = statistics.class_counts()
    if not counts.size:
        axes.text(0.5, 0.5, "no classes", ha="center", va="center", color="grey", transform=axes.transAxes)
        axes.axis("off")
        return
    order = np.argsort(-counts, kind="stable")
    axes.bar(np.arange(len(counts)), counts[order], width=1.0 if len(counts) > _MOST_NAMED else 0.8, color=_COLOURS[2])
    axes.set_xlim(-0.6, len(counts) - 0.4)
    present = counts[counts > 0]
    logarithmic = bool(present.size) and present.max() > _WIDE_RANGE * np.median(present)
    if logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.set_ylim(bottom=0.5)
    y_label = "samples, logarithmic" if logarithmic else "samples"
    empty = int((counts == 0).sum())
    title = f"Samples by class: {len(counts):,} classes, {empty:,} without a sample"
    if len(counts) <= _MOST_NAMED:
        names = [statistics.class_names[label] for label in order]
        shortened = [name if len(name) <= 18 else name[:17] + "…" for name in names]
        axes.set_xticks(range(len(names)), shortened, rotation=40, ha="right", fontsize=8, parse_math=False)
        _label(axes, title, "", y_label)
    else:
        _label(axes, title, "classes, the most frequent first", y_label)
    if not logarithmic:
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))


def _draw_resolutions(axes: Axes, statistics: DatasetStatistics) -> None:
    named = {f"{size[0]}x{size[1]}" if size else "unknown": count for size, count in statistics.resolutions.items()}
    ordered = sorted(named.items(), key=lambda item: (-item[1], item[0]))
    shown, rest = ordered[:_RESOLUTIONS], ordered[_RESOLUTIONS:]
    if rest:
        shown.append((f"{len(rest):,} others", sum(count for _, count in rest)))
    counts = [count for _, count in shown]
    axes.barh(range(len(shown)), counts, height=0.75, color=_COLOURS[3])
    for place, count in enumerate(counts):
        axes.annotate(f"{count / statistics.count:.1%}", (count, place), xytext=(4, 0), textcoords="offset points",
                      va="center", fontsize=8)  # fmt: skip
    axes.set_xlim(0, max(counts) * 1.1)
    axes.set_ylim(max(len(shown), _FEWEST_ROWS) - 0.5, -0.6)
    kinds = len(statistics.resolutions)
    _label(axes, f"Original sizes: {kinds:,} kind{'s' if kinds > 1 else ''}", "samples", "")
    axes.set_yticks(range(len(shown)), [name for name, _ in shown])


def _label(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(x_label, fontsize=9)
    axes.set_ylabel(y_label, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
