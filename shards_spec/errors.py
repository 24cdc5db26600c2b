"""Errors of the pipeline. Every message names what was looked at, what is wrong and what to do."""


class AvidPipelineError(Exception):
    """Base of all errors that a user can cause or mend; command lines print them without a traceback."""


class StorageError(AvidPipelineError):
    """An object or folder could not be read or written."""


class ManifestError(AvidPipelineError):
    """A manifest or sample record breaks the specification."""


class ShardError(AvidPipelineError):
    """A shard or its index is damaged or does not match the manifest."""


class SampleError(AvidPipelineError):
    """One sample cannot be used; the message names its key and shard."""


class DecodeError(SampleError):
    """The video or sound of a sample cannot be decoded."""
