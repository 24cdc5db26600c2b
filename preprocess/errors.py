"""Errors of preprocessing."""

from avid_pipeline.shards_spec.errors import AvidPipelineError

__all__ = ["PreprocessError"]


class PreprocessError(AvidPipelineError):
    """Preprocessing cannot start or go on: a tool is missing, an option is wrong or a folder is in the way."""
