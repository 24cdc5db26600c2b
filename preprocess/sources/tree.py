"""A folder of source files, on disk or in an object store, and the tables that lie beside it."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from avid_pipeline.preprocess.errors import PreprocessError
from avid_pipeline.preprocess.sources.base import RemoteFile
from avid_pipeline.shards_spec.storage import is_remote, open_storage, split_url


@dataclass(frozen=True)
class SourceTree:
    """All files below a root.

    Attributes:
        root: the root as the user gave it, for messages.
        files: relative name, with forward slashes and printable, to where the file is; sorted by name.
    """

    root: str
    files: dict[str, Path | RemoteFile]

    @property
    def folders(self) -> set[str]:
        """The names of the root's own folders."""
        return {name.split("/", 1)[0] for name in self.files if "/" in name}


def list_tree(root: str | os.PathLike[str], options: Mapping[str, str] | None = None) -> SourceTree:
    """List the files below a local folder or an object store's prefix.

    Args:
        root: a path or URL.
        options: of the object store, as :func:`~avid_pipeline.shards_spec.storage.open_storage` takes them.

    Raises:
        PreprocessError: the folder does not exist, holds no file, or cannot be read.
        StorageError: the object store cannot be listed.
    """
    text = os.fspath(root)
    if is_remote(text):
        storage = open_storage(text, options=options)
        files: dict[str, Path | RemoteFile] = {name: RemoteFile(text, name) for name in storage.names()}
    else:
        folder = Path(text.removeprefix("file://")).expanduser().absolute()
        files = {printable(name): folder / name for name in files_below(folder)}
    if not files:
        raise PreprocessError(f"{printable(text)}: holds no files; give the folder that holds the data set")
    return SourceTree(printable(text), dict(sorted(files.items())))


def read_text(location: str | os.PathLike[str], options: Mapping[str, str] | None = None) -> str:
    """A small UTF-8 text file, for example a table of annotations, from a path or URL.

    Raises:
        PreprocessError: it does not exist, cannot be read or is not UTF-8.
        StorageError: the same, in an object store.
    """
    text = os.fspath(location)
    if is_remote(text):
        root, name = split_url(text)
        data = open_storage(root, options=options).read(name)
    else:
        try:
            data = Path(text.removeprefix("file://")).expanduser().read_bytes()
        except OSError as error:
            raise PreprocessError(
                f"{printable(text)}: cannot read it: {error.strerror}; give a readable file"
            ) from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PreprocessError(f"{printable(text)}: is not UTF-8 at byte {error.start}; save it as UTF-8") from error


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
