"""Sources that do not become samples: each has a machine-readable reason, and is counted."""

import json
from collections import Counter
from collections.abc import Iterable
from typing import Literal

from avid_pipeline.preprocess.errors import PreprocessError
from avid_pipeline.shards_spec.manifest import Record

Reason = Literal[
    "unreadable",
    "empty_file",
    "no_class_folder",
    "no_video_stream",
    "no_audio_stream",
    "too_short",
    "decode_error",
    "timeout",
    "limit_exceeded",
    "source_not_found",
    "bad_annotation",
]


class QuarantineEntry(Record):
    """One line of ``quarantine.jsonl``.

    Attributes:
        source: path of the source relative to the data set's folder.
        reason: why it did not become a sample.
        detail: the same for people, with the decoder's last words where there are any.
    """

    source: str
    reason: Reason
    detail: str


class SourceRejectedError(PreprocessError):
    """A source cannot become a sample; its reason goes to the quarantine."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason: Reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type["SourceRejectedError"], tuple[Reason, str]]:
        return SourceRejectedError, (self.reason, self.detail)


def to_jsonl(entries: Iterable[QuarantineEntry]) -> bytes:
    """The content of ``quarantine.jsonl``."""
    return "".join(json.dumps(entry.model_dump(), ensure_ascii=False) + "\n" for entry in entries).encode()


def count_reasons(entries: Iterable[QuarantineEntry]) -> list[tuple[str, int]]:
    """Reasons with how often they occur, most frequent first."""
    return sorted(Counter(entry.reason for entry in entries).items(), key=lambda item: (-item[1], item[0]))
