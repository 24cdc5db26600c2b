"""The sound of a demo video: a rhythmic tone and a fluttering hiss."""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from avid_pipeline.preprocess.demo.causes import HiddenCauses, Shape, geometric

__all__ = ["SAMPLES_PER_SECOND", "synthesize"]

# Not the 24 kHz of the spectrograms, so that preprocessing has to resample.
SAMPLES_PER_SECOND: Final = 44_100

_PITCH_HZ: Final = (150.0, 1200.0)
_TONE_LEVEL: Final = (0.03, 0.18)
_HISS_LEVEL: Final = (0.0005, 0.03)
_FLUTTER_HZ: Final = (5.0, 20.0)
_GLIDE_OCTAVES: Final = 0.08
_HIGHEST_HARMONIC_HZ: Final = 12_000.0
_TABLE_SIZE: Final = 4096

# How fast harmonics weaken, as a power of their number, and what is left of the even ones: a circle is mellow, a
# square hollow, a star bright.
_TIMBRES: Final[dict[Shape, tuple[float, float]]] = {"circle": (2.0, 1.0), "square": (1.0, 0.15), "star": (0.3, 1.0)}


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
    sound = _tone(causes, times, generator) + _hiss(causes, times, generator)
    return np.clip(sound, -1, 1).astype(np.float32)


def _tone(causes: HiddenCauses, times: NDArray[np.float64], generator: np.random.Generator) -> NDArray[np.float64]:
    """The pitched part, which beats with the movement."""
    cycles = causes.cycles(times)
    pitch = geometric(_PITCH_HZ, causes.colour)
    turns = pitch * times
    if causes.motion == "swinging":
        turns = pitch * np.cumsum(2 ** (_GLIDE_OCTAVES * np.sin(2 * np.pi * cycles))) / SAMPLES_PER_SECOND
    table = _one_turn(causes.shape, pitch, generator)
    wave = table[np.rint(turns % 1.0 * _TABLE_SIZE).astype(int) % _TABLE_SIZE]
    level = geometric(_TONE_LEVEL, causes.size)
    sounding: NDArray[np.float64] = level * _envelope(causes, cycles) * wave
    if causes.motion == "bouncing":
        seconds_since_beat = (cycles % 1.0) * (times[1] - times[0]) / (cycles[1] - cycles[0])
        sounding += 0.5 * level * np.exp(-seconds_since_beat / 0.01) * generator.standard_normal(len(times))
    return sounding


def _one_turn(shape: Shape, pitch: float, generator: np.random.Generator) -> NDArray[np.float64]:
    """One period of the tone, ``[4096]``, with root mean square 1 and as many harmonics as its pitch leaves room for."""
    numbers = np.arange(1, int(_HIGHEST_HARMONIC_HZ / pitch) + 1)
    fall, even = _TIMBRES[shape]
    amplitudes = numbers**-fall * np.where(numbers % 2 == 0, even, 1.0)
    spectrum = np.zeros(_TABLE_SIZE // 2 + 1, complex)
    spectrum[numbers] = amplitudes * np.exp(2j * np.pi * generator.random(len(numbers)))
    wave = np.fft.irfft(spectrum)
    return wave / np.sqrt(np.mean(np.square(wave)))


def _envelope(causes: HiddenCauses, cycles: NDArray[np.float64]) -> NDArray[np.float64]:
    """Loudness over time, 0 to 1: struck at each landing, swelling with each pulse, or steady in a swing."""
    if causes.motion == "bouncing":
        return np.exp(-2.5 * (cycles % 1.0))
    if causes.motion == "pulsing":
        return (0.5 + 0.5 * np.cos(2 * np.pi * cycles)) ** 2
    return 0.8 + 0.2 * np.cos(4 * np.pi * cycles)


def _hiss(causes: HiddenCauses, times: NDArray[np.float64], generator: np.random.Generator) -> NDArray[np.float64]:
    """Noise over all frequencies, weaker towards the high ones, that flutters."""
    noise = generator.standard_normal(len(times))
    rate = geometric(_FLUTTER_HZ, causes.grain)
    flutter = 0.3 + 0.7 * (0.5 + 0.5 * np.cos(2 * np.pi * (rate * times + generator.random())))
    hiss: NDArray[np.float64] = geometric(_HISS_LEVEL, causes.light) * noise * flutter
    return hiss
