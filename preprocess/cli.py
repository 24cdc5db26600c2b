"""``avid-preprocess``: from raw videos to shards.

Files that cannot be converted are listed with their reason in OUT/quarantine.jsonl. An interrupted run goes on where
it stopped when the same command is given again.
"""

import sys
from dataclasses import replace
from pathlib import Path

import click

from avid_pipeline.preprocess.options import converting
from avid_pipeline.preprocess.sources.base import SourceList
from avid_pipeline.shards_spec.command_line import FriendlyCommand, FriendlyGroup
from avid_pipeline.shards_spec.manifest import Modality

_MODALITIES: dict[str, tuple[Modality, ...]] = {
    "video,audio": ("video", "audio"),
    "video": ("video",),
    "audio": ("audio",),
}


_modalities = click.option(
    "--modalities",
    default="video,audio",
    show_default=True,
    type=click.Choice(sorted(_MODALITIES, key=len, reverse=True)),
    help="What to convert of each file.",
)


@click.group(cls=FriendlyGroup)
@click.version_option(package_name="avid-pipeline")
def main() -> None:
    """Convert raw videos to shards of short-GOP video and log spectrograms (specification version 1).

    Sources and OUT may be folders or URLs (s3://, gs://, az://, and https:// for sources). Files that cannot be
    converted are listed with their reason in OUT/quarantine.jsonl; exit code 3 says that they were too many. An
    interrupted run goes on where it stopped when the same command is given again.
    """


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
@click.argument("src")
@click.option("--split", default="train", show_default=True, help="What this part of the data set is called.")
@click.option("--annotations", metavar="CSV", help="The official table; without it, labels are the folders' names.")
@click.option("--trim", is_flag=True, help="Cut full videos, named <id>.mp4, to the segment in the annotations.")
@_modalities
@converting
def kinetics(
    src: str, split: str, annotations: str | None, trim: bool, modalities: str, source_options: dict[str, str]
) -> SourceList:
    """Convert Kinetics 400, 600 or 700 below SRC to shards in OUT.

    SRC holds class folders, SRC/<class>/<id>.mp4, or, with --annotations, videos named <id>.mp4 or
    <id>_<start>_<end>.mp4 anywhere below it.
    """
    from avid_pipeline.preprocess.sources.kinetics import list_kinetics

    listing = list_kinetics(src, split, source_options, annotations=annotations, trim=trim)
    return replace(listing, modalities=_MODALITIES[modalities])


@main.command(cls=FriendlyCommand)
@click.argument("src")
@click.option("--annotations", metavar="CSV", required=True, help="The segments table, for example eval_segments.csv.")
@click.option("--split", default="train", show_default=True, help="What this part of the data set is called.")
@click.option("--trim", is_flag=True, help="Cut full videos, named <id>.mp4, to the segment in the table.")
@_modalities
@converting
def audioset(
    src: str, annotations: str, split: str, trim: bool, modalities: str, source_options: dict[str, str]
) -> SourceList:
    """Convert AudioSet, files named by their YouTube id anywhere below SRC, to shards in OUT."""
    from avid_pipeline.preprocess.sources.audioset import list_audioset

    listing = list_audioset(src, annotations, split, source_options, trim=trim)
    return replace(listing, modalities=_MODALITIES[modalities])


@main.command(cls=FriendlyCommand)
@click.argument("src")
@click.option("--splits", metavar="FOLDER", help="Of the official lists.  [default: found in SRC or beside it]")
@converting
def ucf101(src: str, splits: str | None, source_options: dict[str, str]) -> SourceList:
    """Convert UCF101 to shards in OUT: all videos once, the folds as subsets fold1-train, fold1-test and so on."""
    from avid_pipeline.preprocess.sources.ucf101 import list_ucf101

    return list_ucf101(src, splits, source_options)


@main.command(cls=FriendlyCommand)
@click.argument("src")
@click.option("--splits", metavar="FOLDER", help="Of the official lists.  [default: found in SRC or beside it]")
@converting
def hmdb51(src: str, splits: str | None, source_options: dict[str, str]) -> SourceList:
    """Convert HMDB51 to shards in OUT: all videos once, the folds as subsets fold1-train, fold1-test and so on."""
    from avid_pipeline.preprocess.sources.hmdb51 import list_hmdb51

    return list_hmdb51(src, splits, source_options)


@main.command(cls=FriendlyCommand)
@click.argument("src")
@converting
def esc50(src: str, source_options: dict[str, str]) -> SourceList:
    """Convert ESC-50 (SRC/audio, SRC/meta/esc50.csv) to shards in OUT: sound only, five folds as subsets."""
    from avid_pipeline.preprocess.sources.esc50 import list_esc50

    return list_esc50(src, source_options)


@main.command(cls=FriendlyCommand)
@click.argument("src")
@click.option("--dataset", default="folder", show_default=True, help="What the data set is called.")
@click.option("--split", default="train", show_default=True, help="What this part of it is called.")
@_modalities
@converting
def folder(src: str, dataset: str, split: str, modalities: str, source_options: dict[str, str]) -> SourceList:
    """Convert any files to shards in OUT.

    SRC is a folder, or a list of paths and URLs: a CSV or JSONL file with url and, optionally, label, start and end.
    """
    from avid_pipeline.preprocess.sources.folder import list_folder

    return list_folder(src, source_options, modalities=_MODALITIES[modalities], dataset=dataset, split=split)


if __name__ == "__main__":
    main()
