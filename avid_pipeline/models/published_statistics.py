"""What the published models were trained to see sound normalised with."""

from importlib.resources import files

import numpy as np

from avid_pipeline.shards_spec.manifest import SpectrogramStatistics

_NAME = "published_spectrogram_statistics.npz"


def published_statistics() -> SpectrogramStatistics:
    """What sound was normalised with for the published models. Over how many frames is not known: 1 stands for that."""
    with files("avid_pipeline.models").joinpath(_NAME).open("rb") as file, np.load(file) as arrays:
        mean, std = (tuple(arrays[name].astype(float).tolist()) for name in ("mean", "std"))
    return SpectrogramStatistics(mean=mean, std=std, frames=1)
