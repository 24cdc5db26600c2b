"""Results and report of a classification."""

from collections.abc import Sequence
from typing import Any

from avid_pipeline.evaluate.checkpoint import EvaluatedModel
from avid_pipeline.evaluate.classification.data import Task
from avid_pipeline.evaluate.classification.testing import Outcome
from avid_pipeline.evaluate.classification.training import Epoch
from avid_pipeline.evaluate.report import Confusion, Curves, Report
from avid_pipeline.evaluate.results import Results, Rows, Table, versions

__all__ = ["make_report", "planned_results"]


def planned_results(command: str, evaluated: EvaluatedModel, task: Task, settings: dict[str, Any]) -> Results:
    """Results without tables: what is evaluated on what, and how.

    Args:
        command: ``finetune`` or ``linear``.
        evaluated: the model.
        task: its data.
        settings: as plain data.
    """
    return Results(
        command=command,
        checkpoint=evaluated.identity,
        data=(task.train.identity(), task.test.identity()),
        settings=settings,
        versions=versions(),
        tables=(),
    )


def make_report(
    planned: Results,
    classes: tuple[str, ...],
    names: Sequence[str],
    by_clip: Outcome,
    by_video: Outcome,
    history: Sequence[Epoch],
) -> Report:
    """What a finished classification came to.

    Args:
        planned: of :func:`planned_results`.
        classes: C names.
        names: of the classifiers.
        by_clip: the final test for Clip@k.
        by_video: the final test for Video@k, the mean class accuracy and the confusion matrix.
        history: all epochs.

    Returns:
        The report; its confusion matrix is that of the classifier with the best Video@1.
    """
    rows: Rows = {}
    for name in names:
        clip, video = by_clip.clip_accuracy(name).at, by_video.video_accuracy(name).at
        rows[name] = {
            "Clip@1": clip[1],
            "Clip@5": clip[5],
            "Video@1": video[1],
            "Video@5": video[5],
            "mean class": by_video.mean_class_accuracy(name, len(classes)),
        }
    accuracy = Table(title="Accuracy", rows=rows, note=_note(by_clip, by_video))
    epochs = [_epochs_table(name, history, named=len(names) > 1) for name in names]
    results = planned.model_copy(update={"undecodable": by_video.undecodable, "tables": (accuracy, *epochs)})
    best = max(names, key=lambda name: rows[name]["Video@1"] or 0.0)
    title = "Test instances by class" if len(names) == 1 else f"Test instances by class, by the classifier of {best}"
    confusion = Confusion(title, classes, by_video.confusion(best, len(classes)).numpy())
    return Report(results, (confusion,), _curves(names, history))


def _note(by_clip: Outcome, by_video: Outcome) -> str:
    clips, videos = by_clip.found.shape[1], by_video.found.shape[1]
    parts = [
        f"Clip@k over {clips} clips of each instance, each by itself; Video@k by the mean softmax of {videos} clips. "
        f"{len(by_video.labels):,} test instances."
    ]
    if by_video.unlabelled:
        parts.append(f"{by_video.unlabelled:,} of them have no label and are left out.")
    missing = int((~by_clip.found).sum() + (~by_video.found).sum())
    if missing:
        parts.append(f"{missing:,} clips could not be decoded and are left out.")
    return " ".join(parts)


def _epochs_table(name: str, history: Sequence[Epoch], *, named: bool) -> Table:
    """Everything that the curves show of a classifier, as numbers."""
    rows: Rows = {}
    for number, epoch in enumerate(history, start=1):
        row: dict[str, float | None] = {"loss": epoch.loss[name], "training": epoch.training[name]}
        row["Clip@1"], row["Clip@5"] = epoch.clip.get(name, (None, None))
        row["Video@1"], row["Video@5"] = epoch.video.get(name, (None, None))
        rows[f"{number} ({epoch.stage})"] = row
    return Table(
        title=f"Epochs: {name}" if named else "Epochs",
        rows=rows,
        note="Losses and training accuracies are means over augmented training clips while they were learned from.",
    )


def _curves(names: Sequence[str], history: Sequence[Epoch]) -> tuple[Curves, ...]:
    """Loss and accuracies: one picture of these for a single classifier, else one for each kind."""
    pictures = {"Loss": _line_of_each(names, [epoch.loss for epoch in history])}
    training = [{name: 100 * share for name, share in epoch.training.items()} for epoch in history]
    tests = [{name: 100 * at[0] for name, at in epoch.video.items() if at[0] is not None} for epoch in history]
    accuracies = {"training clips": training, "test instances": tests}
    if len(names) > 1:
        pictures |= {f"Accuracy of {what}": _line_of_each(names, values) for what, values in accuracies.items()}
    else:
        lines = {what: _line_of_each(names, values)[names[0]] for what, values in accuracies.items()}
        pictures["Accuracy after each epoch"] = lines
    labels = dict.fromkeys(pictures, "top-1 accuracy, %") | {"Loss": "mean loss of training clips"}
    return tuple(Curves(title, "epoch", labels[title], lines) for title, lines in pictures.items())


def _line_of_each(names: Sequence[str], values: Sequence[dict[str, float]]) -> dict[str, list[tuple[float, float]]]:
    """Classifier to its points; an epoch may have none."""
    return {
        name: [(number, of_epoch[name]) for number, of_epoch in enumerate(values, start=1) if name in of_epoch]
        for name in names
    }
