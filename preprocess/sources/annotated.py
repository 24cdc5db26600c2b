"""Data sets whose annotations name clips of YouTube videos: which file is which row's."""

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from avid_pipeline.preprocess.errors import PreprocessError
from avid_pipeline.preprocess.sources.base import Segment, Source
from avid_pipeline.preprocess.sources.csv_table import count, seconds, some
from avid_pipeline.preprocess.sources.tree import SourceTree
from avid_pipeline.shards_spec.storage import is_remote

_AUDIO = {".aac", ".flac", ".m4a", ".mp3", ".ogg", ".opus", ".wav"}
_NO_MEDIA = (
    ".csv .description .gif .gz .html .ini .jpeg .jpg .json .jsonl .log .lrc .md .md5 .npy .npz .part .pdf .pkl .png "
    ".py .rar .sha256 .sh .srt .tar .tsv .txt .vtt .webp .xml .yaml .yml .ytdl .zip"
)
NO_MEDIA_ENDINGS = frozenset(_NO_MEDIA.split())


@dataclass(frozen=True, slots=True)
class Annotation:
    """A clip of a video, as a row of the annotations has it.

    Attributes:
        line: the row's line, from 1.
        id: of the video.
        start: of the clip in the video, in milliseconds.
        end: of the clip in the video, in milliseconds.
        labels: class names.
    """

    line: int
    id: str
    start: int
    end: int
    labels: tuple[str, ...]

    @property
    def name(self) -> str:
        """Names the clip: ``<id>#t=<start>,<end>``."""
        return f"{self.id}{self.fragment}"

    @property
    def fragment(self) -> str:
        """Names the clip within the video: ``#t=<start>,<end>`` in seconds."""
        return f"#t={seconds(self.start / 1000)},{seconds(self.end / 1000)}"


@dataclass(frozen=True, slots=True)
class Reading:
    """One way to read a file's name.

    Attributes:
        id: of the video.
        start: of the clip, in milliseconds; None where the name does not say.
        end: of the clip, in milliseconds; None where the name does not say.
        cut: whether files of such names hold the clip alone, and not the whole video.
    """

    id: str
    start: int | None
    end: int | None
    cut: bool


@dataclass(frozen=True, slots=True)
class _Match:
    rank: tuple[int, int, str]
    name: str
    cut: bool


def annotated_sources(
    tree: SourceTree,
    annotations: Sequence[Annotation],
    readings: Callable[[str], Iterable[Reading]],
    key_name: Callable[[Annotation], str],
    *,
    trim: bool,
    table: str | os.PathLike[str],
) -> tuple[tuple[Source, ...], tuple[str, ...]]:
    """Sources for annotated clips, and notes.

    A source's name is its clip's, ``<id>#t=<start>,<end>``. Equal rows are merged. Rows with the same clip and other
    labels, rows without a file, and further clips of a file that is taken whole become rejected sources.

    Args:
        tree: the files.
        annotations: the clips wanted.
        readings: all ways to read a file name without its ending.
        key_name: what a clip's key is made from.
        trim: whether to cut clips out of files that hold the whole video.
        table: where the annotations are, so that they are not counted as a file left over.
    """
    notes: list[str] = []
    clips, rejected = _merge(annotations, key_name, notes)
    matches, unused = _match(tree, clips, readings)
    sources: list[Source] = []
    first_users: dict[str, Annotation] = {}
    surplus: set[str] = set()
    cut_already = 0
    for place, clip in enumerate(clips):
        found = sorted(matches.get(place, ()), key=lambda match: match.rank)
        segment = Segment(clip.start / 1000, clip.end / 1000) if trim and not (found and found[0].cut) else None
        source = Source(clip.name, None, clip.id, clip.labels, segment, key_name=key_name(clip))
        if not found:
            detail = f"line {clip.line} names {clip.name}, but there is no file of it"
            sources.append(replace(source, rejection=("source_not_found", detail)))
            continue
        file = found[0].name
        user = first_users.setdefault(file, clip)
        if user is clip or segment:
            sources.append(replace(source, location=tree.files[file], path=file))
            cut_already += trim and found[0].cut
        else:
            sources.append(replace(source, rejection=("bad_annotation", _shared(file, user, clip))))
        surplus.update(match.name for match in found[1:])
    surplus -= first_users.keys()
    unused = [name for name in unused if not _is_table(tree, name, table)]
    if cut_already:
        notes.append(f"{count(cut_already, 'file')} not cut, for their names say that they hold the clip alone.")
    if surplus:
        listed = some(sorted(surplus))
        notes.append(f"{count(len(surplus), 'file')} left out, for another file of the same clip is used: {listed}.")
    if unused:
        notes.append(f"{count(len(unused), 'file')} left out, for no row names them: {some(unused)}.")
    return tuple(sources + rejected), tuple(notes)


