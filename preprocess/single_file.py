"""One file becomes one sample in memory: what avid-preprocess would put into a shard."""

import math
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import get_args

from avid_pipeline.preprocess.convert import Converted, convert
from avid_pipeline.preprocess.errors import PreprocessError
from avid_pipeline.preprocess.fetch import Fetcher
from avid_pipeline.preprocess.job import plan_tasks
from avid_pipeline.preprocess.probe import probe
from avid_pipeline.preprocess.quarantine import Reason, SourceRejectedError
from avid_pipeline.preprocess.settings import Limits, Settings
from avid_pipeline.preprocess.sources.annotated import stem
from avid_pipeline.preprocess.sources.base import RemoteFile, Segment, Source, SourceList
from avid_pipeline.preprocess.sources.csv_table import RowError, seconds
from avid_pipeline.preprocess.sources.folder import locate
from avid_pipeline.preprocess.sources.tree import printable
from avid_pipeline.shards_spec.errors import StorageError
from avid_pipeline.shards_spec.manifest import Modality, Parameters
from avid_pipeline.shards_spec.sample import SPECTROGRAM_MEMBER, VIDEO_MEMBER, Sample
from avid_pipeline.shards_spec.storage import is_remote

__all__ = ["Limits", "read_media"]

_REMEDIES: dict[Reason, str] = {
    "source_not_found": "check its name",
    "limit_exceeded": "give limits=Limits(…) that allow it",
    "timeout": "give it more seconds with timeout=",
    "no_video_stream": "ask for its sound alone, or give another file",
    "no_audio_stream": "ask for its picture alone, or give another file",
}


def read_media(
    path_or_url: str | os.PathLike[str],
    parameters: Parameters | None = None,
    *,
    modalities: tuple[Modality, ...] | None = None,
    segment: tuple[float, float] | None = None,
    options: Mapping[str, str] | None = None,
    limits: Limits | None = None,
    timeout: float = Settings.timeout,
) -> Sample:
    """Convert a video or sound file into the sample that ``avid-preprocess folder`` would have put into a shard.

    The same conversion with the same parameters gives the same bytes. It needs room for the file's converted picture
    in the temporary folder, and for the whole sample in memory.

    Args:
        path_or_url: the file, on disk, in an object store or behind http(s).
        parameters: how picture and sound are stored; give those of a data set, ``reader.manifest.parameters``, for
            samples like its own. By default those of ``avid-preprocess`` without options.
        modalities: what is converted; None for what the file has. What is named here must be there.
        segment: start and end, in seconds from the file's beginning, of the part to convert; None for all of it.
        options: of the object store, as :func:`~avid_pipeline.shards_spec.storage.open_storage` takes them.
        limits: what the file may cost.
        timeout: seconds that its conversion may take.

    Returns:
        The sample, without labels: ``video`` is an mp4 file and ``spectrogram`` an ``.npy`` file [frames, 257], as
        bytes; None for what the file lacks or was not asked for.

    Raises:
        PreprocessError: the file cannot be used, or an argument is wrong; the message names the file and says why.
        StorageError: it lies at no URL that can be read, or the temporary folder cannot be written.
    """
    text = os.fspath(path_or_url)
    where = printable(text)
    parameters = parameters or Parameters()
    location = _location(text, where)
    part = _segment(segment, parameters, where)
    if unknown := sorted(set(modalities or ()) - set(get_args(Modality))):
        raise PreprocessError(f"{where}: modalities: expected video, audio or both, found {', '.join(unknown)}")
    limits = limits or Limits()
    fetcher = Fetcher(options or {}, limits)
    try:
        with _temporary_folder() as folder:
            file = location if isinstance(location, Path) else fetcher.fetch(location, folder).path
            found = modalities or _modalities(file, limits, timeout)
            settings = Settings(found, "quarantine" if modalities else "keep", limits, timeout)
            source = _source(location, file, part)
            work = folder / "sample"
            work.mkdir()
            (task,) = plan_tasks(SourceList("file", "", (), (source,), found), parameters, "", settings)
            return _sample(convert(task.sources[0], parameters, settings, fetcher, work))
    except SourceRejectedError as error:
        if isinstance(error.__cause__, StorageError):
            raise StorageError(error.detail) from error
        # The details name the options of the command line.
        detail = re.sub(r" \(--[a-z-]+\)", "", error.detail)
        remedy = _REMEDIES.get(error.reason, "see whether ffmpeg plays it, or give another file")
        raise PreprocessError(f"{where}: cannot be used ({error.reason}): {detail}; {remedy}") from error


def _segment(segment: tuple[float, float] | None, parameters: Parameters, where: str) -> Segment | None:
    if segment is None:
        return None
    start, end = segment
    if not 0 <= start < end < math.inf:
        raise PreprocessError(
            f"{where}: segment: expected (start, end) in seconds with 0 <= start < end, found {segment}"
        )
    if parameters.video.codec == "copy":
        raise PreprocessError(
            f"{where}: segment: codec copy cannot cut segments out; give parameters with another codec, or no segment"
        )
    return Segment(round(start, 6), round(end, 6))


def _location(text: str, where: str) -> Path | RemoteFile:
    if not is_remote(text):
        return Path(text.removeprefix("file://")).expanduser().absolute()
    try:
        return locate(text, "")[1]
    except RowError as error:
        raise PreprocessError(f"{where}: {error}") from error


def _modalities(file: Path, limits: Limits, timeout: float) -> tuple[Modality, ...]:
    """What a file has."""
    found = probe(file, limits, timeout)
    video: tuple[Modality, ...] = ("video",) if found.video is not None else ()
    audio: tuple[Modality, ...] = ("audio",) if found.audio is not None else ()
    if not video and not audio:
        raise SourceRejectedError("unreadable", "it has neither picture nor sound that can be decoded")
    return video + audio


def _source(location: Path | RemoteFile, file: Path, segment: Segment | None) -> Source:
    """The source that a listing of the file's own folder would have."""
    name = location.name if isinstance(location, Path) else location.path.rpartition("/")[2]
    name = printable(name)
    identifier = stem(name)
    if segment is not None:
        name += f"#t={seconds(segment.start)},{seconds(segment.end)}"
    return Source(name, file, identifier, segment=segment)


def _sample(converted: Converted) -> Sample:
    members = {name: path.read_bytes() for name, path in converted.files.items()}
    return Sample(converted.record, members.get(VIDEO_MEMBER), members.get(SPECTROGRAM_MEMBER))


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    try:
        with tempfile.TemporaryDirectory(prefix="avid-pipeline-") as folder:
            yield Path(folder)
    except OSError as error:
        raise StorageError(
            f"{tempfile.gettempdir()}: cannot write: {error.strerror}; make room or permit it, or set TMPDIR"
        ) from error
