"""One source becomes one sample."""

import hashlib
import io
import tempfile
from pathlib import Path

import av
import numpy as np

from avid_pipeline.preprocess.probe import Probe, VideoStream, probe
from avid_pipeline.preprocess.quarantine import SourceRejectedError
from avid_pipeline.preprocess.sources.base import Source
from avid_pipeline.preprocess.transcode import transcode
from avid_pipeline.shards_spec.manifest import Parameters
from avid_pipeline.shards_spec.sample import AudioRecord, OriginalRecord, Sample, SampleRecord, VideoRecord
from avid_pipeline.shards_spec.spectrogram import SpectrogramRecipe, encode_spectrogram, spectrogram_blocks

# A file that decodes to less than this share of its stated duration is damaged, though ffmpeg does not say so.
_LEAST_SHARE_DECODED = 0.5


def convert(source: Source, key: str, labels: tuple[int, ...], parameters: Parameters) -> Sample:
    """Convert a source with picture and sound.

    Args:
        source: what to convert.
        key: the sample's key.
        labels: positions of its class names.
        parameters: how to store it.

    Raises:
        SourceRejectedError: it cannot become a sample; the reason says why.
    """
    if not source.has_place:
        raise SourceRejectedError("no_class_folder", "expected the file inside a class folder; move or remove it")
    found = probe(source.path)
    if found.video is None:
        raise SourceRejectedError("no_video_stream", "the file has no video stream")
    if found.audio is None:
        raise SourceRejectedError("no_audio_stream", "the file has no audio stream")
    with tempfile.TemporaryDirectory(prefix="avid-preprocess-") as folder:
        video_file = Path(folder) / "video.mp4"
        recipe = SpectrogramRecipe(parameters.audio.sample_rate, parameters.audio.frames_per_second)
        sound = transcode(source.path, found.video, found.audio, parameters.video, parameters.audio, video_file)
        codes = np.concatenate(
            [encode_spectrogram(block, parameters.audio.storage) for block in spectrogram_blocks(sound, recipe)]
        )
        video, origin = _video_record(video_file, found, parameters)
        encoded = video_file.read_bytes()
    if not len(codes):
        raise SourceRejectedError("too_short", "the sound is shorter than one spectrogram frame")
    assert found.audio is not None
    audio = AudioRecord(
        frames=len(codes),
        frames_per_second=parameters.audio.frames_per_second,
        start=round(found.audio.start - origin, 6),
    )
    _check_length(found.video, video)
    record = SampleRecord(
        key=key,
        id=source.id,
        source=source.name,
        source_sha256=_sha256(source.path),
        labels=labels,
        duration=round(
            max(video.start + video.frames / video.fps, audio.start + audio.frames / audio.frames_per_second), 6
        ),
        video=video,
        audio=audio,
        original=OriginalRecord(
            width=found.video.width,
            height=found.video.height,
            fps=found.video.fps,
            video_codec=found.video.codec,
            audio_codec=found.audio.codec,
            audio_sample_rate=found.audio.sample_rate,
        ),
    )
    return Sample(record, encoded, _npy(codes))


def _video_record(path: Path, found: Probe, parameters: Parameters) -> tuple[VideoRecord, float]:
    """The stored video's record, and the origin of the sample's clock on the file's clock in seconds."""
    assert found.video is not None
    origin = min(found.video.start, found.audio.start if found.audio else found.video.start)
    try:
        with av.open(str(path), mode="r") as container:
            stream = container.streams.video[0]
            frames = stream.frames
            fps = parameters.video.fps if parameters.video.codec != "copy" else float(stream.average_rate or 0)
            if frames < 1 or fps <= 0:
                raise SourceRejectedError("too_short", "the video has not one frame")
            record = VideoRecord(
                frames=frames,
                fps=fps,
                width=stream.codec_context.width,
                height=stream.codec_context.height,
                start=round(found.video.start - origin, 6),
            )
    except (av.FFmpegError, IndexError) as error:
        raise SourceRejectedError("decode_error", f"ffmpeg wrote no readable video: {error}") from error
    return record, origin


def _check_length(stream: VideoStream, stored: VideoRecord) -> None:
    seconds = stored.frames / stored.fps
    if stream.duration is not None and seconds < _LEAST_SHARE_DECODED * stream.duration - 1 / stored.fps:
        raise SourceRejectedError(
            "decode_error", f"the header says {stream.duration:.2f} s, but only {seconds:.2f} s could be decoded"
        )


def _npy(array: "np.ndarray[tuple[int, ...], np.dtype[np.generic]]") -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise SourceRejectedError("unreadable", f"the file cannot be read to its end: {error.strerror}") from error
