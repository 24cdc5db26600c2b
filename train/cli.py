"""``avid-train``: train AVID and AVID+CMA on a data set of shards, and move checkpoints in and out."""

import json
import os
import sys
from pathlib import Path

import click
import torch.distributed as dist

from avid_pipeline.collectives import RankGroup
from avid_pipeline.config import load_config
from avid_pipeline.process_group import in_process_group, join_process_group
from avid_pipeline.shards_spec.command_line import FriendlyCommand, FriendlyGroup, storage_option
from avid_pipeline.train.config import TrainConfig
from avid_pipeline.train.published import export_weights, import_published_checkpoint
from avid_pipeline.train.trainer import train

_STOPPED = 128 + 15  # what a process that SIGTERM ends exits with: schedulers and torchrun know the run is not finished


class _TrainGroup(FriendlyGroup):
    """``avid-train CONFIG …`` is ``avid-train run CONFIG …``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("--help", "--version"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


@click.group(cls=_TrainGroup)
@click.version_option(package_name="avid-pipeline")
def main() -> None:
    """Train AVID and AVID+CMA.

    avid-train CONFIG --data ROOT --output DIR trains as CONFIG says (a YAML file, see configs/), and is short for
    avid-train run; its options: avid-train run --help. Alone it is one process; under torchrun, one process for each
    rank: torchrun --nproc-per-node 8 -m avid_pipeline.train CONFIG --data ROOT --output DIR.
    """


@main.command(cls=FriendlyCommand)
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--data", required=True, help="Root of the training data: a folder or URL of shards.")
@click.option("--output", required=True, help="Root of this run: a folder, or a URL of an object store.")
@click.option(
    "--start-from",
    metavar="CHECKPOINT",
    help="Run or checkpoint folder, or published .pth.tar file, whose model and memory bank the run starts with; "
    "the same as --set start_from=CHECKPOINT.",
)
@click.option("--from-scratch", is_flag=True, help="Let AVID+CMA start without an AVID checkpoint.")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a setting of CONFIG, for example optimizer.learning_rate=1e-4. May be repeated.",
)
@storage_option
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint in OUTPUT that is whole, if any.")
def run(
    config: Path,
    data: str,
    output: str,
    start_from: str | None,
    from_scratch: bool,
    overrides: tuple[str, ...],
    storage_option: dict[str, str],
    resume: bool,
) -> None:
    """Train as CONFIG (a YAML file, see configs/) says.

    SIGTERM ends the run after the step under way, with a checkpoint and exit code 143. Workers that torchrun starts
    again (--max-restarts) go on from the newest checkpoint by themselves.
    """
    if start_from is not None:
        overrides += (f"start_from={json.dumps(start_from)}",)
    settings = load_config(config, TrainConfig, overrides)
    in_group = in_process_group()
    if in_group:
        join_process_group()
    # Every machine's torchrun counts the restarts of its own workers: all ranks must resume, or none.
    restarted = RankGroup().any(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0)
    state = train(settings, data, output, resume=resume or restarted, from_scratch=from_scratch, options=storage_option)
    # After an error, the others may wait in a collective that this would wait for.
    if in_group:
        dist.destroy_process_group()
    if state.stopped:
        sys.exit(_STOPPED)


@main.command("import-published", cls=FriendlyCommand)
@click.argument("checkpoint")
@click.option("--output", required=True, help="Folder or URL of the checkpoint to write.")
@storage_option
def import_published(checkpoint: str, output: str, storage_option: dict[str, str]) -> None:
    """Turn a published AVID-CMA CHECKPOINT (.pth.tar) into a checkpoint folder of ours.

    Its model, memory bank and partition function are kept: avid-train CONFIG --start-from OUTPUT goes on from it, and
    avid-evaluate reads it.
    """
    click.echo(f"written to {import_published_checkpoint(checkpoint, output, storage_option)}")


@main.command(cls=FriendlyCommand)
@click.argument("checkpoint")
@click.option("--to", "target", required=True, help="File or URL to write, for example model.safetensors.")
@click.option("--overwrite", is_flag=True, help="Replace a file that is there.")
@storage_option
def export(checkpoint: str, target: str, overwrite: bool, storage_option: dict[str, str]) -> None:
    """Write the weights of a CHECKPOINT (run or checkpoint folder, or a published file) to one .safetensors file."""
    export_weights(checkpoint, target, storage_option, overwrite=overwrite)
    click.echo(f"written to {target}")


if __name__ == "__main__":
    main()
