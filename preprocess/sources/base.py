"""What every data set source gives: a sorted list of files with ids and class names."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from avid_pipeline.preprocess.errors import PreprocessError


@dataclass(frozen=True)
class Source:
    """One file to convert.

    Attributes:
        name: path relative to the data set's folder, with forward slashes; unique, and UTF-8 whatever the file
            system holds (see :func:`printable`).
        path: where the file is.
        id: the data set's own name for it.
        labels: class names; none, one or many.
        has_place: False when the file lies where the data set's layout has no videos; it is then quarantined.
    """

    name: str
    path: Path
    id: str
    labels: tuple[str, ...]
    has_place: bool = True


@dataclass(frozen=True)
class SourceList:
    """A data set before conversion: its name and split, its class names, and its sources sorted by name."""

    dataset: str
    split: str
    classes: tuple[str, ...]
    sources: tuple[Source, ...]


def files_below(root: Path) -> Iterator[str]:
    """Relative names, with forward slashes, of all files below a folder; links are followed, once each.

    Raises:
        PreprocessError: the folder does not exist, or a folder below it cannot be read.
    """
    if not root.is_dir():
        problem = "is a file, not a folder" if root.exists() else "does not exist"
        raise PreprocessError(f"{root}: {problem}; give the folder that holds the data set")
    visited: set[str] = set()
    for folder, folders, files in os.walk(root, onerror=_refuse, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders.sort()
        relative = Path(folder).relative_to(root)
        yield from ((relative / name).as_posix() for name in sorted(files))


def printable(name: str) -> str:
    """A file name as text that JSON can hold: bytes that are not UTF-8 become hexadecimal escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _refuse(error: OSError) -> None:
    raise PreprocessError(f"{error.filename}: cannot read this folder: {error.strerror}; make it readable") from error
