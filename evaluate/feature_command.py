"""The command ``features``."""

from typing import Any

import click

from avid_pipeline.evaluate.command_options import feature_options, loading_of, names_option, split_names
from avid_pipeline.evaluate.data import embeddings_of, open_data
from avid_pipeline.evaluate.extraction import FeatureRequest
from avid_pipeline.evaluate.session import open_session
from avid_pipeline.shards_spec.command_line import FriendlyCommand

__all__ = ["features"]


@click.command(cls=FriendlyCommand)
@feature_options(clips=10)
@click.option("--data", required=True, help="Root of the data: a folder or URL of shards.")
@click.option("--subset", help="Named subset of the data's manifest, instead of all.")
@click.option("--output", required=True, help="Folder or URL of the features: a zarr group.")
@click.option("--dtype", default="float32", show_default=True, type=click.Choice(["float32", "float16"]),
              help="Of the stored features.")  # fmt: skip
@names_option("Which, all in one pass.  [default: the embeddings of what the data have]")
def features(
    checkpoint: str,
    data: str,
    subset: str | None,
    output: str,
    names: str | None,
    dtype: Any,
    clips: int,
    batch_size: int,
    precision: Any,
    random_weights: int | None,
    overwrite: bool,
    storage_option: dict[str, str],
    **loading: Any,
) -> None:
    """Compute features of a data set into zarr; the same command goes on after an interruption.

    OUTPUT holds features/<name> [clips, instances, numbers], label, labels, found and index; docs/evaluation.md says
    more. Under torchrun the ranks divide the work, and the numbers are the same.
    """
    with open_session(checkpoint, loading_of(**loading), storage_option, random_weights) as session:
        opened = open_data(data, storage_option, subset=subset)
        request = FeatureRequest(
            split_names(names) or embeddings_of(opened), clips, batch_size=batch_size, dtype=dtype, precision=precision
        )
        root = session.output(output, ("",) if overwrite else None)
        store = session.features(opened, request, root, "")
        if session.group.rank == 0:
            left_out = int((~store.found()).sum())
            click.echo(
                f"{root.url}: {', '.join(store.names)} of {store.clips} clips of {len(store.index):,} instances"
                + (f"; {left_out} clips could not be decoded" if left_out else "")
            )
