"""What ranks do side by side, and fail in together: nobody waits for a rank that gave up."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from avid_pipeline.collectives import RankGroup
from avid_pipeline.errors import AvidPipelineError, CheckpointError

__all__ = ["Failure", "run_together", "try_together"]

Result = TypeVar("Result")


@dataclass(frozen=True)
class Failure:
    """How an action failed on the first rank that it failed on.

    Attributes:
        rank: that rank.
        kind: class of the error.
        reason: its message; it names the rank where there are several.
    """

    rank: int
    kind: type[AvidPipelineError]
    reason: str


@dataclass(frozen=True)
class _Outcome(Generic[Result]):
    result: Result | None
    failure: Failure | None


def try_together(group: RankGroup, action: Callable[[], Result]) -> tuple[list[Result], Failure | None]:
    """Do something on every rank, and learn how it went on all of them.

    Args:
        group: the ranks; each must call this.
        action: must not wait for other ranks; its result must be small and picklable.

    Returns:
        Every rank's result in rank order (nothing if some rank failed), and the failure, on every rank the same.

    Raises:
        Exception: whatever is no error of ours and ``action`` raised on this rank; the others are told of it.
    """
    unexpected: Exception | None = None
    result: Result | None = None
    failure: Failure | None = None
    try:
        result = action()
    except AvidPipelineError as error:
        failure = Failure(group.rank, type(error), str(error))
    except Exception as error:  # noqa: BLE001 (raised below: first the others, who wait, must hear of it)
        unexpected = error
        failure = Failure(group.rank, AvidPipelineError, f"{type(error).__name__}: {error}")
    outcomes: list[_Outcome[Result]] = group.gather_objects(_Outcome(result, failure))
    if unexpected is not None:
        raise unexpected
    failures = [outcome.failure for outcome in outcomes if outcome.failure is not None]
    if not failures:
        return [outcome.result for outcome in outcomes], None  # type: ignore[misc]
    # A damaged checkpoint is passed over, so what else went wrong must not be mistaken for one.
    first = next((each for each in failures if not issubclass(each.kind, CheckpointError)), failures[0])
    reason = first.reason if group.size == 1 else f"rank {first.rank}: {first.reason}"
    return [], Failure(first.rank, first.kind, reason)


def run_together(group: RankGroup, action: Callable[[], Result]) -> list[Result]:
    """Do something on every rank; if it fails on one, all raise its error.

    Args:
        group: the ranks; each must call this.
        action: must not wait for other ranks; its result must be small and picklable.

    Returns:
        Every rank's result, in rank order.

    Raises:
        AvidPipelineError: of the kind that ``action`` raised on the first rank it failed on, which is named.
    """
    results, failure = try_together(group, action)
    if failure is not None:
        raise failure.kind(failure.reason)
    return results
