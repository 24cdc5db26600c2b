"""Options that several commands of ``avid-evaluate`` have."""

from collections.abc import Callable
from typing import Any

import click

from avid_pipeline.clips.loading import LoadingSettings
from avid_pipeline.evaluate.layers import known_features
from avid_pipeline.shards_spec.command_line import storage_option

__all__ = ["feature_options", "loading_of", "names_option", "split_names"]

_Command = Callable[..., Any]


def feature_options(clips: int) -> Callable[[_Command], _Command]:
    """CHECKPOINT and the options of all commands that compute features.

    Args:
        clips: of each instance, by default.
    """
    options: list[Callable[[_Command], _Command]] = [
        click.argument("checkpoint"),
        click.option("--clips", default=clips, show_default=True, type=click.IntRange(min=1), help="Clips of each "
                     "instance, spread evenly."),
        click.option("--batch-size", default=32, show_default=True, type=click.IntRange(min=1), help="Clips in a "
                     "forward pass, on each rank."),
        click.option("--precision", default="float32", show_default=True, type=click.Choice(["float32", "bfloat16"]),
                     help="Of convolutions and matrix products."),
        click.option("--random-weights", metavar="SEED", type=click.IntRange(min=0), help="Evaluate the architecture "
                     "of CHECKPOINT with random weights instead: what a network reaches that has learned nothing."),
        click.option("--overwrite", is_flag=True, help="Begin anew where OUTPUT holds results of something else."),
        click.option("--device", default="cpu", show_default=True, type=click.Choice(["cpu", "gpu"]), help="Where "
                     "clips are decoded."),
        click.option("--workers", type=click.IntRange(min=1), help="Threads of each rank that decode.  [default: one "
                     "for each core]"),
        click.option("--max-failure-rate", default=0.01, show_default=True, type=click.FloatRange(0, 1), help="Share "
                     "of clips that may fail to decode and be left out."),
        click.option("--cache-folder", help="Local folder that keeps what was read of remote data."),
        storage_option,
    ]  # fmt: skip

    def decorate(command: _Command) -> _Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def loading_of(device: str, workers: int | None, max_failure_rate: float, cache_folder: str | None) -> LoadingSettings:
    """The loading settings that :func:`feature_options` gives."""
    return LoadingSettings.model_validate(
        {
            "device": device,
            "workers": workers,
            "max_failure_rate": max_failure_rate,
            "cache_folder": cache_folder,
        }
    )


def names_option(help: str) -> Callable[[_Command], _Command]:
    """``--features NAME,NAME``."""
    return click.option(
        "--features", "names", metavar="NAME,NAME", help=f"{help} Known: {', '.join(known_features())}."
    )


def split_names(names: str | None) -> tuple[str, ...]:
    """The names that :func:`names_option` gives; none without it."""
    return tuple(name.strip() for name in names.split(",")) if names else ()
