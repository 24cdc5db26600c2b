"""The sound of a demo video: a rhythmic tone and a fluttering hiss."""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from avid_pipeline.preprocess.demo.causes import HiddenCauses, Shape, geometric

__all__ = ["SAMPLES_PER_SECOND", "synthesize"]

# Not the 24 kHz of the spectrograms, so that preprocessing has to resample.
SAMPLES_PER_SECOND: Final = 44_100

_PITCH_HZ: Final = (160.0, 1600.0)
_TONE_AMPLITUDE: Final = (0.05, 0.4)
_HISS_HZ: Final = (1500.0, 9000.0)
_HISS_OCTAVES: Final = 0.25
_HISS_LEVEL: Final = 0.04
_FLUTTER_HZ: Final = (6.0, 18.0)
_FLOOR_LEVEL: Final = 0.0005
_GLIDE_OCTAVES: Final = 0.12

# Harmonic numbers and amplitudes: a circle is mellow, a square hollow (odd harmonics), a star bright.
_HARMONICS: Final[dict[Shape, tuple[tuple[float, ...], tuple[float, ...]]]] = {
    "circle": ((1, 2, 3), (1.0, 0.25, 0.06)),
    "square": ((1, 3, 5, 7, 9, 11), (1.0, 0.6, 0.45, 0.35, 0.3, 0.25)),
    "star": (tuple(range(1, 13)), (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45)),
}


def synthesize(causes: HiddenCauses, seconds: float, generator: np.random.Generator) -> NDArray[np.float32]:
    """Make the sound of one instance.

    Args:
        causes: What to make heard.
        seconds: Duration.
        generator: For what the picture knows nothing of: the phases of the harmonics and the noise.

    Returns:
        Waveform within -1 and 1, ``[round(seconds * 44100)]``, one channel.
    """
    times = np.arange(round(seconds * SAMPLES_PER_SECOND)) / SAMPLES_PER_SECOND
    cycles = causes.cycles(times)
    tone = _tone(causes, times, cycles, generator)
    hiss = _hiss(causes, times, generator)
    floor = _FLOOR_LEVEL * generator.standard_normal(len(times))
    return np.clip(tone + hiss + floor, -1, 1).astype(np.float32)


def _tone(
    causes: HiddenCauses,
    times: NDArray[np.float64],
    cycles: NDArray[np.float64],
    generator: np.random.Generator,
) -> NDArray[np.float64]:
    """The pitched part: beats with the movement, amplitude at most that of the cause ``size``."""
    pitch = geometric(_PITCH_HZ, causes.colour)
    if causes.motion == "swinging":
        glide = 2 ** (_GLIDE_OCTAVES * np.sin(2 * np.pi * cycles))
        turns = pitch * np.cumsum(glide) / SAMPLES_PER_SECOND
    else:
        turns = pitch * times
    numbers, amplitudes = _HARMONICS[causes.shape]
    wave = np.zeros_like(times)
    for number, amplitude in zip(numbers, amplitudes, strict=True):
        if number * pitch < 0.45 * SAMPLES_PER_SECOND:
            wave += amplitude * np.sin(2 * np.pi * (number * turns + generator.random()))
    loudness = geometric(_TONE_AMPLITUDE, causes.size) / np.sqrt(np.sum(np.square(amplitudes)))
    sounding = loudness * _envelope(causes, cycles) * wave
    if causes.motion == "bouncing":
        click = np.exp(-(cycles % 1.0) * (times[1] / max(cycles[1] - cycles[0], 1e-9)) / 0.008)
        sounding += 0.25 * loudness * click * generator.standard_normal(len(times))
    return np.asarray(sounding, dtype=np.float64)


def _envelope(causes: HiddenCauses, cycles: NDArray[np.float64]) -> NDArray[np.float64]:
    """Loudness over time, 0 to 1: struck at each landing, swelling with each pulse, or steady in a swing."""
    if causes.motion == "bouncing":
        return np.exp(-4.0 * (cycles % 1.0))
    if causes.motion == "pulsing":
        return (0.5 + 0.5 * np.cos(2 * np.pi * cycles)) ** 2
    return 0.8 + 0.2 * np.cos(4 * np.pi * cycles)


def _hiss(causes: HiddenCauses, times: NDArray[np.float64], generator: np.random.Generator) -> NDArray[np.float64]:
    """Noise around one frequency, as wide as that frequency is high, that flutters."""
    spectrum = np.fft.rfft(generator.standard_normal(len(times)))
    frequencies = np.fft.rfftfreq(len(times), 1 / SAMPLES_PER_SECOND)
    octaves = np.log2(np.maximum(frequencies, 1.0) / geometric(_HISS_HZ, causes.backdrop))
    noise = np.fft.irfft(spectrum * np.exp(-0.5 * (octaves / _HISS_OCTAVES) ** 2), len(times))
    rate = geometric(_FLUTTER_HZ, causes.grain)
    flutter = 0.15 + 0.85 * (0.5 + 0.5 * np.cos(2 * np.pi * (rate * times + generator.random()))) ** 2
    hiss: NDArray[np.float64] = _HISS_LEVEL * noise / noise.std() * flutter
    return hiss
