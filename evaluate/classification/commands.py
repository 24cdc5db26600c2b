"""``avid-evaluate finetune`` and ``avid-evaluate linear``."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click

from avid_pipeline.clips.loading import LoadingSettings
from avid_pipeline.collectives import RankGroup
from avid_pipeline.config import load_config
from avid_pipeline.errors import ConfigError
from avid_pipeline.evaluate.classification.config import FinetuneConfig, LinearConfig
from avid_pipeline.evaluate.classification.data import open_parts
from avid_pipeline.evaluate.classification.finetune import run_finetune
from avid_pipeline.evaluate.classification.folds import EvaluateFold, run_folds
from avid_pipeline.evaluate.classification.linear import run_linear
from avid_pipeline.evaluate.data import EvaluationData
from avid_pipeline.evaluate.results import REPORT_NAME, Results, terminal_table
from avid_pipeline.evaluate.session import open_session
from avid_pipeline.shards_spec.command_line import FriendlyCommand, storage_option
from avid_pipeline.shards_spec.storage import Storage, open_storage

__all__ = ["finetune", "linear"]


@dataclass(frozen=True)
class _Request:
    """What both commands are asked for."""

    data: str
    test_data: str | None
    fold: int | None
    all_folds: bool
    output: str | None
    overwrite: bool
    options: Mapping[str, str]

    def check(self) -> None:
        ways = [self.test_data is not None, self.fold is not None, self.all_folds]
        if sum(ways) != 1:
            raise ConfigError(
                "give one of --fold N, --all-folds (for data with folds: UCF101, HMDB51, ESC-50) and --test-data ROOT "
                "(for data whose test split is a data set of its own: Kinetics, the demo)"
            )

    def run(self, evaluate: EvaluateFold, url: str, group: RankGroup, say: Callable[[str], object]) -> Results:
        output = open_storage(url, create=True, options=self.options)
        if self.all_folds:
            return run_folds(
                evaluate, self.data, output, group, say=say, overwrite=self.overwrite, options=self.options
            )
        return evaluate(*open_parts(self.data, self.test_data, self.fold, self.options), output)


def _shared(command: Callable[..., None]) -> Callable[..., None]:
    """The arguments and options of both commands."""
    decorators = (
        click.argument("config", type=click.Path(path_type=Path)),
        click.argument("checkpoint"),
        click.option(
            "--data", required=True, help="Root of the data: a folder or URL of shards with folds, or of training data."
        ),
        click.option("--test-data", help="Root of the test data, where --data has no folds."),
        click.option("--fold", type=click.IntRange(min=1), help="Which fold of the data."),
        click.option("--all-folds", is_flag=True, help="Every fold, one after the other, and their mean."),
        click.option(
            "--output",
            help="Where progress and results go: a folder, or a URL.  [default: evaluation/ below a local CHECKPOINT "
            "folder, else below the current one]",
        ),
        click.option(
            "--set",
            "overrides",
            multiple=True,
            metavar="KEY=VALUE",
            help="Change a setting of CONFIG, for example data.batch_size=32. May be repeated.",
        ),
        click.option(
            "--random-weights",
            type=click.IntRange(min=0),
            metavar="SEED",
            help="Put random weights in the place of the checkpoint's: what a network that has learned nothing gives.",
        ),
        click.option("--overwrite", is_flag=True, help="Begin anew, whatever an earlier evaluation left in OUTPUT."),
        storage_option,
    )
    for decorator in reversed(decorators):
        command = decorator(command)
    return command


@click.command(cls=FriendlyCommand)
@_shared
def finetune(config: Path, checkpoint: str, overrides: tuple[str, ...], **arguments: Any) -> None:
    """Fine-tune the video network of CHECKPOINT on a labelled data set, as CONFIG says (configs/finetune).

    The same command goes on where it was interrupted, and only shows the results where they are there. Under torchrun:
    torchrun --nproc-per-node 8 -m avid_pipeline.evaluate finetune CONFIG CHECKPOINT …
    """
    settings = load_config(config, FinetuneConfig, overrides)
    _evaluate(partial(run_finetune, settings), f"finetune-{config.stem}", settings.data, checkpoint, **arguments)


@click.command(cls=FriendlyCommand)
@_shared
@click.option(
    "--cache-features",
    is_flag=True,
    help="Compute the frozen features once, into OUTPUT, and train on them: much faster, the same clips every epoch.",
)
def linear(config: Path, checkpoint: str, overrides: tuple[str, ...], cache_features: bool, **arguments: Any) -> None:
    """Train a linear classifier on each of some frozen layers of CHECKPOINT, as CONFIG says (configs/linear).

    The same command goes on where it was interrupted, and only shows the results where they are there. Under torchrun:
    torchrun --nproc-per-node 8 -m avid_pipeline.evaluate linear CONFIG CHECKPOINT …
    """
    settings = load_config(config, LinearConfig, overrides)
    options = arguments["storage_option"]
    run = partial(run_linear, settings, cache_features=cache_features, options=options)
    _evaluate(run, f"linear-{config.stem}", settings.data, checkpoint, **arguments)


def _evaluate(
    run: Callable[..., Results],
    name: str,
    loading: LoadingSettings,
    checkpoint: str,
    *,
    random_weights: int | None,
    overwrite: bool,
    storage_option: dict[str, str],
    **places: Any,
) -> None:
    request = _Request(overwrite=overwrite, options=storage_option, **places)
    request.check()
    with open_session(checkpoint, loading, storage_option, random_weights) as session:
        group = session.group

        def evaluate(train: EvaluationData, test: EvaluationData, output: Storage) -> Results:
            return run(session.evaluated, train, test, output, group, say=session.say, overwrite=overwrite)

        fold = "" if request.fold is None else f"-fold{request.fold}"
        url = request.output or session.default_output(checkpoint, name + fold)
        results = request.run(evaluate, url, group, session.say)
        if group.rank == 0:
            click.echo(terminal_table(results.tables[0]))
            click.echo(f"report: {url.rstrip('/')}/{REPORT_NAME}")
