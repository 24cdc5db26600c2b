"""YUV colour spaces: how luminance and chrominance become RGB."""

import numpy as np
import numpy.typing as npt
from av.video.reformatter import Colorspace

# Weights of red and blue in luminance: ITU-R BT.601, and by FFmpeg's number those of BT.709 and BT.2020.
BT601 = (0.299, 0.114)
OTHER_WEIGHTS = {int(Colorspace.ITU709): (0.2126, 0.0722), int(Colorspace.BT2020): (0.2627, 0.0593)}


def yuv_to_rgb(red: float, blue: float) -> npt.NDArray[np.float64]:
    """The matrix [3, 3] from full-range YUV, chrominance about zero, to RGB.

    Args:
        red: weight of red in luminance.
        blue: weight of blue in luminance.
    """
    green = 1 - red - blue
    return np.array(
        [
            [1, 0, 2 * (1 - red)],
            [1, -2 * (1 - blue) * blue / green, -2 * (1 - red) * red / green],
            [1, 2 * (1 - blue), 0],
        ]
    )
