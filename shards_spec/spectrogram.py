"""Log-power spectrograms: how they are computed and how they are stored.

The recipe is that of AVID-CMA's published statistics: 24 kHz mono, a centred, zero-padded short-time Fourier
transform of 1024 points (Hann window), 100 frames a second, power; bin 0 is kept, bins 1 to 512 are averaged
in pairs, which leaves 257 frequencies; decibels with a floor of -100.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from avid_pipeline.shards_spec.errors import ManifestError

FLOOR_DB = -100.0
CEILING_DB = 60.0
NUM_FREQUENCIES = 257
CODE_STEP_DB = (CEILING_DB - FLOOR_DB) / 255

# Small enough for the processor's cache: blocks of 512 frames took three times as long.
_BLOCK_FRAMES = 128

SpectrogramStorage = Literal["uint8", "float16"]
FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class SpectrogramRecipe:
    """What turns a waveform into a spectrogram.

    Attributes:
        sample_rate: samples a second; a multiple of ``frames_per_second``.
        frames_per_second: spectrogram frames a second.
        transform_points: length of the Fourier transform and of its Hann window, in samples.
    """

    sample_rate: int = 24_000
    frames_per_second: int = 100
    transform_points: int = 1024

    def __post_init__(self) -> None:
        if self.sample_rate <= 0 or self.sample_rate % self.frames_per_second:
            raise ManifestError(
                f"sample_rate: expected a positive multiple of {self.frames_per_second} Hz so that every frame "
                f"has the same hop, found {self.sample_rate}; resample the sound first"
            )

    @property
    def hop(self) -> int:
        """Samples between the centres of two frames."""
        return self.sample_rate // self.frames_per_second


class SpectrogramStream:
    """Computes a spectrogram while its waveform arrives, in bounded memory.

    ``push`` takes samples and returns the frames that they complete; ``finish`` returns the rest. The frames do
    not depend on how the waveform was cut.
    """

    def __init__(self, recipe: SpectrogramRecipe | None = None) -> None:
        self._recipe = recipe or SpectrogramRecipe()
        points = self._recipe.transform_points
        # Double precision inside: in single, quiet bins beside loud ones are off by more than 1e-3 dB.
        self._window = np.hanning(points + 1)[:-1]
        self._pending = np.zeros(points // 2, dtype=np.float32)
        self._num_samples = 0
        self._num_frames = 0

    def push(self, samples: FloatArray) -> FloatArray:
        """Take float32 samples [n]; return the completed frames [m, 257] in dB (m may be 0)."""
        self._num_samples += len(samples)
        self._pending = np.concatenate([self._pending, samples])
        points, hop = self._recipe.transform_points, self._recipe.hop
        complete = (len(self._pending) - points) // hop + 1 if len(self._pending) >= points else 0
        # The number of frames of the whole is known only at the end; a frame is due only when its hop has begun.
        due = self._num_samples // hop - self._num_frames
        return self._take(min(complete, due))

    def finish(self) -> FloatArray:
        """Return the frames [m, 257] in dB that only zero padding completes: ``samples // hop`` frames in all."""
        self._pending = np.concatenate([self._pending, np.zeros(self._recipe.transform_points, dtype=np.float32)])
        return self._take(self._num_samples // self._recipe.hop - self._num_frames)

    def _take(self, count: int) -> FloatArray:
        blocks = [np.empty((0, NUM_FREQUENCIES), dtype=np.float32)]
        hop, points = self._recipe.hop, self._recipe.transform_points
        for first in range(0, count, _BLOCK_FRAMES):
            frames = min(_BLOCK_FRAMES, count - first)
            span = self._pending[first * hop : (first + frames - 1) * hop + points]
            windows = np.lib.stride_tricks.sliding_window_view(span, points)[::hop]
            blocks.append(_log_power(windows * self._window))
        if count:
            self._pending = self._pending[count * hop :]
            self._num_frames += count
        return np.concatenate(blocks)


def _log_power(windowed: npt.NDArray[np.float64]) -> FloatArray:
    """Windowed samples [frames, points] to dB [frames, 257]."""
    transform = np.fft.rfft(windowed, axis=1)
    power = transform.real**2 + transform.imag**2
    paired = np.empty((len(power), NUM_FREQUENCIES))
    paired[:, 0] = power[:, 0]
    paired[:, 1:] = (power[:, 1::2] + power[:, 2::2]) / 2
    return (10 * np.log10(np.maximum(paired, 10 ** (FLOOR_DB / 10)))).astype(np.float32)


def log_power_spectrogram(waveform: FloatArray, sample_rate: int = 24_000) -> FloatArray:
    """Log-power spectrogram of a mono waveform.

    Args:
        waveform: float32 samples [n] in [-1, 1].
        sample_rate: samples a second, a multiple of 100.

    Returns:
        float32 [n // hop, 257] in dB, floor -100, with a hop of ``sample_rate / 100``; the dynamic range is not
        clipped (see :func:`clip_range`).

    Raises:
        ManifestError: the waveform is not one-dimensional, or the sample rate has no whole hop.
    """
    samples = np.asarray(waveform, dtype=np.float32)
    if samples.ndim != 1:
        raise ManifestError(f"waveform: expected a mono waveform [n], found shape {samples.shape}; mix it down")
    stream = SpectrogramStream(SpectrogramRecipe(sample_rate=sample_rate))
    return np.concatenate([stream.push(samples), stream.finish()])


def spectrogram_blocks(
    waveforms: Iterable[FloatArray], recipe: SpectrogramRecipe | None = None
) -> Iterator[FloatArray]:
    """Spectrogram blocks [m, 257] of a waveform that arrives in pieces."""
    stream = SpectrogramStream(recipe)
    for samples in waveforms:
        yield stream.push(samples)
    yield stream.finish()


def clip_range(spectrogram: FloatArray, decibels: float = 100.0) -> FloatArray:
    """Clip the dynamic range to the maximum minus ``decibels``: ``max(x, x.max() - decibels)``, any shape."""
    if spectrogram.size == 0:
        return spectrogram
    clipped: FloatArray = np.maximum(spectrogram, spectrogram.max() - decibels)
    return clipped


def encode_spectrogram(spectrogram: FloatArray, storage: SpectrogramStorage = "uint8") -> npt.NDArray[np.generic]:
    """Code a spectrogram in dB for storage.

    ``uint8`` codes cover [-100, 60] dB in steps of 160/255, so that the error is at most 0.314 dB inside it;
    ``float16`` keeps the value.
    """
    if storage == "float16":
        return spectrogram.astype(np.float16)
    codes: npt.NDArray[np.uint8] = np.clip(np.rint((spectrogram - FLOOR_DB) / CODE_STEP_DB), 0, 255).astype(np.uint8)
    return codes


def decode_spectrogram(codes: npt.NDArray[np.generic]) -> FloatArray:
    """Stored spectrogram (uint8 codes or float16), any shape, to float32 dB.

    Raises:
        ManifestError: another dtype.
    """
    if codes.dtype == np.uint8:
        return codes.astype(np.float32) * np.float32(CODE_STEP_DB) + np.float32(FLOOR_DB)
    if codes.dtype == np.float16:
        return codes.astype(np.float32)
    raise ManifestError(f"spectrogram: expected uint8 or float16, found {codes.dtype}; rebuild this shard")
