"""``avid-preprocess``: from raw videos to shards."""

import os
import sys
from pathlib import Path

import click
from pydantic import ValidationError
from tabulate import tabulate
from tqdm import tqdm

from avid_pipeline.preprocess.executors.local import LocalExecutor
from avid_pipeline.preprocess.job import JobResult, run_job
from avid_pipeline.preprocess.quarantine import count_reasons
from avid_pipeline.preprocess.sources.base import SourceList
from avid_pipeline.preprocess.sources.kinetics import list_kinetics
from avid_pipeline.preprocess.transcode import DEFAULT_QUALITY
from avid_pipeline.shards_spec.command_line import FriendlyCommand, FriendlyGroup
from avid_pipeline.shards_spec.manifest import QUARANTINE_NAME, Parameters, describe_validation_error

_DEFAULTS = Parameters()


@click.group(cls=FriendlyGroup)
@click.version_option(package_name="avid-pipeline")
def main() -> None:
    """Convert raw videos to shards of short-GOP video and log spectrograms (specification version 1)."""


@main.command(cls=FriendlyCommand)
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--instances", default=300, show_default=True, type=click.IntRange(min=2), help="Videos in all.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Seed of all choices.")
@click.option("--workers", type=click.IntRange(min=1), help="Processes.  [default: one for each core]")
def demo(out: Path, instances: int, seed: int, workers: int | None) -> None:
    """Write synthetic audio-visual videos to OUT/train and OUT/val, in the folder layout of Kinetics."""
    from avid_pipeline.preprocess.demo.write import write_demo

    summary = write_demo(out, instances=instances, seed=seed, workers=workers, show_progress=sys.stderr.isatty())
    click.echo(f"{out}: {summary.train} videos in train, {summary.val} in val, {len(summary.classes)} classes")


@main.command(cls=FriendlyCommand)
@click.argument("src", type=click.Path(path_type=Path))
@click.argument("out")
@click.option("--split", default="train", show_default=True, help="What this part of the data set is called.")
@click.option("--samples-per-shard", default=_DEFAULTS.samples_per_shard, show_default=True, help="Shard size.")
@click.option("--shuffle-seed", default=0, show_default=True, help="Seed of the order of samples over shards.")
@click.option(
    "--codec",
    default=_DEFAULTS.video.codec,
    show_default=True,
    type=click.Choice(sorted(DEFAULT_QUALITY)),
    help="Of the stored video; copy keeps the source's stream, with its frame rate and size.",
)
@click.option("--fps", default=_DEFAULTS.video.fps, show_default=True, help="Frames a second of the stored video.")
@click.option("--short-side", default=_DEFAULTS.video.short_side, show_default=True, help="Pixels, at most.")
@click.option("--gop", default=_DEFAULTS.video.gop, show_default=True, help="Frames between key frames.")
@click.option("--quality", type=int, help="Constant rate factor, smaller is better.  [default: by codec]")
@click.option("--preset", default=_DEFAULTS.video.preset, show_default=True, help="Speed of the h264 and hevc encoder.")
@click.option(
    "--spectrogram-dtype",
    default=_DEFAULTS.audio.storage,
    show_default=True,
    type=click.Choice(["uint8", "float16"]),
    help="Of the stored spectrograms.",
)
@click.option("--workers", type=click.IntRange(min=1), help="Processes.  [default: one for each core]")
@click.option("--overwrite", is_flag=True, help="Start anew where OUT holds another conversion.")
def kinetics(
    src: Path,
    out: str,
    split: str,
    samples_per_shard: int,
    shuffle_seed: int,
    codec: str,
    fps: int,
    short_side: int,
    gop: int,
    quality: int | None,
    preset: str,
    spectrogram_dtype: str,
    workers: int | None,
    overwrite: bool,
) -> None:
    """Convert a tree of class folders SRC/<class>/<id>.mp4 to shards in OUT.

    Files that cannot be converted are listed with their reason in OUT/quarantine.jsonl. An interrupted run goes
    on where it stopped when the same command is given again.
    """
    video = {
        "codec": codec,
        "fps": fps,
        "short_side": short_side,
        "gop": gop,
        "quality": DEFAULT_QUALITY[codec] if quality is None else quality,  # type: ignore[index]
        "preset": preset,
    }
    try:
        parameters = Parameters.model_validate(
            {
                "video": video,
                "audio": {"storage": spectrogram_dtype},
                "samples_per_shard": samples_per_shard,
                "shuffle_seed": shuffle_seed,
            }
        )
    except ValidationError as error:
        raise click.UsageError(describe_validation_error(error)) from error
    _convert(list_kinetics(src, split), parameters, out, workers, overwrite)


def _convert(listing: SourceList, parameters: Parameters, out: str, workers: int | None, overwrite: bool) -> None:
    with tqdm(unit="clip", disable=not sys.stderr.isatty(), desc=f"{listing.dataset} {listing.split}") as bar:

        def on_planned(total: int, done: int) -> None:
            bar.reset(total)
            bar.update(done)

        result = run_job(
            listing,
            parameters,
            out,
            LocalExecutor(workers),
            overwrite=overwrite,
            on_planned=on_planned,
            on_source=bar.update,
        )
    _report(result, out)


def _report(result: JobResult, out: str) -> None:
    manifest = result.manifest
    size = sum(shard.bytes for shard in manifest.shards)
    click.echo(f"{out}: {manifest.num_samples:,} samples in {len(manifest.shards):,} shards, {size / 1e6:,.1f} MB")
    if result.quarantined:
        click.echo(f"{len(result.quarantined):,} sources in quarantine, listed in {os.path.join(out, QUARANTINE_NAME)}")
        click.echo(tabulate(count_reasons(result.quarantined), headers=("reason", "sources")))


if __name__ == "__main__":
    main()
