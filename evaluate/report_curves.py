"""The report's curves, as inline SVG with a legend."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from matplotlib.ticker import MaxNLocator

from avid_pipeline.evaluate.report_style import NUM_LINE_COLOURS

Points = Sequence[tuple[float, float]]

_WIDTH, _HEIGHT = 760, 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 16, 12, 46
_MOST_WITH_POINTS = 40
# Beyond this the arithmetic of a picture overflows.
_LARGEST = 1e100
_DASHES = ("", "7 4", "2 3", "10 3 2 3")


@dataclass(frozen=True)
class _Axis:
    """Where an axis begins and ends, and its ticks, ``step`` apart."""

    least: float
    most: float
    step: float
    ticks: list[float]


def curves_picture(x_label: str, y_label: str, lines: Mapping[str, Points]) -> str:
    """Lines in one picture, with their legend, as HTML with inline SVG.

    A point that is not finite leaves a gap in its line; how many there are is told below the picture.

    Args:
        x_label: below the picture.
        y_label: beside it.
        lines: name to ``(x, y)`` points in the order in which they are joined.
    """
    shown = [point for points in lines.values() for point in points if _is_drawable(point)]
    missing = sum(len(points) for points in lines.values()) - len(shown)
    told = f"Points left out because they are not finite: {missing:,}." if missing else ""
    caption = f"<figcaption>{told}</figcaption>" if told else ""
    if not shown:
        return f'<p class="muted">No points to draw.</p>{caption}'
    x_axis = _axis([x for x, _ in shown], to_ticks=False)
    y_axis = _axis([y for _, y in shown], to_ticks=True)
    parts = [
        f'<svg class="curves" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(y_label)} against {escape(x_label)}">',
        _grid(x_axis, y_axis, x_label, y_label),
    ]
    for number, points in enumerate(lines.values()):
        parts.append(_line(number, points, x_axis, y_axis))
    parts.append("</svg>")
    return f'{_legend(lines)}\n<div class="scroll">{"".join(parts)}</div>{caption}'


def _is_drawable(point: tuple[float, float]) -> bool:
    return all(math.isfinite(value) and abs(value) < _LARGEST for value in point)


def _axis(values: Sequence[float], *, to_ticks: bool) -> _Axis:
    """An axis with round numbers.

    Args:
        values: what it must show.
        to_ticks: it reaches from tick to tick; without, from the least to the greatest value, and if all values are
            whole (steps, epochs), so are the ticks.
    """
    least, most = min(values), max(values)
    whole = not to_ticks and all(float(value).is_integer() for value in values)
    if most - least <= 1e-6 * max(abs(least), abs(most)):
        spread = max(abs(most) * 0.1, 1.0 if whole else 1e-12)
        least, most = least - spread, most + spread
    locator = MaxNLocator(nbins=6, steps=[1, 2, 5, 10], integer=whole)
    ticks = [float(tick) for tick in locator.tick_values(least, most)]
    step = ticks[1] - ticks[0]
    if to_ticks:
        return _Axis(ticks[0], ticks[-1], step, ticks)
    return _Axis(least, most, step, [tick for tick in ticks if least - 1e-9 * step <= tick <= most + 1e-9 * step])


def _tick_text(tick: float, step: float) -> str:
    if step < 1e-4 or abs(tick) >= 1e7:
        return f"{tick:.6g}"
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    # A rounded -0.0 would show its sign.
    return f"{round(tick, decimals) + 0.0:,.{decimals}f}"


def _place(point: tuple[float, float], x_axis: _Axis, y_axis: _Axis) -> tuple[float, float]:
    x = (point[0] - x_axis.least) / (x_axis.most - x_axis.least)
    y = (point[1] - y_axis.least) / (y_axis.most - y_axis.least)
    return _LEFT + x * (_WIDTH - _LEFT - _RIGHT), _HEIGHT - _BOTTOM - y * (_HEIGHT - _TOP - _BOTTOM)


def _grid(x_axis: _Axis, y_axis: _Axis, x_label: str, y_label: str) -> str:
    foot, middle = _HEIGHT - _BOTTOM, (_HEIGHT - _BOTTOM + _TOP) / 2
    parts = []
    for tick in y_axis.ticks:
        y = _place((x_axis.least, tick), x_axis, y_axis)[1]
        text = _tick_text(tick, y_axis.step)
        parts.append(f'<path class="edge" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 3.8:.1f}" text-anchor="end">{text}</text>')
    for tick in x_axis.ticks:
        x = _place((tick, y_axis.least), x_axis, y_axis)[0]
        text = _tick_text(tick, x_axis.step)
        parts.append(f'<path class="tick" d="M{x:.1f} {foot}v4"/>')
        parts.append(f'<text x="{x:.1f}" y="{foot + 17}" text-anchor="middle">{text}</text>')
    centre = (_LEFT + _WIDTH - _RIGHT) / 2
    parts += [
        f'<text class="title" x="{centre}" y="{_HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>',
        f'<text class="title" transform="translate(14 {middle}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>",
    ]
    return "".join(parts)


def _line(number: int, points: Points, x_axis: _Axis, y_axis: _Axis) -> str:
    path, pen_up = [], True
    dots = []
    for point in points:
        if not _is_drawable(point):
            pen_up = True
            continue
        x, y = _place(point, x_axis, y_axis)
        # A point between two gaps is seen only as a stroke, if of no length.
        path.append(f"M{x:.1f} {y:.1f}h0" if pen_up else f"L{x:.1f} {y:.1f}")
        pen_up = False
        if len(points) <= _MOST_WITH_POINTS:
            told = f"{point[0]:g}, {point[1]:g}"
            dots.append(
                f'<circle class="point-{number % NUM_LINE_COLOURS}" cx="{x:.1f}" cy="{y:.1f}" r="3">'
                f"<title>{told}</title></circle>"
            )
    return f'<path {_stroke(number)} d="{"".join(path)}"/>{"".join(dots)}'


def _stroke(number: int) -> str:
    dashes = _DASHES[number // NUM_LINE_COLOURS % len(_DASHES)]
    return f'class="line line-{number % NUM_LINE_COLOURS}" stroke-dasharray="{dashes or "none"}"'


def _legend(lines: Mapping[str, Points]) -> str:
    items = []
    for number, (name, points) in enumerate(lines.items()):
        last = next((f"{y:.4g}" for x, y in reversed(points) if _is_drawable((x, y))), None)
        told = f'<span class="muted">{last} at the end</span>' if last else '<span class="muted">no points</span>'
        items.append(
            f'<li><svg width="26" height="10" aria-hidden="true"><path {_stroke(number)} d="M0 5H26"/></svg>'
            f'<span class="name">{escape(name)}</span> {told}</li>'
        )
    return f'<ul class="legend">{"".join(items)}</ul>'
