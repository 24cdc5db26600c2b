"""``avid-shards show`` and ``avid-shards stats``."""

import sys
from pathlib import Path

import click
from tabulate import tabulate
from tqdm import tqdm

from avid_pipeline.shards_spec import show as showing
from avid_pipeline.shards_spec import statistics
from avid_pipeline.shards_spec.command_line import FriendlyCommand, storage_option
from avid_pipeline.shards_spec.reader import open_dataset


@click.command(cls=FriendlyCommand)
@click.argument("root")
@click.argument("key_or_index")
@click.option("--key", "is_key", is_flag=True, help="KEY_OR_INDEX is a key, even if it has digits only.")
@click.option(
    "--extract",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder to write the sample's KEY.mp4, KEY.spectrogram.npy and KEY.json to, replacing files of these names.",
)
@storage_option
def show(root: str, key_or_index: str, is_key: bool, extract: Path | None, storage_option: dict[str, str]) -> None:
    """Show one sample of a data set: its record, labels, subsets, and where its members lie.

    KEY_OR_INDEX is an instance index where it has digits only, else a key (--key: always a key). A sample given by
    index costs one ranged read of its shard, besides the manifest and the shard's index file. For a key, the index
    files of the shards are read, many at once, until one has it. A key that begins with a dash comes after --.
    """
    reader = open_dataset(root, storage_option)
    index = showing.resolve(reader, key_or_index, is_key=is_key)
    sample = showing.locate(reader, index, whole=extract is not None)
    click.echo(tabulate(showing.facts(sample, reader.manifest), tablefmt="plain", disable_numparse=True))
    if extract is not None:
        for path in showing.extract(sample, extract):
            click.echo(f"wrote {path}")


@click.command(cls=FriendlyCommand)
@click.argument("root")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Picture to write, for example stats.png.")
@click.option("--sample", type=click.IntRange(min=1), help="Look at this many samples only.  [default: all]")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Seed that draws --sample.")
@storage_option
def stats(root: str, out: Path | None, sample: int | None, seed: int, storage_option: dict[str, str]) -> None:
    """Count durations, sizes, classes and kinds of sources; as tables and, with --out, as a picture.

    Only the samples' records are read, by ranged reads, many at once: no video and no spectrogram. --sample draws
    without repetition by numpy.random.default_rng(SEED), so that the same command looks at the same samples.
    """
    if out is not None:
        from avid_pipeline.shards_spec.preview import check_picture_format

        check_picture_format(out)
    reader = open_dataset(root, storage_option)
    total = len(reader) if sample is None else min(sample, len(reader))
    with tqdm(total=total, unit="sample", disable=not sys.stderr.isatty(), desc="stats") as bar:
        found = statistics.collect(reader, sample=sample, seed=seed, on_samples=bar.update)
    for number, (_, headers, rows) in enumerate(statistics.tables(found)):
        if number:
            click.echo()
        form = "simple" if headers else "plain"
        numbers = ("left", *["right"] * (len(rows[0]) - 1)) if headers else ("left", "left")
        click.echo(tabulate(rows, headers=headers, tablefmt=form, disable_numparse=True, colalign=numbers))
    if out is not None:
        from avid_pipeline.shards_spec.statistics_picture import draw_statistics

        manifest = reader.manifest
        looked_at = f"{found.count:,} samples" + ("" if found.count == found.total else f" of {found.total:,}")
        draw_statistics(found, f"{manifest.dataset} {manifest.split}: {looked_at}", out)
        click.echo(f"\nwrote {out}")
