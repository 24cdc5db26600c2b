"""Data sets of class folders with official folds: all videos once, each fold's parts as named subsets."""

import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal
from urllib.parse import quote

from avid_pipeline.preprocess.errors import PreprocessError
from avid_pipeline.preprocess.quarantine import Reason
from avid_pipeline.preprocess.sources.annotated import NO_MEDIA_ENDINGS, check_unique, ending_of, stem
from avid_pipeline.preprocess.sources.base import RemoteFile, Source, SourceList
from avid_pipeline.preprocess.sources.csv_table import BadRow, bad_row_source, count, some
from avid_pipeline.preprocess.sources.tree import SourceTree, list_tree, read_text
from avid_pipeline.shards_spec.storage import is_remote, open_storage

Part = Literal["train", "test", "unused"]


@dataclass
class Listed:
    """A video that official lists name.

    Attributes:
        path: ``<class>/<file>``.
        parts: fold to the part of it that the video belongs to.
        problem: how the lists contradict themselves about it; empty where they do not.
    """

    path: str
    parts: dict[int, Part] = field(default_factory=dict)
    problem: str = ""

    def add(self, fold: int, part: Part, where: str) -> None:
        """Put the video in a part of a fold; being told twice is no harm, being told otherwise is."""
        known = self.parts.setdefault(fold, part)
        if known != part:
            self.problem = f"{where}: is {part} of fold {fold}, but {known} elsewhere; correct the lists"


@dataclass(frozen=True)
class FoldLists:
    """What official lists say.

    Attributes:
        classes: class names in their order; empty to take the folders' sorted names.
        videos: class and file name without ending, to what is listed.
        subsets: names of the subsets whose lists are there.
        bad: sources that stand for lines that cannot be read.
        notes: what the user should know.
    """

    classes: tuple[str, ...]
    videos: Mapping[tuple[str, str], Listed]
    subsets: tuple[str, ...]
    bad: tuple[Source, ...] = ()
    notes: tuple[str, ...] = ()


def find_lists(
    root: str | os.PathLike[str],
    tree: SourceTree,
    splits: str | os.PathLike[str] | None,
    options: Mapping[str, str] | None,
    pattern: re.Pattern[str],
    folders: Sequence[str],
) -> tuple[dict[str, Path | RemoteFile], str | None]:
    """The official lists, by file name, and the folder below the root that holds them, if it is there.

    Args:
        root: path or URL of the data set.
        tree: its files.
        splits: path or URL of the lists' folder; None to look below the root, then beside it.
        options: of the object store.
        pattern: what the whole name of a list matches.
        folders: names of the folder, where it lies beside the root.

    Raises:
        PreprocessError: ``splits`` holds no list, or several folders below the root hold lists.
    """
    if splits is not None:
        given = list_tree(splits, options)
        lists = {name: place for name, place in given.files.items() if pattern.fullmatch(name)}
        if not lists:
            raise PreprocessError(
                f"{given.root}: holds no official list such as {_example(pattern)}; give the folder that does"
            )
        return lists, _inside(tree, next(iter(lists.values())))
    below: dict[str, dict[str, Path | RemoteFile]] = defaultdict(dict)
    for name, place in tree.files.items():
        folder, _, file = name.rpartition("/")
        if pattern.fullmatch(file):
            below[folder][file] = place
    if len(below) > 1:
        shown = ", ".join(repr(folder or ".") for folder in sorted(below))
        raise PreprocessError(f"{tree.root}: {shown} hold official lists; say which with --splits")
    if below:
        folder, lists = below.popitem()
        return lists, folder
    for candidate in _beside(os.fspath(root), folders):
        lists = {name: place for name, place in _files_if_there(candidate, options).items() if pattern.fullmatch(name)}
        if lists:
            return lists, None
    return {}, None


