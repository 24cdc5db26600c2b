"""UCF101: ``<class>/v_….avi`` and the official lists of three folds."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from avid_pipeline.preprocess.errors import PreprocessError
from avid_pipeline.preprocess.sources.annotated import stem
from avid_pipeline.preprocess.sources.base import RemoteFile, Source, SourceList
from avid_pipeline.preprocess.sources.folds import (
    FoldLists,
    Listed,
    Part,
    bad_line,
    find_lists,
    folds_listing,
    read_lines,
)
from avid_pipeline.preprocess.sources.tree import list_tree

_CLASSES = "classInd.txt"
_LIST_NAME = re.compile(r"classInd\.txt|(?P<part>train|test)list(?P<fold>[0-9]{1,4})\.txt")
_FOLDERS = ("ucfTrainTestlist", "splits", "UCF101TrainTestSplits-RecognitionTask/ucfTrainTestlist")
_LINE = re.compile(r"(?P<folder>[^/]+)/(?P<file>[^/]+?)(?:\s+(?P<number>[0-9]{1,6}))?")


def list_ucf101(
    root: str | os.PathLike[str],
    splits: str | os.PathLike[str] | None = None,
    options: Mapping[str, str] | None = None,
) -> SourceList:
    """List all videos once, with subsets ``fold1-train``, ``fold1-test`` and so on for the lists that are there.

    Args:
        root: path or URL of the folder that holds the class folders, at any depth.
        splits: path or URL of the folder of the official lists: ``classInd.txt`` and ``trainlist01.txt`` etc.; by
            default the one below the root or beside it.
        options: of the object store.

    Raises:
        PreprocessError: a folder does not exist or is empty, ``splits`` holds no lists, or ``classInd.txt`` is
            damaged.
        StorageError: the object store cannot be read.
    """
    tree = list_tree(root, options)
    found, folder = find_lists(root, tree, splits, options, _LIST_NAME, _FOLDERS)
    return folds_listing("ucf101", tree, folder, _read_lists(found, options) if found else None)


def _read_lists(found: Mapping[str, Path | RemoteFile], options: Mapping[str, str] | None) -> FoldLists:
    notes: tuple[str, ...] = ()
    if _CLASSES in found:
        classes = parse_class_numbers(read_lines(found[_CLASSES], options))
    else:
        classes = ()
        notes = (f"No {_CLASSES} beside the lists, so classes are the folders in alphabetical order.",)
    videos: dict[tuple[str, str], Listed] = {}
    bad: list[Source] = []
    subsets: list[str] = []
    for name in sorted(found, key=lambda file: (file[-6:], file.startswith("test"))):
        parts = _LIST_NAME.fullmatch(name)
        if parts is None or not parts["part"]:
            continue
        fold, part = int(parts["fold"]), cast(Part, parts["part"])
        subsets.append(f"fold{fold}-{part}")
        for number, line in read_lines(found[name], options):
            problem = add_line(videos, line, fold, part, f"{name} line {number}", classes)
            if problem:
                bad.append(bad_line(name, number, problem))
    return FoldLists(classes, videos, tuple(subsets), tuple(bad), notes)


def parse_class_numbers(lines: list[tuple[int, str]]) -> tuple[str, ...]:
    """The class names of ``classInd.txt`` in the order of their numbers.

    Args:
        lines: number and text of the file's lines.

    Raises:
        PreprocessError: a line is not ``<number> <class>``, or the numbers are not 1, 2, 3 and so on.
    """
    names: dict[int, str] = {}
    for number, line in lines:
        parts = line.split(None, 1)
        if len(parts) != 2 or not re.fullmatch(r"[0-9]{1,6}", parts[0]):
            raise PreprocessError(f"{_CLASSES}: line {number}: expected '<number> <class>', found {line[:60]!r}")
        if int(parts[0]) in names or parts[1] in names.values():
            raise PreprocessError(f"{_CLASSES}: line {number}: {line[:60]!r} is there twice; remove one")
        names[int(parts[0])] = parts[1]
    if sorted(names) != list(range(1, len(names) + 1)) or not names:
        raise PreprocessError(f"{_CLASSES}: expected class numbers 1, 2, 3, …, found {sorted(names)[:10]}; correct it")
    return tuple(names[number] for number in sorted(names))


def add_line(
    videos: dict[tuple[str, str], Listed], line: str, fold: int, part: Part, where: str, classes: tuple[str, ...]
) -> str | None:
    """Take in a line of a list; gives what is wrong with it, or None.

    Args:
        videos: what was listed before, to which the line adds.
        line: ``<class>/<file>``, in training lists with the class number behind it.
        fold: the list's fold.
        part: the list's part of it.
        where: list and line, for messages.
        classes: in the order of their numbers; empty where they are not known.
    """
    found = _LINE.fullmatch(line)
    if not found:
        return f"expected '<class>/<file> [<number>]', found {line[:80]!r}"
    folder, file, number = found["folder"], found["file"], found["number"]
    if classes and folder not in classes:
        return f"{folder[:60]!r} is no class of {_CLASSES}"
    video = videos.setdefault((folder, stem(file)), Listed(f"{folder}/{file}"))
    video.add(fold, part, where)
    if classes and number and classes.index(folder) + 1 != int(number):
        video.problem = f"{where}: class number {number} is not that of {folder} ({classes.index(folder) + 1})"
    return None