def stem(name: str) -> str:
    """A file's name without folders and ending."""
    return _split_ending(name)[0]


def ending_of(name: str) -> str:
    """A file's ending in small letters, with its dot; empty where there is none."""
    return _split_ending(name)[1].lower()


def _split_ending(name: str) -> tuple[str, str]:
    # pathlib says the same, ten times slower; data sets have millions of files.
    file = name.rpartition("/")[2]
    dot = file.rfind(".")
    return (file[:dot], file[dot:]) if 0 < dot < len(file) - 1 else (file, "")


def check_unique(sources: Iterable[Source]) -> tuple[Source, ...]:
    """The sources, whose names must differ.

    Raises:
        PreprocessError: two names are equal.
    """
    seen: set[str] = set()
    listed = tuple(sources)
    for source in listed:
        if source.name in seen:
            raise PreprocessError(f"{source.name}: two sources have this name; rename or remove one")
        seen.add(source.name)
    return listed


def _merge(
    annotations: Sequence[Annotation], key_name: Callable[[Annotation], str], notes: list[str]
) -> tuple[list[Annotation], list[Source]]:
    rows: dict[tuple[str, int, int], list[Annotation]] = defaultdict(list)
    for annotation in annotations:
        rows[annotation.id, annotation.start, annotation.end].append(annotation)
    clips: list[Annotation] = []
    rejected: list[Source] = []
    repeated = 0
    for same in rows.values():
        if any(set(row.labels) != set(same[0].labels) for row in same):
            rejected.append(_contradiction(same, key_name))
        else:
            clips.append(same[0])
            repeated += len(same) - 1
    if repeated:
        notes.append(f"{count(repeated, 'row')} left out, for equal rows stand before them.")
    return clips, rejected


def _match(
    tree: SourceTree, clips: Sequence[Annotation], readings: Callable[[str], Iterable[Reading]]
) -> tuple[dict[int, list[_Match]], list[str]]:
    places: dict[str, list[int]] = defaultdict(list)
    for place, clip in enumerate(clips):
        places[clip.id].append(place)
    matches: dict[int, list[_Match]] = defaultdict(list)
    unused: list[str] = []
    for name in tree.files:
        rank = _ending_rank(name)
        found: dict[int, _Match] = {}
        for reading in readings(stem(name)):
            for place in places.get(reading.id, ()):
                clip = clips[place]
                if reading.start in (None, clip.start) and reading.end in (None, clip.end):
                    vague = (reading.start is None) + (reading.end is None)
                    found.setdefault(place, _Match((rank, vague, name), name, reading.cut))
        for place, match in found.items():
            matches[place].append(match)
        if not found:
            unused.append(name)
    return matches, unused


def _ending_rank(name: str) -> int:
    ending = ending_of(name)
    return 2 if ending in NO_MEDIA_ENDINGS else 1 if ending in _AUDIO else 0


def _shared(file: str, user: Annotation, clip: Annotation) -> str:
    return (
        f"line {clip.line} names {clip.name}, but {file} is taken whole for line {user.line}; "
        "cut whole videos with --trim, or give one file for each clip"
    )


def _contradiction(rows: Sequence[Annotation], key_name: Callable[[Annotation], str]) -> Source:
    found = "; ".join(f"line {row.line}: {', '.join(row.labels) or 'no label'}" for row in rows[:5])
    detail = f"rows contradict each other: {found}; keep the right one"
    clip = rows[0]
    return Source(clip.name, None, clip.id, key_name=key_name(clip), rejection=("bad_annotation", detail))


def _is_table(tree: SourceTree, name: str, table: str | os.PathLike[str]) -> bool:
    text = os.fspath(table)
    location = tree.files[name]
    if isinstance(location, Path) and not is_remote(text):
        return location == Path(text.removeprefix("file://")).expanduser().absolute()
    return str(location) == text
