"""Our colour jitter beside torchvision's formulas: a picture, and how many grey levels they differ.

Ours is one matrix (``avid_pipeline.clips.augmentation.colour_matrix``): contrast about mid grey, saturation and hue in
YIQ, no clipping in between. torchvision's ColorJitter, written here from its documented formulas: contrast about the
mean grey, hue in HSV, clipping after each operation, the four in random order. The picture is matplotlib's portrait of
Grace Hopper (public domain) unless another is given.

    python benchmarks/colour_jitter.py --output docs/images/colour_jitter.jpg [--picture FILE]
"""

import argparse
from collections.abc import Callable
from itertools import permutations
from pathlib import Path

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib import cbook
from matplotlib import pyplot as plt
from tabulate import tabulate

from avid_pipeline.clips.augmentation import IMAGENET_MEAN, IMAGENET_STD, colour_matrix

Picture = npt.NDArray[np.float64]

LUMINANCE = np.array([0.2989, 0.587, 0.114])
NAMES = ("brightness", "contrast", "saturation", "hue")
NEUTRAL = (1.0, 1.0, 1.0, 0.0)
STRENGTHS = (0.4, 0.4, 0.4, 0.2)
WEAKEST, STRONGEST = (0.6, 0.6, 0.6, -0.2), (1.4, 1.4, 1.4, 0.2)
DRAWS = 300


def main() -> None:
    """Print the table and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="picture to write (.jpg or .png)")
    parser.add_argument("--picture", type=Path, help="another picture than matplotlib's")
    arguments = parser.parse_args()
    matplotlib.use("Agg")
    picture = read_picture(arguments.picture)
    print(
        tabulate(
            differences(picture), headers=("operation", "mean difference", "95 %", "of which order"), floatfmt=".1f"
        )
    )
    draw(picture, arguments.output)


def read_picture(path: Path | None) -> Picture:
    """RGB in [0, 1], [H, W, 3], with the longer side at most 300 pixels."""
    source = path or Path(str(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)))
    values = plt.imread(source)[..., :3]
    picture: Picture = values / 255.0 if values.dtype == np.uint8 else values.astype(np.float64)
    step = -(-max(picture.shape) // 300)
    height, width = picture.shape[0] // step * step, picture.shape[1] // step * step
    return picture[:height, :width].reshape(height // step, step, width // step, step, 3).mean(axis=(1, 3))


def ours(picture: Picture, factors: tuple[float, ...]) -> Picture:
    """The colour matrix without normalisation, clipped to what can be shown."""
    matrix = colour_matrix(*factors).astype(np.float64)
    normalised = 255 * picture @ matrix[:, :3].T + matrix[:, 3]
    return np.clip(normalised * np.array(IMAGENET_STD) + np.array(IMAGENET_MEAN), 0, 1)


def torchvisions(picture: Picture, factors: tuple[float, ...], order: tuple[int, ...] = (0, 1, 2, 3)) -> Picture:
    """ColorJitter's operations in an order, each clipped to [0, 1]."""
    operations: tuple[Callable[[Picture, float], Picture], ...] = (
        lambda rgb, factor: blend(rgb, np.zeros_like(rgb), factor),
        lambda rgb, factor: blend(rgb, np.full_like(rgb, (rgb @ LUMINANCE).mean()), factor),
        lambda rgb, factor: blend(rgb, np.repeat((rgb @ LUMINANCE)[..., None], 3, axis=-1), factor),
        turn_hue,
    )
    for number in order:
        picture = operations[number](picture, factors[number])
    return picture


def blend(picture: Picture, other: Picture, factor: float) -> Picture:
    """Away from the other picture by a factor."""
    return np.clip(factor * picture + (1 - factor) * other, 0, 1)


def turn_hue(rgb: Picture, turn: float) -> Picture:
    """Add to the hue, in full turns, of hue, saturation and value."""
    value, lowest = rgb.max(axis=-1), rgb.min(axis=-1)
    chroma = value - lowest
    red, green, blue = np.moveaxis(rgb, -1, 0)
    safe = np.where(chroma > 0, chroma, 1)
    sixth = np.select(
        [chroma == 0, value == red, value == green],
        [0 * value, (green - blue) / safe, 2 + (blue - red) / safe],
        4 + (red - green) / safe,
    )
    turned = sixth + 6 * turn
    # Each channel is value less chroma times a trapezium of the hue.
    places = (np.array([5, 3, 1]) + turned[..., None]) % 6
    return value[..., None] - chroma[..., None] * np.clip(np.minimum(places, 4 - places), 0, 1)


def only(name: str, factors: tuple[float, ...]) -> tuple[float, ...]:
    """One factor, the others neutral."""
    return tuple(factors[i] if NAMES[i] == name else NEUTRAL[i] for i in range(4))


def differences(picture: Picture) -> list[tuple[str, float, float, float | None]]:
    """Mean absolute difference in grey levels over random factors, by operation and of all together.

    The last column is what torchvision differs from itself by, on average, in another order.
    """
    generator = np.random.default_rng(0)
    orders = list(permutations(range(4)))
    rows: list[tuple[str, float, float, float | None]] = []
    for name in (*NAMES, "all"):
        found, shuffled = [], []
        for _ in range(DRAWS):
            drawn = tuple(float(generator.uniform(n - s, n + s)) for n, s in zip(NEUTRAL, STRENGTHS, strict=True))
            factors = drawn if name == "all" else only(name, drawn)
            first, second = (orders[place] for place in generator.choice(len(orders), 2, replace=False))
            theirs = torchvisions(picture, factors, first)
            found.append(255 * np.abs(ours(picture, factors) - theirs).mean())
            shuffled.append(255 * np.abs(torchvisions(picture, factors, second) - theirs).mean())
        order = float(np.mean(shuffled)) if name == "all" else None
        rows.append((name, float(np.mean(found)), float(np.quantile(found, 0.95)), order))
    return rows


def draw(picture: Picture, path: Path) -> None:
    """Rows: operations alone and all together; columns: torchvision and ours at the weakest and strongest factors."""
    rows = [(name, only(name, WEAKEST), only(name, STRONGEST)) for name in NAMES]
    rows.append(("all four", WEAKEST, STRONGEST))
    rows.append(("a mixture", (1.2, 0.7, 1.3, 0.1), (0.8, 1.3, 0.7, -0.1)))
    ratio = picture.shape[0] / picture.shape[1]
    figure, axes = plt.subplots(len(rows), 5, figsize=(9.5, 1.9 * ratio * len(rows) + 0.3), squeeze=False)
    for row, (name, weak, strong) in zip(axes, rows, strict=True):
        shown = [
            ("original", picture),
            ("torchvision", torchvisions(picture, weak)),
            ("ours", ours(picture, weak)),
            ("torchvision", torchvisions(picture, strong)),
            ("ours", ours(picture, strong)),
        ]
        captions = ["", label(name, weak), label(name, weak), label(name, strong), label(name, strong)]
        for cell, (title, values), caption in zip(row, shown, captions, strict=True):
            cell.imshow(np.clip(values, 0, 1))
            cell.set_title(f"{title}\n{caption}" if caption else title, fontsize=7)
            cell.axis("off")
    figure.tight_layout(pad=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


def label(name: str, factors: tuple[float, ...]) -> str:
    """The factors that are not neutral."""
    if name in NAMES:
        return f"{name} {factors[NAMES.index(name)]:g}"
    return ", ".join(f"{factor:g}" for factor in factors)


if __name__ == "__main__":
    main()
