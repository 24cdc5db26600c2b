"""What a run tells: a line on the terminal and in ``train.log``, ``metrics.jsonl``, and TensorBoard."""

import json
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import TextIO

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


class RunLog:
    """Writes the logs of one run folder; use it as a context manager.

    Args:
        folder: the run's folder.
        total_steps: of the whole run, for the progress bar.
        first_step: where this process starts; later lines of an interrupted run are dropped from ``metrics.jsonl``.
        quiet: write nothing anywhere but warnings (ranks other than the first).
    """

    def __init__(self, folder: Path, total_steps: int, first_step: int = 0, quiet: bool = False) -> None:
        self._quiet = quiet
        self._files: list[TextIO] = []
        if quiet:
            return
        folder.mkdir(parents=True, exist_ok=True)
        metrics = folder / "metrics.jsonl"
        _drop_after(metrics, first_step)
        self._text = (folder / "train.log").open("a", encoding="utf-8")
        self._metrics = metrics.open("a", encoding="utf-8")
        self._files = [self._text, self._metrics]
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)
        self._bar = tqdm(
            total=total_steps, initial=first_step, unit="step", disable=not sys.stderr.isatty(), desc="train"
        )

    def advance(self) -> None:
        """One step is done."""
        if not self._quiet:
            self._bar.update()

    def say(self, message: str) -> None:
        """A line for people."""
        if self._quiet:
            return
        self._text.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}\n")
        self._text.flush()
        tqdm.write(message, file=sys.stdout)
        sys.stdout.flush()

    def warn(self, message: str) -> None:
        """A line about something that went wrong; ranks other than the first write it to standard error."""
        if self._quiet:
            tqdm.write(f"warning: {message}", file=sys.stderr)
        else:
            self.say(f"warning: {message}")

    def metrics(self, step: int, epoch: int, values: dict[str, float]) -> None:
        """Numbers of a step: to the terminal, ``metrics.jsonl`` and TensorBoard.

        Args:
            step: steps done since the run began.
            epoch: from 0.
            values: name to number; names are TensorBoard tags such as ``loss/total``.
        """
        if self._quiet:
            return
        self._metrics.write(json.dumps({"step": step, "epoch": epoch, **values}) + "\n")
        self._metrics.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        shown = "  ".join(f"{name.split('/')[-1]} {value:.4g}" for name, value in values.items())
        self.say(f"epoch {epoch + 1}  step {step}  {shown}")

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._quiet:
            return
        self._bar.close()
        self._board.close()
        for file in self._files:
            file.close()


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The entries of a run's ``metrics.jsonl``, in order."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:
            break  # a line cut short when the run was killed
    return entries


def _drop_after(path: Path, step: int) -> None:
    """Remove entries that a resumed run will write again."""
    if not path.exists():
        return
    kept = [entry for entry in read_metrics(path.parent) if entry["step"] <= step]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")
    partial.replace(path)
