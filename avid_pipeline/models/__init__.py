"""Networks of the paper, and loading their weights."""

from avid_pipeline.models.av_model import AVModel
from avid_pipeline.models.pretrained import load_pretrained

__all__ = ["AVModel", "load_pretrained"]
