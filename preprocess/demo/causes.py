"""Hidden causes: what the picture and the sound of one demo video have in common.

========================  ===============================  =================================================
cause                     in the picture                   in the sound
========================  ===============================  =================================================
``shape``                 outline of the moving shapes     harmonics of the tone
``motion``                how the shapes move              how the tone swells, glides and clicks
``colour``                hue of the shapes                pitch of the tone
``backdrop``              hue of the background            frequency of the hiss
``tempo``                 cycles of movement per second    beats per second
``size``                  radius of the shapes             loudness of the tone
``grain``                 how close the stripes are        how fast the hiss flutters
========================  ===============================  =================================================

The first two make the class. The other five are continuous and the instance's own, so that instances of one class
differ, and so that what a model learned from some instances lets it match picture and sound of others. As in the world,
classes have their tendencies: every shape has its own third of the range of ``colour``, and every motion its own of
``backdrop``. All show in any half second of picture and in any two seconds of sound.
"""

from dataclasses import dataclass
from typing import Final, Literal, get_args

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "CLASS_NAMES",
    "MOTIONS",
    "SHAPES",
    "HiddenCauses",
    "Motion",
    "Shape",
    "geometric",
    "keyed_generator",
    "sample_causes",
]

Shape = Literal["circle", "square", "star"]
Motion = Literal["bouncing", "pulsing", "swinging"]
SHAPES: Final[tuple[Shape, ...]] = get_args(Shape)
MOTIONS: Final[tuple[Motion, ...]] = get_args(Motion)
CLASS_NAMES: Final = tuple(f"{motion}_{shape}" for motion in MOTIONS for shape in SHAPES)

_BEATS_PER_SECOND: Final = (1.5, 5.0)
_PURPOSES: Final = ("causes", "picture", "sound", "name")


@dataclass(frozen=True)
class HiddenCauses:
    """What one demo video is about.

    Attributes:
        shape: Outline of the shapes.
        motion: How they move.
        colour: Hue of the shapes and pitch of the tone, 0 to 1.
        backdrop: Hue of the background and frequency of the hiss, 0 to 1.
        tempo: Speed of movement and beat, 0 to 1.
        size: Radius of the shapes and loudness of the tone, 0 to 1.
        grain: Density of the stripes and flutter of the hiss, 0 to 1.
        phase: Where in its cycle the movement is at the first frame, in cycles, 0 to 1.
    """

    shape: Shape
    motion: Motion
    colour: float
    backdrop: float
    tempo: float
    size: float
    grain: float
    phase: float

    @property
    def class_name(self) -> str:
        """Name of the class, for example ``bouncing_circle``."""
        return f"{self.motion}_{self.shape}"

    def cycles(self, seconds: NDArray[np.float64]) -> NDArray[np.float64]:
        """Cycles of the movement done at the given times; a whole number is a beat. Any shape."""
        return geometric(_BEATS_PER_SECOND, self.tempo) * seconds + self.phase


def geometric(limits: tuple[float, float], position: float) -> float:
    """Value at ``position`` (0 to 1) between two positive limits, in equal ratios."""
    low, high = limits
    return float(low * (high / low) ** position)


def keyed_generator(
    seed: int, instance: int, purpose: Literal["causes", "picture", "sound", "name"]
) -> np.random.Generator:
    """Generator whose draws depend on (seed, instance, purpose) and nothing else; both numbers from 0."""
    return np.random.default_rng([seed, instance, _PURPOSES.index(purpose)])


def sample_causes(seed: int, instance: int) -> HiddenCauses:
    """Hidden causes of an instance. Classes take turns; in a class, continuous causes are uniform and independent."""
    motion, shape = divmod(instance % len(CLASS_NAMES), len(SHAPES))
    in_shape, in_motion, tempo, size, grain, phase = keyed_generator(seed, instance, "causes").random(6)
    colour, backdrop = (shape + in_shape) / len(SHAPES), (motion + in_motion) / len(MOTIONS)
    return HiddenCauses(
        shape=SHAPES[shape],
        motion=MOTIONS[motion],
        colour=float(colour),
        backdrop=float(backdrop),
        tempo=float(tempo),
        size=float(size),
        grain=float(grain),
        phase=float(phase),
    )
