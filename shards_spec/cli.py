"""``avid-shards``: look at, check and copy a data set of shards."""

import sys
from pathlib import Path

import click
from tabulate import tabulate
from tqdm import tqdm

from avid_pipeline.shards_spec.cli_copy import copy
from avid_pipeline.shards_spec.cli_samples import show, stats
from avid_pipeline.shards_spec.command_line import FriendlyCommand, FriendlyGroup, storage_option
from avid_pipeline.shards_spec.manifest import Manifest, read_manifest
from avid_pipeline.shards_spec.parallel import usable_cores
from avid_pipeline.shards_spec.reader import open_dataset
from avid_pipeline.shards_spec.storage import open_storage

_MAX_PROBLEMS_SHOWN = 50


@click.group(cls=FriendlyGroup)
@click.version_option(package_name="avid-pipeline")
def main() -> None:
    """Look at, check and copy data sets of shards. ROOT is a folder or an s3://, gs://, az:// or https:// URL."""


main.add_command(show)
main.add_command(stats)
main.add_command(copy)


@main.command(cls=FriendlyCommand)
@click.argument("root")
@storage_option
def info(root: str, storage_option: dict[str, str]) -> None:
    """Say what a data set holds, from its manifest alone."""
    manifest = open_dataset(root, storage_option).manifest
    click.echo(tabulate(_facts(root, manifest), tablefmt="plain", disable_numparse=True))


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
    for number, (name, ranges) in enumerate(sorted(manifest.subsets.items())):
        samples = sum(stop - start for start, stop in ranges)
        facts.append(("" if number else "subsets", f"{name}: {samples:,} samples"))
    if "video" in manifest.modalities:
        shape = f"{video.codec}, {video.fps} frames/s, shorter side {video.short_side}, GOP {video.gop}"
        facts.append(("video", shape))
    if manifest.spectrogram_statistics is not None:
        shape = f"{audio.sample_rate} Hz, {audio.frames_per_second} frames/s x 257, {audio.storage}"
        facts.append(("spectrogram", shape))
    facts.append(("fingerprint", manifest.fingerprint()))
    return facts


@main.command(cls=FriendlyCommand)
@click.argument("root")
@click.option("--deep", is_flag=True, help="Decode every frame of every video, and look at every spectrogram value.")
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    help="Processes, each with one shard at a time and one sample in memory.  [default: one for each core]",
)
@storage_option
def validate(root: str, deep: bool, workers: int | None, storage_option: dict[str, str]) -> None:
    """Check a data set against its specification; exit code 1 if anything is wrong.

    Every shard is read once: checksums, counts, index, records and shapes; then the quarantine list, the
    spectrogram statistics and the subset with-audio. With --deep also: every frame is decoded (number, size, times,
    pixel format, key frames), every spectrogram is finite and in range, and the statistics are computed again.
    """
    from avid_pipeline.shards_spec.validation import validate as validate_dataset

    storage = open_storage(root, options=storage_option)
    total = read_manifest(storage).num_samples
    with tqdm(total=total, unit="sample", disable=not sys.stderr.isatty(), desc="validate") as bar:
        report = validate_dataset(storage, deep=deep, workers=workers or usable_cores(), on_sample=bar.update)
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
@storage_option
def preview(root: str, out: Path, count: int, storage_option: dict[str, str]) -> None:
    """Draw a contact sheet: frames of some samples above their spectrograms."""
    from avid_pipeline.shards_spec.preview import preview as draw

    shown = draw(open_dataset(root, storage_option), out, count)
    click.echo(f"{out}: {len(shown)} samples")


if __name__ == "__main__":
    main()
