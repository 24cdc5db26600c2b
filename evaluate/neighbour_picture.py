"""Queries with the frames or spectrograms of their nearest neighbours, as a picture."""

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from avid_pipeline.errors import DecodeError, SampleError
from avid_pipeline.evaluate.data import EvaluationData
from avid_pipeline.evaluate.report import Picture
from avid_pipeline.evaluate.retrieval import Neighbours
from avid_pipeline.shards_spec.reader import stored_spectrogram
from avid_pipeline.shards_spec.sample import Sample
from avid_pipeline.shards_spec.spectrogram import decode_spectrogram
from avid_pipeline.shards_spec.video import decode_frames

__all__ = ["draw_neighbours"]

_QUERIES = 6
_SHOWN_RANGE_DB = 80
_MOST_COLUMNS = 400
_OWN, _ALIKE, _OTHER, _QUERY = "#1a7f37", "#3b78c2", "#d1495b", "#555555"
_LONGEST_NAME = 22


def draw_neighbours(found: Neighbours, queries: EvaluationData, gallery: EvaluationData) -> Picture:
    """Draw some queries, spread evenly, each followed by its nearest neighbours.

    A neighbour's frame is green where it is the query's own counterpart, blue where it has a class of the query, and
    red otherwise.

    Args:
        found: the neighbours.
        queries: the data that the queries are of.
        gallery: the data that the neighbours are of.

    Raises:
        ShardError: a shard is damaged.
        SampleError: a sample cannot be decoded.
    """
    count = min(_QUERIES, len(found.queries))
    chosen = sorted({int(place) for place in np.linspace(0, len(found.queries) - 1, count).round()})
    columns = 1 + found.found.shape[1]
    figure = Figure(figsize=(1.75 * columns, 1.75 * len(chosen) + 0.3), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(chosen), columns, squeeze=False)
    for row, place in enumerate(chosen):
        _draw(axes[row][0], queries, int(found.queries[place]), found.query_modality, _QUERY)
        if row == 0:
            axes[row][0].set_title("query", fontsize=9)
        for rank in range(columns - 1):
            neighbour = int(found.found[place, rank])
            colour = _ALIKE if bool(found.alike[place, rank]) else _OTHER
            if queries is gallery and neighbour == int(found.queries[place]):
                colour = _OWN
            _draw(axes[row][rank + 1], gallery, neighbour, found.modality, colour)
            if row == 0:
                axes[row][rank + 1].set_title(f"neighbour {rank + 1}", fontsize=9)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    caption = "Queries and their nearest neighbours. Blue: of the query's class; red: of another or none."
    if found.modality != found.query_modality:
        caption += " Green: the query's own counterpart."
    return Picture(title=f"neighbours: {found.title}", png=png.getvalue(), caption=caption)


def _draw(axes: Axes, data: EvaluationData, instance: int, modality: str, colour: str) -> None:
    sample = data.reader.read(instance)
    if modality == "video":
        _draw_frame(axes, sample)
    else:
        _draw_sound(axes, sample)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(colour)
        spine.set_linewidth(3)
    axes.set_xlabel(_name(sample, data.classes), fontsize=8, parse_math=False)


def _draw_frame(axes: Axes, sample: Sample) -> None:
    video = sample.record.video
    if sample.video is None or video is None:
        raise SampleError(f"{sample.record.key}: expected a picture to show, found none")
    try:
        axes.imshow(decode_frames(sample.video, video.frames // 2, 1, video.fps, sample.record.key)[0])
    except DecodeError:
        # Other frames of it could be decoded, or it would not be here.
        axes.text(0.5, 0.5, "cannot be\ndecoded", ha="center", va="center", fontsize=8, transform=axes.transAxes)


def _draw_sound(axes: Axes, sample: Sample) -> None:
    if sample.spectrogram is None:
        raise SampleError(f"{sample.record.key}: expected sound to show, found none")
    codes = stored_spectrogram(sample.spectrogram, sample.record.key)
    decibels = decode_spectrogram(codes[:: max(1, len(codes) // _MOST_COLUMNS)])
    top = decibels.max()
    axes.imshow(decibels.T, origin="lower", aspect="auto", cmap="magma", vmin=top - _SHOWN_RANGE_DB, vmax=top)


def _name(sample: Sample, classes: Sequence[str]) -> str:
    record = sample.record
    name = ", ".join(classes[label] for label in record.labels) or record.id
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"
