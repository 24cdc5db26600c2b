"""The report's confusion matrices, as inline SVG.

The browser writes the text of these pictures, so every script is legible, they follow light and dark screens, and
they are sharp at any size and on paper. The cells are one small PNG.
"""

import base64
import io
import math
import unicodedata
from collections.abc import Sequence
from html import escape

import numpy as np
import numpy.typing as npt
from matplotlib.image import imsave

from avid_pipeline.evaluate.report_classes import MOST_NAMED
from avid_pipeline.streams.batches import IntArray

# Its opacity is what shows the share, so the picture suits light and dark screens.
_HEAT_COLOUR = (29, 82, 176)
_MOST_WITH_VALUES = 20
_MOST_TICKS = 12
_MATRIX_SIZE = 620
_UNNAMED_MATRIX_SIZE = 720
_SMALLEST_CELL, _LARGEST_CELL = 13.0, 64.0
_SMALLEST_PICTURE = 700
# In narrower cells names at a slant would touch.
_NARROW_CELL = 17.0
_CHARACTER_WIDTH = 6.3
_LONGEST_NAME = 28
_SCALE_HEIGHT = 160
_SCALE_SHARES = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0)


def png_data_url(png: bytes) -> str:
    """A PNG file as a ``data:`` URL."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def confusion_picture(classes: Sequence[str], counts: IntArray) -> str:
    """A confusion matrix as a heat map of each row's shares, as SVG.

    Up to 60 classes are named, up to 20 have their shares written in the cells; the classes of larger matrices have
    numbers.

    Args:
        classes: C names.
        counts: int64 [C, C], rows the true class, columns the predicted one.
    """
    size = len(classes)
    named = size <= MOST_NAMED
    cell = min(max(_MATRIX_SIZE / size, _SMALLEST_CELL), _LARGEST_CELL) if named else _UNNAMED_MATRIX_SIZE / size
    side = cell * size
    names = [_shortened(name) for name in classes] if named else []
    label = max((_text_width(name) for name in names), default=30.0)
    left, top = 26 + label + 10, 8.0
    below = ((label if cell < _NARROW_CELL else 0.75 * label) + 18 if named else 24) + 22
    shares = row_shares(counts)
    parts = [
        f'<image class="heat" x="{left:.1f}" y="{top:.1f}" width="{side:.1f}" height="{side:.1f}" '
        f'preserveAspectRatio="none" href="{png_data_url(_heat_png(shares))}"/>'
    ]
    if named:
        parts += [_gaps(size, cell, left, top), _cells(classes, counts, shares, cell, left, top)]
    parts.append(f'<rect class="edge" x="{left:.1f}" y="{top:.1f}" width="{side:.1f}" height="{side:.1f}"/>')
    parts.append(_names(names, classes, cell, left, top) if named else _numbers(size, cell, left, top))
    middle = top + side / 2
    parts += [
        f'<text class="title" transform="translate(14 {middle:.1f}) rotate(-90)" text-anchor="middle">'
        "true class</text>",
        f'<text class="title" x="{left + side / 2:.1f}" y="{top + side + below - 6:.1f}" text-anchor="middle">'
        "predicted class</text>",
        _scale(left + side + 22, top),
    ]
    width, height = left + side + 100, max(top + side + below, top + _SCALE_HEIGHT + 30)
    return (
        f'<svg role="img" aria-label="Confusion matrix of {size} classes" '
        f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}">\n'
        + "\n".join(parts)
        + "\n</svg>"
    )


def row_shares(counts: IntArray) -> npt.NDArray[np.float64]:
    """Counts [C, C] as shares of their row, float64 [C, C]; a row without samples stays zero."""
    shares: npt.NDArray[np.float64] = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    return shares


def _heat_png(shares: npt.NDArray[np.float64]) -> bytes:
    # Enlarged here, for some viewers smooth a small picture that is drawn large.
    repeat = -(-_SMALLEST_PICTURE // len(shares))
    pixels = np.empty((*shares.shape, 4), dtype=np.uint8)
    pixels[..., :3] = _HEAT_COLOUR
    pixels[..., 3] = np.rint(255 * np.sqrt(shares))
    out = io.BytesIO()
    imsave(out, pixels.repeat(repeat, 0).repeat(repeat, 1), format="png")
    return out.getvalue()


def _gaps(size: int, cell: float, left: float, top: float) -> str:
    side = size * cell
    path = "".join(
        f"M{left:.1f} {top + place * cell:.1f}h{side:.1f}M{left + place * cell:.1f} {top:.1f}v{side:.1f}"
        for place in range(1, size)
    )
    return f'<path class="gap" d="{path}"/>'


def _cells(
    classes: Sequence[str],
    counts: IntArray,
    shares: npt.NDArray[np.float64],
    cell: float,
    left: float,
    top: float,
) -> str:
    """What a pointer over a cell shows, and in a small matrix its share."""
    samples = counts.sum(1)
    parts = []
    for true, predicted in np.argwhere(counts):
        x, y = left + predicted * cell, top + true * cell
        share = shares[true, predicted]
        told = (
            f"{classes[true]}, predicted {classes[predicted]}: "
            f"{counts[true, predicted]:,} of {samples[true]:,} ({100 * share:.1f} %)"
        )
        parts.append(
            f'<rect class="cell" x="{x:.1f}" y="{y:.1f}" width="{cell:.1f}" height="{cell:.1f}">'
            f"<title>{escape(told)}</title></rect>"
        )
        if len(classes) <= _MOST_WITH_VALUES and share >= 0.005:
            shade = " on-dark" if share > 0.5 else ""
            place = f'x="{x + cell / 2:.1f}" y="{y + cell / 2 + 3.5:.1f}"'
            parts.append(f'<text class="value{shade}" {place}>{100 * share:.0f}</text>')
    return "\n".join(parts)


def _names(names: Sequence[str], classes: Sequence[str], cell: float, left: float, top: float) -> str:
    foot = top + len(names) * cell
    across, down, angle = (3.8, 7, -90) if cell < _NARROW_CELL else (4, 12, -45)
    parts = []
    for place, (name, whole) in enumerate(zip(names, classes, strict=True)):
        middle = (place + 0.5) * cell
        text = f"{escape(name)}<title>{escape(whole)}</title>"
        parts += [
            f'<text x="{left - 7:.1f}" y="{top + middle + 3.8:.1f}" text-anchor="end">{text}</text>',
            f'<text transform="translate({left + middle + across:.1f} {foot + down:.1f}) rotate({angle})" '
            f'text-anchor="end">{text}</text>',
        ]
    return "\n".join(parts)


def _numbers(size: int, cell: float, left: float, top: float) -> str:
    step = next(step for step in (10 ** (place // 3) * (1, 2, 5)[place % 3] for place in range(30))
                if size / step <= _MOST_TICKS)  # fmt: skip
    foot = top + size * cell
    parts = []
    for number in range(0, size, step):
        middle = (number + 0.5) * cell
        parts += [
            f'<path class="tick" d="M{left - 4:.1f} {top + middle:.1f}h4M{left + middle:.1f} {foot:.1f}v4"/>',
            f'<text x="{left - 8:.1f}" y="{top + middle + 3.8:.1f}" text-anchor="end">{number}</text>',
            f'<text x="{left + middle:.1f}" y="{foot + 16:.1f}" text-anchor="middle">{number}</text>',
        ]
    return "\n".join(parts)


def _scale(left: float, top: float) -> str:
    """Which colour is which share, in bands as fine as a screen shows."""
    bands = 40
    height = _SCALE_HEIGHT / bands
    colour = "rgb({}, {}, {})".format(*_HEAT_COLOUR)
    parts = [
        f'<rect x="{left:.1f}" y="{top + 12 + (bands - 1 - band) * height:.1f}" width="14" height="{height:.1f}" '
        f'fill="{colour}" fill-opacity="{(band + 0.5) / bands:.3f}"/>'
        for band in range(bands)
    ]
    ticks = []
    for share in _SCALE_SHARES:
        y = top + 12 + _SCALE_HEIGHT * (1 - math.sqrt(share))
        ticks.append(f'<path class="tick" d="M{left + 14:.1f} {y:.1f}h4"/>')
        ticks.append(f'<text x="{left + 22:.1f}" y="{y + 3.8:.1f}">{100 * share:g} %</text>')
    return (
        f'<text x="{left:.1f}" y="{top + 3:.1f}">of the row</text><g class="heat" shape-rendering="crispEdges">'
        + "".join(parts)
        + "</g>"
        + "".join(ticks)
    )


def _text_width(text: str) -> float:
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return _CHARACTER_WIDTH * (len(text) + 0.8 * wide)


def _shortened(name: str) -> str:
    limit = _LONGEST_NAME * _CHARACTER_WIDTH
    if _text_width(name) <= limit:
        return name
    while _text_width(name) > limit - _CHARACTER_WIDTH:
        name = name[:-1]
    return name.rstrip() + "…"
