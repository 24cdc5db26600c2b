"""The same evaluation on every fold of a data set, and the mean over them."""

import statistics
from collections.abc import Callable, Mapping, Sequence

from avid_pipeline.collectives import RankGroup
from avid_pipeline.errors import ConfigError
from avid_pipeline.evaluate.data import EvaluationData, folds_of, open_fold
from avid_pipeline.evaluate.report import Report, write_report
from avid_pipeline.evaluate.results import REPORT_NAME, RESULTS_NAME, Results, Rows, Table, read_results
from avid_pipeline.shards_spec.reader import open_dataset
from avid_pipeline.shards_spec.storage import Storage, open_storage
from avid_pipeline.together import run_together

__all__ = ["FOLDS", "EvaluateFold", "run_folds"]

FOLDS = "folds"
"""Setting in the results of several folds: their numbers."""

EvaluateFold = Callable[[EvaluationData, EvaluationData, Storage], Results]
"""Training data, test data and the folder of a fold to its results; called by every rank."""


def run_folds(
    evaluate: EvaluateFold,
    data: str,
    output: Storage,
    group: RankGroup,
    *,
    say: Callable[[str], object],
    overwrite: bool = False,
    options: Mapping[str, str] | None = None,
) -> Results:
    """Evaluate every fold into ``fold1``, ``fold2`` and so on below the output, and write their mean.

    Every rank calls this. Folds that are done are not done again, and one that was interrupted goes on.

    Args:
        evaluate: evaluates one fold.
        data: root of a data set with folds.
        output: where results go.
        group: the ranks.
        say: is told which fold is under way, on the first rank.
        overwrite: remove the mean of an earlier evaluation; what becomes of each fold is for ``evaluate`` to say.
        options: of the object store that the data and the output are in.

    Returns:
        The mean and the standard deviation over folds, and every fold's figures, as they are in ``output``.

    Raises:
        ConfigError: the data set has no folds, or ``output`` holds an evaluation of another kind.
        AvidPipelineError: as ``evaluate`` does.
    """
    manifest = open_dataset(data, options).manifest
    folds = folds_of(manifest)
    if not folds:
        raise ConfigError(
            f"{data}: there are no folds in this data set; give --test-data, or convert it with its official lists "
            "(docs/datasets.md)"
        )

    def begin() -> None:
        if group.rank == 0:
            _begin(output, overwrite)

    run_together(group, begin)
    results = []
    for fold in folds:
        if group.rank == 0:
            say(f"fold {fold} of {', '.join(map(str, folds))}")
        folder = open_storage(output.url_of(f"fold{fold}"), create=True, options=options)
        results.append(evaluate(*open_fold(data, fold, options), folder))
    together = _together(folds, results)

    def write() -> None:
        if group.rank == 0:
            write_report(output, Report(together))

    run_together(group, write)
    return together


def _begin(output: Storage, overwrite: bool) -> None:
    if overwrite:
        output.delete(RESULTS_NAME)
        output.delete(REPORT_NAME)
    elif output.exists(RESULTS_NAME) and FOLDS not in read_results(output).settings:
        raise ConfigError(
            f"{output.url_of(RESULTS_NAME)}: is of one evaluation, not of several folds; give another --output, or "
            "--overwrite"
        )


def _together(folds: Sequence[int], results: Sequence[Results]) -> Results:
    accuracies = [each.tables[0] for each in results]
    mean: Rows = {}
    for name, columns in accuracies[0].rows.items():
        mean[name] = {}
        for column in columns:
            values = [table.rows[name][column] for table in accuracies]
            known = [value for value in values if value is not None]
            mean[name][column] = statistics.fmean(known) if len(known) == len(values) else None
            deviation = statistics.stdev(known) if len(known) == len(values) > 1 else None
            mean[name][f"{column} ±"] = deviation
    tables = [
        Table(
            title=f"Mean over {len(folds)} folds",
            rows=mean,
            note="±: standard deviation between folds. The folder of each fold has its own report.",
        )
    ]
    for fold, table in zip(folds, accuracies, strict=True):
        tables.append(table.model_copy(update={"title": f"Fold {fold}"}))
    return results[0].model_copy(
        update={
            "data": tuple(data for each in results for data in each.data),
            "settings": {**results[0].settings, FOLDS: list(folds)},
            "undecodable": sum(each.undecodable for each in results),
            "tables": tuple(tables),
        }
    )
