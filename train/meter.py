"""What a run measures between two lines of its log."""

import time

__all__ = ["Meter"]


class Meter:
    """Means of loss terms, clips a second and the share of time spent waiting for data, since the last line.

    Args:
        clips_per_step: clips of a global batch.
    """

    def __init__(self, clips_per_step: int) -> None:
        self._clips_per_step = clips_per_step
        self._sums: dict[str, float] = {}
        self._steps = 0
        self._waited = 0.0
        self._began = self._last = time.perf_counter()

    def waiting_begins(self) -> None:
        """All else of the last step is done: from now on it is the data that is waited for."""
        self._last = time.perf_counter()

    def data_arrived(self) -> None:
        """A batch is here: what passed since :meth:`waiting_begins` was waiting."""
        self._waited += time.perf_counter() - self._last

    def step_done(self, values: dict[str, float]) -> None:
        """A step ended with these losses and the like."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._steps += 1
        self._last = time.perf_counter()

    def pause(self) -> None:
        """What passed since the last step (a checkpoint, say) counts neither as waiting nor as training."""
        now = time.perf_counter()
        self._began += now - self._last
        self._last = now

    def take(self) -> dict[str, float]:
        """The means since the last call, which begin anew."""
        seconds = max(self._last - self._began, 1e-9)
        values = {name: total / self._steps for name, total in self._sums.items()}
        values["clips_per_second"] = self._steps * self._clips_per_step / seconds
        values["data_wait_share"] = self._waited / seconds
        self._sums, self._steps, self._waited = {}, 0, 0.0
        self._began = self._last
        return values
