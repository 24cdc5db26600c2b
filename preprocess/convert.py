"""One source becomes one sample."""

from dataclasses import dataclass, replace
from pathlib import Path

import av

from avid_pipeline.preprocess.fetch import Fetcher, LocalCopy
from avid_pipeline.preprocess.probe import AudioStream, Probe, VideoStream, probe
from avid_pipeline.preprocess.quarantine import SourceRejectedError
from avid_pipeline.preprocess.settings import Settings
from avid_pipeline.preprocess.sources.base import Segment, Source
from avid_pipeline.preprocess.spectrogram_file import write_spectrogram
from avid_pipeline.preprocess.transcode import Transcoder
from avid_pipeline.shards_spec.manifest import Parameters
from avid_pipeline.shards_spec.sample import (
    SPECTROGRAM_MEMBER,
    VIDEO_MEMBER,
    AudioRecord,
    OriginalRecord,
    SampleRecord,
    VideoRecord,
)
from avid_pipeline.shards_spec.spectrogram import SpectrogramRecipe, spectrogram_blocks

# A stream that decodes to less than this share of its stated duration is damaged, even if ffmpeg does not say so.
_LEAST_SHARE_DECODED = 0.5
# The same where ffmpeg complained; the allowance is for clips so short that a frame is a large share.
_LEAST_SHARE_AFTER_COMPLAINTS = 0.95
_ALLOWANCE_SECONDS = 0.1


@dataclass(frozen=True)
class Converted:
    """A sample whose video and spectrogram lie in files: its record, and member name to file."""

    record: SampleRecord
    files: dict[str, Path]


@dataclass(frozen=True)
class PlannedSource:
    """A source with what the plan of the data set gave it: its sample's key and the positions of its labels."""

    source: Source
    key: str
    labels: tuple[int, ...]


def convert(
    planned: PlannedSource, parameters: Parameters, settings: Settings, fetcher: Fetcher, folder: Path
) -> Converted:
    """Convert a source.

    Args:
        planned: what to convert.
        parameters: how to store it.
        settings: which streams, and what it may cost.
        fetcher: brings the file.
        folder: where the sample's files are written; it must be empty.

    Raises:
        SourceRejectedError: it cannot become a sample; the reason says why.
        PreprocessError: converting failed for a reason that lies not in the source.
    """
    source = planned.source
    if source.rejection is not None or source.location is None:
        raise SourceRejectedError(*(source.rejection or ("source_not_found", "it has no file")))
    file = fetcher.fetch(source.location, folder)
    found = _select(probe(file.path, settings.limits, settings.timeout), settings)
    _check_segment(found, source.segment)
    video_file, spectrogram_file = folder / VIDEO_MEMBER, folder / SPECTROGRAM_MEMBER
    transcoder = Transcoder(file.path, found, source.segment, parameters, settings, video_file)
    recipe = SpectrogramRecipe(parameters.audio.sample_rate, parameters.audio.frames_per_second)
    blocks = spectrogram_blocks(transcoder.sound(), recipe)
    frames = write_spectrogram(spectrogram_file, blocks, parameters.audio.storage)
    if found.audio is not None and frames == 0:
        if found.video is None or settings.missing_audio == "quarantine":
            raise SourceRejectedError("too_short", "the sound is shorter than one spectrogram frame")
        found = replace(found, audio=None)
    record = _record(planned, file, found, _stored_video(video_file, found, parameters), frames, parameters)
    _check_lengths(found, record, settings, source.segment, transcoder.complaints)
    files = {VIDEO_MEMBER: video_file} if found.video is not None else {}
    if found.audio is not None:
        files[SPECTROGRAM_MEMBER] = spectrogram_file
    return Converted(record, files)


def _select(found: Probe, settings: Settings) -> Probe:
    """The streams to convert."""
    video = found.video if "video" in settings.modalities else None
    audio = found.audio if "audio" in settings.modalities else None
    if video is None and "video" in settings.modalities:
        raise SourceRejectedError("no_video_stream", "the file has no video stream")
    only_sound = settings.modalities == ("audio",)
    if audio is None and "audio" in settings.modalities and (only_sound or settings.missing_audio == "quarantine"):
        raise SourceRejectedError("no_audio_stream", "the file has no audio stream")
    all_of_it = (found.video, found.audio) == (video, audio)
    return replace(found, video=video, audio=audio, duration=found.duration if all_of_it else None)


