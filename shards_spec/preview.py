"""A contact sheet: frames of some samples above their spectrograms."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from avid_pipeline.shards_spec.errors import SampleError, StorageError
from avid_pipeline.shards_spec.reader import ShardReader, stored_spectrogram
from avid_pipeline.shards_spec.sample import Sample
from avid_pipeline.shards_spec.spectrogram import NUM_FREQUENCIES, decode_spectrogram
from avid_pipeline.shards_spec.video import decode_frames

_COLUMNS = 4
_FRAMES = 4
_SHOWN_RANGE_DB = 80
_MOST_COLUMNS = 2000
_FORMATS = ("png", "jpg", "jpeg", "pdf", "svg", "webp")


def preview(reader: ShardReader, out: Path, count: int = 12) -> list[int]:
    """Draw a contact sheet of samples spread evenly over a data set.

    Args:
        reader: the data set.
        out: the picture to write; its ending decides the format.
        count: how many samples at most.

    Returns:
        The instance indices shown.

    Raises:
        SampleError: the data set is empty, or a sample cannot be decoded.
        StorageError: the picture cannot be written there or in that format.
    """
    if len(reader) == 0:
        raise SampleError(f"{reader.storage.url}: the data set has no samples, so there is nothing to show")
    check_picture_format(out)
    spread = np.linspace(0, len(reader) - 1, min(count, len(reader)))
    shown = sorted({int(index) for index in spread.round()})
    columns = min(_COLUMNS, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(4.4 * columns, 2.6 * rows + 0.6), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    manifest = reader.manifest
    figure.suptitle(
        f"{manifest.dataset} {manifest.split}: {len(shown)} of {len(reader)} samples", fontsize=13, parse_math=False
    )
    axes = figure.subplots(2 * rows, columns, squeeze=False, height_ratios=[1.0, 1.0] * rows)
    for place in range(rows * columns):
        above, below = axes[2 * (place // columns)][place % columns], axes[2 * (place // columns) + 1][place % columns]
        above.axis("off")
        if place < len(shown):
            sample = reader.read(shown[place])
            above.set_title(_title(shown[place], sample, manifest.classes), fontsize=9, parse_math=False)
            _draw_frames(above, sample)
            _draw_spectrogram(below, sample)
        else:
            below.axis("off")
    save_picture(figure, out)
    return shown


def check_picture_format(out: Path) -> str:
    """The format that a picture's ending asks for; PNG without one.

    Raises:
        StorageError: it is none that can be written.
    """
    picture_format = out.suffix.removeprefix(".").lower() or "png"
    if picture_format not in _FORMATS:
        raise StorageError(f"{out}: expected an ending of {', '.join(_FORMATS)}, found {out.suffix}")
    return picture_format


def save_picture(figure: Figure, out: Path) -> None:
    """Write a picture; its name appears only when it is complete.

    Raises:
        StorageError: it cannot be written there or in that format.
    """
    partial = out.with_name(out.name + ".partial")
    try:
        figure.savefig(partial, format=check_picture_format(out))
        partial.replace(out)
    except OSError as error:
        raise StorageError(f"{out}: cannot write the picture: {error.strerror}; give another place") from error


def _title(index: int, sample: Sample, classes: Sequence[str]) -> str:
    record = sample.record
    names = ", ".join(classes[label] for label in record.labels)
    return f"{index}  {names or record.id}  {record.duration:.1f} s"


def _draw_frames(axes: Axes, sample: Sample) -> None:
    video = sample.record.video
    if sample.video is None or video is None:
        return
    step = max(1, video.frames // _FRAMES)
    frames = [
        decode_frames(sample.video, min(place * step, video.frames - 1), 1, video.fps, sample.record.key)[0]
        for place in range(_FRAMES)
    ]
    axes.imshow(np.concatenate(frames, axis=1))


def _draw_spectrogram(axes: Axes, sample: Sample) -> None:
    audio = sample.record.audio
    if sample.spectrogram is None or audio is None:
        axes.axis("off")
        return
    codes = stored_spectrogram(sample.spectrogram, sample.record.key)
    # A sound of hours has far more frames than the picture has columns.
    decibels = decode_spectrogram(codes[:: max(1, len(codes) // _MOST_COLUMNS)])
    top = decibels.max()
    extent = (0, len(codes), -0.5, NUM_FREQUENCIES - 0.5)
    axes.imshow(
        decibels.T, origin="lower", aspect="auto", cmap="magma", vmin=top - _SHOWN_RANGE_DB, vmax=top, extent=extent
    )
    axes.set_yticks([0, 128, 256], ["0", "6", "12 kHz"], fontsize=6)
    seconds = np.arange(0, audio.frames / audio.frames_per_second + 1e-6)
    ticks = seconds[:: max(1, len(seconds) // 5)]
    axes.set_xticks(ticks * audio.frames_per_second, [f"{tick:.0f} s" for tick in ticks], fontsize=6)
