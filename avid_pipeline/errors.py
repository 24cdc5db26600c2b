"""Errors of the core, beside those of :mod:`avid_pipeline.shards_spec.errors`."""

from avid_pipeline.shards_spec.errors import (
    AvidPipelineError,
    DecodeError,
    ManifestError,
    SampleError,
    ShardError,
    StorageError,
)

__all__ = [
    "AvidPipelineError",
    "CheckpointError",
    "ConfigError",
    "DecodeError",
    "ManifestError",
    "PlanError",
    "SampleError",
    "ShardError",
    "StorageError",
]


class ConfigError(AvidPipelineError):
    """A configuration value is missing, unknown, of the wrong type or out of range."""


class PlanError(AvidPipelineError):
    """The data cannot be divided as asked (for example too many ranks for the data)."""


class CheckpointError(AvidPipelineError):
    """A checkpoint is missing, incomplete, damaged or of another shape."""
