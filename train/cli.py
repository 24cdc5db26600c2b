"""``avid-train``: train AVID on a data set of shards."""

import os
from pathlib import Path

import click
import torch
import torch.distributed as dist

from avid_pipeline.config import load_config
from avid_pipeline.shards_spec.command_line import FriendlyCommand, storage_option
from avid_pipeline.train.config import TrainConfig
from avid_pipeline.train.trainer import train


@click.command(cls=FriendlyCommand)
@click.version_option(package_name="avid-pipeline")
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--data", required=True, help="Root of the training data: a folder or URL of shards.")
@click.option("--output", required=True, type=click.Path(file_okay=False), help="Folder of this run.")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a setting of CONFIG, for example optimizer.learning_rate=1e-4. May be repeated.",
)
@storage_option
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint in OUTPUT, if there is one.")
def main(
    config: Path,
    data: str,
    output: str,
    overrides: tuple[str, ...],
    storage_option: dict[str, str],
    resume: bool,
) -> None:
    """Train AVID as CONFIG (a YAML file, see configs/) says.

    Alone it is one process; under torchrun, one process for each rank: torchrun --nproc-per-node 8 -m
    avid_pipeline.train CONFIG --data ROOT --output DIR.
    """
    settings = load_config(config, TrainConfig, overrides)
    in_group = "WORLD_SIZE" in os.environ and "RANK" in os.environ
    if in_group:
        _join_group()
    try:
        train(settings, data, output, resume=resume, options=storage_option)
    finally:
        if in_group:
            dist.destroy_process_group()


def _join_group() -> None:
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("nccl")
    else:
        dist.init_process_group("gloo")


if __name__ == "__main__":
    main()
