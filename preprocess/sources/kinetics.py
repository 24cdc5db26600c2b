"""Kinetics as class folders: ``SRC/<class name>/<id>….mp4``."""

from pathlib import Path

from avid_pipeline.preprocess.errors import PreprocessError
from avid_pipeline.preprocess.sources.base import Source, SourceList, files_below, printable

_SPLIT_FOLDERS = {"train", "val", "validate", "validation", "test"}


def list_kinetics(root: Path, split: str = "train") -> SourceList:
    """List a tree of class folders.

    Every file is listed, whatever its name: what is no video is quarantined later, with its reason, rather than
    passed over here. Files outside a class folder are listed without a place.

    Args:
        root: the folder that holds the class folders.
        split: what this part of the data set is called.

    Raises:
        PreprocessError: the folder does not exist, is empty, or holds splits instead of classes.
    """
    paths = {printable(name): root / name for name in files_below(root)}
    names = sorted(paths)
    folders = {name.split("/", 1)[0] for name in names if "/" in name}
    if folders and folders <= _SPLIT_FOLDERS:
        example = root / sorted(folders)[0]
        raise PreprocessError(f"{root}: holds splits ({', '.join(sorted(folders))}), not classes; give {example}")
    if not names:
        raise PreprocessError(f"{root}: holds no files; expected <class name>/<id>.mp4 below it")
    sources = tuple(
        Source(
            name=name,
            path=paths[name],
            id=Path(name).stem,
            labels=(name.split("/", 1)[0],) if "/" in name else (),
            has_place="/" in name,
        )
        for name in names
    )
    return SourceList("kinetics", split, tuple(sorted(folders)), sources)
