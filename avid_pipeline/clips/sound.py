"""What is done to a clip's sound, wherever it is done."""

import numpy as np

from avid_pipeline.clips.augmentation import FloatArray

DYNAMIC_RANGE_DB = 100.0
STD_GUARD = 1e-5


def augment_sound(sound_FT: FloatArray, volume_db: float, mean: FloatArray, std: FloatArray) -> FloatArray:
    """Volume, dynamic range of the clip, and per-frequency normalisation.

    Args:
        sound_FT: float32 dB [frames, 257].
        volume_db: added.
        mean: float32 [257], subtracted.
        std: float32 [257]; the sound is divided by it plus 1e-5.

    Returns:
        float32 [1, frames, 257].
    """
    louder = sound_FT + np.float32(volume_db)
    np.maximum(louder, louder.max() - np.float32(DYNAMIC_RANGE_DB), out=louder)
    normalised: FloatArray = ((louder - mean) / (std + np.float32(STD_GUARD)))[None]
    return normalised
