"""Stored spectrograms as files: written while their sound arrives, and summed for the data set's statistics."""

from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from avid_pipeline.shards_spec.manifest import Record, SpectrogramStatistics
from avid_pipeline.shards_spec.spectrogram import (
    NUM_FREQUENCIES,
    FloatArray,
    SpectrogramStorage,
    decode_spectrogram,
    encode_spectrogram,
)

_FRAMES_PER_SUM = 256


class SpectrogramSums(Record):
    """Sums over stored spectrogram frames, from which statistics of the whole data set follow.

    Attributes:
        frames: how many.
        total: 257 sums in dB.
        squares: 257 sums of squares.
    """

    frames: int = 0
    total: tuple[float, ...] = (0.0,) * NUM_FREQUENCIES
    squares: tuple[float, ...] = (0.0,) * NUM_FREQUENCIES

    def plus(self, other: "SpectrogramSums") -> "SpectrogramSums":
        """The sums over both."""
        return SpectrogramSums(
            frames=self.frames + other.frames,
            total=tuple(np.add(self.total, other.total).tolist()),
            squares=tuple(np.add(self.squares, other.squares).tolist()),
        )

    def statistics(self) -> SpectrogramStatistics | None:
        """Per-frequency mean and standard deviation; None where there was no frame."""
        if self.frames == 0:
            return None
        mean = np.divide(self.total, self.frames)
        variance = np.divide(self.squares, self.frames) - np.square(mean)
        std = np.sqrt(np.maximum(variance, 0))
        return SpectrogramStatistics(mean=tuple(mean.tolist()), std=tuple(std.tolist()), frames=self.frames)


def write_spectrogram(path: Path, blocks: Iterable[FloatArray], storage: SpectrogramStorage) -> int:
    """Write ``KEY.spectrogram.npy`` in bounded memory, to the byte what :func:`numpy.save` writes.

    Args:
        path: the file to write.
        blocks: of the spectrogram, each [m, 257] in dB.
        storage: dtype to store.

    Returns:
        The number of frames.
    """
    frames = 0
    with path.open("wb") as file:
        _write_header(file, frames, storage)
        begin = file.tell()
        for block in blocks:
            file.write(np.ascontiguousarray(encode_spectrogram(block, storage)).tobytes())
            frames += len(block)
        file.seek(0)
        # Numpy pads its header so that a first axis of any length leaves it as long as it was.
        _write_header(file, frames, storage)
        assert file.tell() == begin
    return frames


def _write_header(file: BinaryIO, frames: int, storage: SpectrogramStorage) -> None:
    description = {
        "descr": np.lib.format.dtype_to_descr(np.dtype(storage)),
        "fortran_order": False,
        "shape": (frames, NUM_FREQUENCIES),
    }
    np.lib.format.write_array_header_1_0(file, description)


def sum_spectrogram(path: Path) -> SpectrogramSums:
    """Sums over a stored spectrogram, taken in blocks of a fixed size, so that they are the same to the last bit."""
    codes = np.load(path, mmap_mode="r", allow_pickle=False)
    total, squares = np.zeros(NUM_FREQUENCIES), np.zeros(NUM_FREQUENCIES)
    for first in range(0, len(codes), _FRAMES_PER_SUM):
        decibels = decode_spectrogram(np.asarray(codes[first : first + _FRAMES_PER_SUM])).astype(np.float64)
        total += decibels.sum(axis=0)
        squares += np.square(decibels).sum(axis=0)
    return SpectrogramSums(frames=len(codes), total=tuple(total.tolist()), squares=tuple(squares.tolist()))
