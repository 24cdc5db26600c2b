"""The options that every converting command of ``avid-preprocess`` shares, and what the commands do with them."""

import functools
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args

import click
from pydantic import ValidationError
from tabulate import tabulate
from tqdm import tqdm

from avid_pipeline.preprocess.executors.local import LocalExecutor
from avid_pipeline.preprocess.job import Executor, JobResult, run_job
from avid_pipeline.preprocess.quarantine import count_reasons
from avid_pipeline.preprocess.settings import Limits, MissingAudio, Settings
from avid_pipeline.preprocess.sources.base import SourceList
from avid_pipeline.preprocess.transcode import DEFAULT_QUALITY
from avid_pipeline.shards_spec.command_line import storage_option, storage_options
from avid_pipeline.shards_spec.manifest import (
    QUARANTINE_NAME,
    Parameters,
    Preset,
    Tune,
    VideoCodec,
    describe_validation_error,
)
from avid_pipeline.shards_spec.storage import is_remote

QUARANTINE_EXIT_CODE = 3

_PARAMETERS = Parameters()
_LIMITS = Limits()
_SETTINGS = Settings()


@dataclass(frozen=True)
class ConversionOptions:
    """The values of the shared options, by their names; ``quality`` is None for the codec's own."""

    samples_per_shard: int
    shuffle_seed: int
    codec: VideoCodec
    fps: int
    short_side: int
    gop: int
    quality: int | None
    preset: Preset
    tune: Tune
    spectrogram_dtype: str
    missing_audio: MissingAudio
    timeout: float
    max_seconds: float
    max_frames: int
    max_pixels: int
    max_bytes: int
    max_quarantine_fraction: float
    retry_quarantined: bool
    overwrite: bool
    executor: str
    workers: int | None
    ray_address: str | None
    source_option: dict[str, str]
    storage_option: dict[str, str]


_OPTIONS = (
    click.option("--samples-per-shard", default=_PARAMETERS.samples_per_shard, show_default=True, help="Shard size."),
    click.option("--shuffle-seed", default=0, show_default=True, help="Seed of the order of samples over shards."),
    click.option(
        "--codec",
        default=_PARAMETERS.video.codec,
        show_default=True,
        type=click.Choice(sorted(DEFAULT_QUALITY)),
        help="Of the stored video; copy keeps the source's stream, with its frame rate and size.",
    ),
    click.option(
        "--fps", default=_PARAMETERS.video.fps, show_default=True, help="Frames a second of the stored video."
    ),
    click.option("--short-side", default=_PARAMETERS.video.short_side, show_default=True, help="Pixels, at most."),
    click.option("--gop", default=_PARAMETERS.video.gop, show_default=True, help="Frames between key frames."),
    click.option("--quality", type=int, help="Constant rate factor, smaller is better.  [default: by codec]"),
    click.option(
        "--preset",
        default=_PARAMETERS.video.preset,
        show_default=True,
        type=click.Choice(get_args(Preset)),
        help="Speed of the h264 and hevc encoder.",
    ),
    click.option(
        "--tune",
        default=_PARAMETERS.video.tune,
        show_default=True,
        type=click.Choice(get_args(Tune)),
        help="Of the h264 encoder.",
    ),
    click.option(
        "--spectrogram-dtype",
        default=_PARAMETERS.audio.storage,
        show_default=True,
        type=click.Choice(["uint8", "float16"]),
        help="Of the stored spectrograms.",
    ),
    click.option(
        "--missing-audio",
        default=_SETTINGS.missing_audio,
        show_default=True,
        type=click.Choice(["quarantine", "keep"]),
        help="What becomes of a video without sound; kept ones are outside the subset with-audio.",
    ),
    click.option(
        "--timeout",
        default=_SETTINGS.timeout,
        show_default=True,
        type=click.FloatRange(min=0, min_open=True),
        help="Seconds, for one source.",
    ),
    click.option(
        "--max-seconds",
        type=click.FloatRange(min=0, min_open=True),
        default=_LIMITS.seconds,
        show_default=True,
        help="Longest picture or sound.",
    ),
    click.option(
        "--max-frames",
        default=_LIMITS.frames,
        show_default=True,
        type=click.IntRange(min=1),
        help="Frames of a source, at most.",
    ),
    click.option(
        "--max-pixels",
        default=_LIMITS.pixels,
        show_default=True,
        type=click.IntRange(min=1),
        help="Width times height, at most.",
    ),
    click.option(
        "--max-bytes",
        default=_LIMITS.bytes,
        show_default=True,
        type=click.IntRange(min=1),
        help="Size of a source, at most.",
    ),
    click.option(
        "--max-quarantine-fraction",
        default=0.05,
        show_default=True,
        type=click.FloatRange(0, 1),
        help=f"Exit code {QUARANTINE_EXIT_CODE} where a larger share of the sources is quarantined.",
    ),
    click.option("--retry-quarantined", is_flag=True, help="Try what an earlier run quarantined again."),
    click.option("--overwrite", is_flag=True, help="Start anew where OUT holds another conversion."),
    click.option(
        "--executor",
        default="local",
        show_default=True,
        type=click.Choice(["local", "ray"]),
        help="Processes on this machine, or tasks on a Ray cluster.",
    ),
    click.option("--workers", type=click.IntRange(min=1), help="Shards at a time.  [default: one for each core]"),
    click.option("--ray-address", help="Of the Ray cluster.  [default: RAY_ADDRESS, else this machine]"),
    storage_option,
    storage_options(
        "--source-option", "source_option", help="Likewise, for the sources.  [default: those of --storage-option]"
    ),
)


