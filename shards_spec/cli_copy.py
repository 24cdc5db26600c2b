"""``avid-shards copy``."""

import sys

import click
from tqdm import tqdm

from avid_pipeline.shards_spec.command_line import FriendlyCommand, storage_options
from avid_pipeline.shards_spec.copying import copy_dataset
from avid_pipeline.shards_spec.manifest import read_manifest
from avid_pipeline.shards_spec.storage import open_storage


@click.command(cls=FriendlyCommand)
@click.argument("src")
@click.argument("dst")
@storage_options(
    "--source-option",
    "source_option",
    help="Setting of the object store of SRC, for example aws_endpoint=http://host:9000; may be given several times.",
)
@storage_options("--storage-option", "storage_option", help="The same for the object store of DST.")
@click.option(
    "--workers", default=4, show_default=True, type=click.IntRange(min=1), help="Shards that are copied at once."
)
def copy(src: str, dst: str, source_option: dict[str, str], storage_option: dict[str, str], workers: int) -> None:
    """Copy the data set at SRC to DST; each is a folder or an s3://, gs://, az:// or https:// (SRC only) URL.

    SHA-256 checksums are compared while the shards pass; a damaged shard is named and never appears in DST. The
    manifest is written last, so a DST with a manifest is complete. An interrupted copy goes on where it stopped when
    the same command is given again: finished shards are noted in DST/_progress and not read again. A DST that holds
    another data set is refused. A killed copy can leave parts of unfinished uploads in a bucket, which only a
    lifecycle rule of the bucket removes.
    """
    source = open_storage(src, options=source_option)
    read_manifest(source)  # Before DST is made: a wrong SRC leaves nothing.
    destination = open_storage(dst, create=True, options=storage_option)
    hidden = not sys.stderr.isatty()
    with tqdm(unit="B", unit_scale=True, unit_divisor=1000, disable=hidden, desc="copy") as bar:

        def on_planned(total: int, done: int) -> None:
            bar.reset(total)
            bar.update(done)

        result = copy_dataset(source, destination, workers=workers, on_planned=on_planned, on_bytes=bar.update)
    there = f", {result.skipped:,} were there already" if result.skipped else ""
    click.echo(f"{dst}: {result.copied:,} shards copied ({result.copied_bytes / 1e6:,.1f} MB){there}; checksums agree")
