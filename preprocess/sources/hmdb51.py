"""HMDB51: ``<class>/….avi`` and the official lists of three folds."""

import os
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

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

_LIST_NAME = re.compile(r"(?P<folder>.+)_test_split(?P<fold>[0-9]{1,4})\.txt")
_FOLDERS = ("testTrainMulti_7030_splits", "test_train_splits/testTrainMulti_7030_splits", "splits")
_LINE = re.compile(r"(?P<file>[^/]+?)\s+(?P<part>[012])")
_PARTS: dict[str, Part] = {"0": "unused", "1": "train", "2": "test"}


def list_hmdb51(
    root: str | os.PathLike[str],
    splits: str | os.PathLike[str] | None = None,
    options: Mapping[str, str] | None = None,
) -> SourceList:
    """List all videos once, with subsets ``fold1-train``, ``fold1-test`` and so on for the lists that are there.

    Args:
        root: path or URL of the folder that holds the class folders, at any depth.
        splits: path or URL of the folder of the official lists ``<class>_test_split<n>.txt``; by default the one
            below the root or beside it.
        options: of the object store.

    Raises:
        PreprocessError: a folder does not exist or is empty, or ``splits`` holds no lists.
        StorageError: the object store cannot be read.
    """
    tree = list_tree(root, options)
    found, folder = find_lists(root, tree, splits, options, _LIST_NAME, _FOLDERS)
    return folds_listing("hmdb51", tree, folder, _read_lists(found, options) if found else None)


def _read_lists(found: Mapping[str, Path | RemoteFile], options: Mapping[str, str] | None) -> FoldLists:
    videos: dict[tuple[str, str], Listed] = {}
    bad: list[Source] = []
    folds: dict[int, set[str]] = defaultdict(set)
    for name in sorted(found):
        parts = _LIST_NAME.fullmatch(name)
        assert parts is not None
        fold = int(parts["fold"])
        folds[fold].add(parts["folder"])
        for number, line in read_lines(found[name], options):
            problem = add_line(videos, line, parts["folder"], fold, f"{name} line {number}")
            if problem:
                bad.append(bad_line(name, number, problem))
    classes = tuple(sorted(set().union(*folds.values())))
    subsets = tuple(f"fold{fold}-{part}" for fold in sorted(folds) for part in ("train", "test"))
    notes = tuple(
        f"Fold {fold} lacks the lists of {len(classes) - len(named)} of {len(classes)} classes."
        for fold, named in sorted(folds.items())
        if len(named) < len(classes)
    )
    return FoldLists(classes, videos, subsets, tuple(bad), notes)


def add_line(videos: dict[tuple[str, str], Listed], line: str, folder: str, fold: int, where: str) -> str | None:
    """Take in a line ``<file> 0|1|2`` of a list; gives what is wrong with it, or None.

    Args:
        videos: what was listed before, to which the line adds.
        line: 0 is unused, 1 training, 2 test.
        folder: the list's class.
        fold: the list's fold.
        where: list and line, for messages.
    """
    found = _LINE.fullmatch(line)
    if not found:
        return f"expected '<file> 0, 1 or 2', found {line[:80]!r}"
    video = videos.setdefault((folder, stem(found["file"])), Listed(f"{folder}/{found['file']}"))
    video.add(fold, _PARTS[found["part"]], where)
    return None