def _check_segment(found: Probe, segment: Segment | None) -> None:
    streams = [stream for stream in (found.video, found.audio) if stream is not None]
    ends = [stream.start + stream.duration - found.begin for stream in streams if stream.duration is not None]
    if segment is not None and ends and segment.start >= max(ends):
        raise SourceRejectedError(
            "too_short", f"the segment begins at {segment.start:g} s, but the file ends at {max(ends):.2f} s"
        )


@dataclass(frozen=True)
class _StoredVideo:
    frames: int
    fps: float
    width: int
    height: int


def _stored_video(path: Path, found: Probe, parameters: Parameters) -> _StoredVideo | None:
    if found.video is None:
        return None
    try:
        with av.open(str(path), mode="r", metadata_errors="replace") as container:
            stream = container.streams.video[0]
            fps = parameters.video.fps if parameters.video.codec != "copy" else float(stream.average_rate or 0)
            if stream.frames < 1 or fps <= 0:
                raise SourceRejectedError("too_short", "the video has not one frame")
            return _StoredVideo(stream.frames, fps, stream.codec_context.width, stream.codec_context.height)
    except (av.FFmpegError, IndexError) as error:
        raise SourceRejectedError("decode_error", f"ffmpeg wrote no readable video: {error}") from error


def _record(
    planned: PlannedSource,
    file: LocalCopy,
    found: Probe,
    stored: _StoredVideo | None,
    spectrogram_frames: int,
    parameters: Parameters,
) -> SampleRecord:
    segment = planned.source.segment
    video = audio = None
    # The sample's clock begins with the earlier of its streams.
    starts = [stream.start for stream in (found.video, found.audio) if stream is not None]
    origin = min(starts)
    if stored is not None and found.video is not None:
        start = 0.0 if segment else round(found.video.start - origin, 6)
        video = VideoRecord(frames=stored.frames, fps=stored.fps, width=stored.width, height=stored.height, start=start)
    if found.audio is not None:
        start = 0.0 if segment else round(found.audio.start - origin, 6)
        audio = AudioRecord(
            frames=spectrogram_frames, frames_per_second=parameters.audio.frames_per_second, start=start
        )
    ends = [part.start + seconds for part, seconds in ((video, _seconds(video)), (audio, _seconds(audio))) if part]
    return SampleRecord(
        key=planned.key,
        id=planned.source.id,
        source=planned.source.path or planned.source.name,
        source_sha256=file.sha256,
        labels=planned.labels,
        duration=round(max(ends), 6),
        video=video,
        audio=audio,
        original=_original(found.video, found.audio),
        segment=(segment.start, segment.end) if segment else None,
    )


def _original(video: VideoStream | None, audio: AudioStream | None) -> OriginalRecord:
    return OriginalRecord(
        width=video.width if video else None,
        height=video.height if video else None,
        fps=video.fps if video else None,
        video_codec=video.codec if video else None,
        audio_codec=audio.codec if audio else None,
        audio_sample_rate=audio.sample_rate if audio else None,
    )


def _seconds(part: VideoRecord | AudioRecord | None) -> float:
    if part is None:
        return 0.0
    return part.frames / (part.fps if isinstance(part, VideoRecord) else part.frames_per_second)


def _check_lengths(
    found: Probe, record: SampleRecord, settings: Settings, segment: Segment | None, complaints: str
) -> None:
    for stream, part, what in ((found.video, record.video, "picture"), (found.audio, record.audio, "sound")):
        seconds = _seconds(part)
        if seconds > settings.limits.seconds:
            raise SourceRejectedError(
                "limit_exceeded", f"its {what} lasts more than {settings.limits.seconds:g} s (--max-seconds)"
            )
        if part is record.audio and segment and seconds > segment.end - segment.start + _ALLOWANCE_SECONDS:
            raise SourceRejectedError(
                "decode_error", "its sound changes its format within the segment, which cannot be put together"
            )
        if stream is None or stream.duration is None:
            continue
        end = stream.start + stream.duration - found.begin
        stated = stream.duration if segment is None else min(segment.end, end) - segment.start
        _check_share(what, seconds, stated, complaints)
    if segment is None and found.duration is not None:  # of the longest stream
        _check_share("picture or sound", record.duration, found.duration, complaints)


def _check_share(what: str, seconds: float, stated: float, complaints: str) -> None:
    least = _LEAST_SHARE_AFTER_COMPLAINTS if complaints else _LEAST_SHARE_DECODED
    if seconds < least * stated - _ALLOWANCE_SECONDS:
        raise SourceRejectedError(
            "decode_error",
            f"the header says {stated:.2f} s of {what}, but only {seconds:.2f} s could be decoded"
            + (f"; ffmpeg: {complaints}" if complaints else ""),
        )