def read_lines(location: Path | RemoteFile, options: Mapping[str, str] | None) -> list[tuple[int, str]]:
    """The lines of a list that are not empty, with their numbers from 1."""
    text = read_text(address(location), options)
    return [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def bad_line(file: str, line: int, problem: str) -> Source:
    """What stands in the listing for a line that cannot be read."""
    return bad_row_source(BadRow(line, problem), file)


def folds_listing(dataset: str, tree: SourceTree, lists_folder: str | None, lists: FoldLists | None) -> SourceList:
    """All videos of class folders once, with the subsets that the lists name.

    A video's class is the folder it lies in; its name is the lists' ``<class>/<file>`` where they name it. Listed
    videos that are missing become rejected sources; videos that no list names are in no subset, and noted.

    Args:
        dataset: its name.
        tree: all files.
        lists_folder: the folder of the lists below the root, whose files are no videos.
        lists: what the lists say; None where there are none.
    """
    notes = list(lists.notes if lists else ("No official lists found, so there are no subsets; give --splits.",))
    files = _videos(tree, lists_folder, notes)
    official = lists.classes if lists else ()
    classes = official or tuple(sorted({folder for folder, _ in files} - {""}))
    listed = lists.videos if lists else {}
    sources = [_source(tree, name, key, listed.get(key), classes, bool(official)) for key, name in files.items()]
    unlisted = [name for key, name in files.items() if key not in listed]
    if lists and unlisted:
        notes.append(f"{count(len(unlisted), 'video')} in no list, so in no subset: {some(unlisted)}.")
    sources += [_missing(video) for key, video in listed.items() if key not in files]
    sources += lists.bad if lists else ()
    subsets = lists.subsets if lists else ()
    return SourceList(dataset, "all", classes, check_unique(sources), ("video",), subsets, tuple(notes))


def _videos(tree: SourceTree, lists_folder: str | None, notes: list[str]) -> dict[tuple[str, str], str]:
    """Class and name without ending, to the file; what is no video by its name, or there twice, is noted."""
    files: dict[tuple[str, str], str] = {}
    others: list[str] = []
    repeated: list[str] = []
    for name in tree.files:
        if ending_of(name) in NO_MEDIA_ENDINGS:
            if name.rpartition("/")[0] != lists_folder:
                others.append(name)
        elif files.setdefault((PurePosixPath(name).parent.name, stem(name)), name) != name:
            repeated.append(name)
    if others:
        notes.append(f"{count(len(others), 'file')} left out, for their names say they are no videos: {some(others)}.")
    if repeated:
        notes.append(f"{count(len(repeated), 'file')} left out, for the same video stands before: {some(repeated)}.")
    return files


def _source(
    tree: SourceTree,
    name: str,
    key: tuple[str, str],
    video: Listed | None,
    classes: Sequence[str],
    official: bool,
) -> Source:
    rejection: tuple[Reason, str] | None = None
    if key[0] not in classes:
        expected = "a class of the official lists" if official else "a class"
        rejection = ("no_class_folder", f"expected the file in a folder named like {expected}; move or remove it")
    elif video and video.problem:
        rejection = ("bad_annotation", video.problem)
    labels = (key[0],) if key[0] in classes else ()
    location = tree.files[name]
    if video is None or video.path == name:
        return Source(name, location, key[1], labels, subsets=_subsets(video), rejection=rejection)
    return Source(video.path, location, key[1], labels, subsets=_subsets(video), path=name, rejection=rejection)


def _missing(video: Listed) -> Source:
    labels = (video.path.split("/", 1)[0],)
    rejection: tuple[Reason, str] = (
        "source_not_found",
        f"the official lists name {video.path}, but there is no such file",
    )
    if video.problem:
        rejection = ("bad_annotation", video.problem)
    return Source(video.path, None, stem(video.path), labels, subsets=_subsets(video), rejection=rejection)


def _subsets(video: Listed | None) -> tuple[str, ...]:
    if video is None or video.problem:
        return ()
    return tuple(f"fold{fold}-{part}" for fold, part in sorted(video.parts.items()) if part != "unused")


def _inside(tree: SourceTree, place: Path | RemoteFile) -> str | None:
    for name, location in tree.files.items():
        if location == place or str(location) == str(place):
            return name.rpartition("/")[0]
    return None


def _beside(root: str, folders: Sequence[str]) -> list[str]:
    if not is_remote(root):
        parent = Path(root.removeprefix("file://")).expanduser().absolute().parent
        return [str(parent / folder) for folder in folders]
    scheme, _, rest = root.rstrip("/").partition("://")
    parent_url, slash, _ = rest.rpartition("/")
    return [f"{scheme}://{parent_url}/{folder}" for folder in folders] if slash else []


def _files_if_there(folder: str, options: Mapping[str, str] | None) -> dict[str, Path | RemoteFile]:
    if not is_remote(folder):
        path = Path(folder)
        return {entry.name: entry for entry in sorted(path.iterdir())} if path.is_dir() else {}
    return {name: RemoteFile(folder, name) for name in open_storage(folder, options=options).names()}


def address(location: Path | RemoteFile) -> str | Path:
    """A location as :func:`read_text` takes it: names in web addresses are percent-encoded."""
    if isinstance(location, RemoteFile) and location.root.startswith(("http://", "https://")):
        return f"{location.root.rstrip('/')}/{quote(location.path)}"
    return location if isinstance(location, Path) else str(location)


def _example(pattern: re.Pattern[str]) -> str:
    return pattern.pattern.replace("\\", "")
