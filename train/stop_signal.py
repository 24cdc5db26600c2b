"""SIGTERM as a wish: the step under way is finished, a checkpoint is written, and then the run stops."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

from avid_pipeline.collectives import RankGroup

__all__ = ["StopSignal"]


class StopSignal:
    """Notes a SIGTERM while it is entered, instead of ending the process.

    Schedulers send one before they take a machine away. Outside of the main thread, where Python allows no signal
    handlers, it notes nothing.

    Args:
        group: the ranks that must stop at the same step.
    """

    def __init__(self, group: RankGroup) -> None:
        self._group = group
        self._received = False
        self._before: Any = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = True

    def on_any_rank(self) -> bool:
        """Whether some rank has received one; all ranks must ask, and all get the same answer."""
        return self._group.any(self._received)