def converting(command: Callable[..., SourceList]) -> Callable[..., None]:
    """Turn a function that lists a data set into a command body that converts it.

    The function takes its own arguments and ``source_options``, the settings of the object store that sources come
    from; ``out`` and the shared options are added. Apply it below the decorators of click.
    """

    @functools.wraps(command)
    def convert(out: str, **values: Any) -> None:
        shared = ConversionOptions(**{field.name: values.pop(field.name) for field in fields(ConversionOptions)})
        parameters = _parameters(shared)
        _check_apart(str(values["src"]), out)
        source_options = shared.source_option or shared.storage_option
        listing = command(source_options=source_options, **values)
        _convert(listing, parameters, _settings(listing, shared, source_options), out, shared)

    body: Callable[..., None] = convert
    for option in reversed(_OPTIONS):
        body = option(body)
    return click.argument("out")(body)


def _check_apart(src: str, out: str) -> None:
    """Shards among the sources would be taken for sources by the next run."""
    if is_remote(src) or is_remote(out):
        return
    folder, target = (Path(os.path.realpath(text.removeprefix("file://"))) for text in (src, out))
    if target == folder or folder in target.parents:
        raise click.UsageError(
            f"{out}: lies in {src}, where it would be taken for a source; give a folder outside of it"
        )


def _parameters(shared: ConversionOptions) -> Parameters:
    video = {name: getattr(shared, name) for name in ("codec", "fps", "short_side", "gop", "preset", "tune")}
    video["quality"] = DEFAULT_QUALITY[shared.codec] if shared.quality is None else shared.quality
    try:
        return Parameters.model_validate(
            {
                "video": video,
                "audio": {"storage": shared.spectrogram_dtype},
                "samples_per_shard": shared.samples_per_shard,
                "shuffle_seed": shared.shuffle_seed,
            }
        )
    except ValidationError as error:
        raise click.UsageError(describe_validation_error(error)) from error


def _settings(listing: SourceList, shared: ConversionOptions, source_options: dict[str, str]) -> Settings:
    if shared.codec == "copy" and any(source.segment for source in listing.sources):
        raise click.UsageError("--codec copy cannot cut segments out; choose another codec, or whole files")
    limits = Limits(
        seconds=shared.max_seconds, frames=shared.max_frames, pixels=shared.max_pixels, bytes=shared.max_bytes
    )
    return Settings(
        modalities=listing.modalities,
        missing_audio=shared.missing_audio,
        limits=limits,
        timeout=shared.timeout,
        source_options=source_options,
        storage_options=shared.storage_option,
    )


def _executor(shared: ConversionOptions) -> Executor:
    if shared.executor == "local":
        return LocalExecutor(shared.workers)
    from avid_pipeline.preprocess.executors.ray import RayExecutor

    return RayExecutor(shared.ray_address, shared.workers)


def _convert(
    listing: SourceList, parameters: Parameters, settings: Settings, out: str, shared: ConversionOptions
) -> None:
    for note in listing.notes:
        click.echo(note)
    with tqdm(unit="clip", disable=not sys.stderr.isatty(), desc=f"{listing.dataset} {listing.split}") as bar:

        def on_planned(total: int, done: int) -> None:
            bar.reset(total)
            bar.update(done)

        result = run_job(
            listing,
            parameters,
            out,
            _executor(shared),
            settings=settings,
            overwrite=shared.overwrite,
            retry_quarantined=shared.retry_quarantined,
            on_planned=on_planned,
            on_source=bar.update,
        )
    _report(result, out)
    if result.quarantined_fraction > shared.max_quarantine_fraction:
        click.echo(
            f"{result.quarantined_fraction:.1%} of the sources are in quarantine, more than "
            f"--max-quarantine-fraction {shared.max_quarantine_fraction:g}; the shards hold all others",
            err=True,
        )
        raise click.exceptions.Exit(QUARANTINE_EXIT_CODE)


def _report(result: JobResult, out: str) -> None:
    manifest = result.manifest
    size = sum(shard.bytes for shard in manifest.shards)
    click.echo(f"{out}: {manifest.num_samples:,} samples in {len(manifest.shards):,} shards, {size / 1e6:,.1f} MB")
    if result.quarantined:
        click.echo(f"{len(result.quarantined):,} sources in quarantine, listed in {os.path.join(out, QUARANTINE_NAME)}")
        click.echo(tabulate(count_reasons(result.quarantined), headers=("reason", "sources")))
