"""``avid-shards``: look at a data set of shards."""

import sys
from pathlib import Path

import click
from tabulate import tabulate
from tqdm import tqdm

from avid_pipeline.shards_spec.command_line import FriendlyCommand, FriendlyGroup
from avid_pipeline.shards_spec.manifest import Manifest
from avid_pipeline.shards_spec.reader import open_dataset
from avid_pipeline.shards_spec.storage import open_storage
from avid_pipeline.shards_spec.validation import validate as validate_dataset

_MAX_PROBLEMS_SHOWN = 50


@click.group(cls=FriendlyGroup)
@click.version_option(package_name="avid-pipeline")
def main() -> None:
    """Look at data sets of shards. ROOT is a folder or an s3://, gs://, az:// or https:// URL."""


@main.command(cls=FriendlyCommand)
@click.argument("root")
def info(root: str) -> None:
    """Say what a data set holds, from its manifest alone."""
    click.echo(tabulate(_facts(root, open_dataset(root).manifest), tablefmt="plain"))


def _facts(root: str, manifest: Manifest) -> list[tuple[str, str]]:
    size = sum(shard.bytes for shard in manifest.shards)
    video, audio = manifest.parameters.video, manifest.parameters.audio
    facts = [
        ("root", root),
        ("data set", f"{manifest.dataset}, split {manifest.split}"),
        ("samples", f"{manifest.num_samples:,} in {len(manifest.shards):,} shards, {size / 1e6:,.1f} MB"),
        ("modalities", ", ".join(manifest.modalities)),
        ("classes", f"{len(manifest.classes):,}"),
        ("quarantined", f"{manifest.quarantined:,}"),
    ]
    if "video" in manifest.modalities:
        shape = f"{video.codec}, {video.fps} frames/s, shorter side {video.short_side}, GOP {video.gop}"
        facts.append(("video", shape))
    if "audio" in manifest.modalities:
        shape = f"{audio.sample_rate} Hz, {audio.frames_per_second} frames/s x 257, {audio.storage}"
        facts.append(("spectrogram", shape))
    facts.append(("fingerprint", manifest.fingerprint()))
    return facts


@main.command(cls=FriendlyCommand)
@click.argument("root")
def validate(root: str) -> None:
    """Check checksums, counts, index, records and shapes of every shard; exit code 1 if anything is wrong."""
    storage = open_storage(root)
    with tqdm(unit="shard", disable=not sys.stderr.isatty(), desc="validate") as bar:
        report = validate_dataset(storage, on_shard=lambda shard: bar.update())
    for problem in report.problems[:_MAX_PROBLEMS_SHOWN]:
        click.echo(problem)
    if len(report.problems) > _MAX_PROBLEMS_SHOWN:
        click.echo(f"… and {len(report.problems) - _MAX_PROBLEMS_SHOWN} more")
    if report.problems:
        raise click.ClickException(f"{root}: {len(report.problems)} problems in {report.samples:,} samples")
    click.echo(f"{root}: {report.samples:,} samples, {report.bytes / 1e6:,.1f} MB: clean")


@main.command(cls=FriendlyCommand)
@click.argument("root")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True, help="Picture to write.")
@click.option("--count", default=12, show_default=True, type=click.IntRange(min=1), help="Samples at most.")
def preview(root: str, out: Path, count: int) -> None:
    """Draw a contact sheet: frames of some samples above their spectrograms."""
    from avid_pipeline.shards_spec.preview import preview as draw

    shown = draw(open_dataset(root), out, count)
    click.echo(f"{out}: {len(shown)} samples")


if __name__ == "__main__":
    main()
