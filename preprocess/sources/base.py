"""What every data set source gives: a list of files with ids, class names and subsets, in a defined order."""

from dataclasses import dataclass
from pathlib import Path

from avid_pipeline.preprocess.quarantine import Reason
from avid_pipeline.shards_spec.manifest import Modality


@dataclass(frozen=True)
class RemoteFile:
    """A file in an object store or behind HTTP.

    Attributes:
        root: URL of a bucket, container or host, or of a folder in it.
        path: the file's name below the root, not percent-encoded.
    """

    root: str
    path: str

    def __str__(self) -> str:
        return f"{self.root.rstrip('/')}/{self.path}"


@dataclass(frozen=True)
class Segment:
    """The part of a file to convert, in seconds from the file's beginning."""

    start: float
    end: float


@dataclass(frozen=True)
class Source:
    """One file, or one segment of it, to convert.

    Attributes:
        name: unique in the data set and UTF-8 (see :func:`~avid_pipeline.preprocess.sources.tree.printable`), and the
            same whether the file is there or not: the path relative to the data set's folder, with forward slashes,
            or what annotations call it.
        location: where the file is; None where there is none, which ``rejection`` then explains.
        id: the data set's own name for it.
        labels: class names; none, one or many.
        segment: what to cut out of the file; None for all of it.
        subsets: named subsets it belongs to, for example ``fold1-train``.
        key_name: what the sample's key is made from; by default the name without its ending.
        path: where it is below the data set's folder, when that is not its name; only for people.
        rejection: reason and detail where the listing shows already that it cannot be converted.
    """

    name: str
    location: Path | RemoteFile | None
    id: str
    labels: tuple[str, ...] = ()
    segment: Segment | None = None
    subsets: tuple[str, ...] = ()
    key_name: str | None = None
    path: str | None = None
    rejection: tuple[Reason, str] | None = None


@dataclass(frozen=True)
class SourceList:
    """A data set before conversion.

    Attributes:
        dataset: its name.
        split: what this part of it is called.
        classes: class names; a label is a position in this list.
        sources: what to convert, in any order.
        modalities: what is converted of each source; the other stream, if there is one, is left out.
        subsets: names of the subsets that the sources may belong to.
        notes: what the user should know about the listing, one sentence each, for example how many files were left
            out because no annotation names them.
        trim: whether whole files are cut to the segments that annotations give.
    """

    dataset: str
    split: str
    classes: tuple[str, ...]
    sources: tuple[Source, ...]
    modalities: tuple[Modality, ...] = ("video", "audio")
    subsets: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    trim: bool = False
