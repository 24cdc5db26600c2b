"""What a run tells: a line on the terminal and in ``train.log``, ``metrics.jsonl``, and TensorBoard."""

import json
import re
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from avid_pipeline.shards_spec.storage import Storage

METRICS_NAME = "metrics.jsonl"


class RunLog:
    """Writes the logs of one run; use it as a context manager.

    Args:
        folder: local folder to write to.
        quiet: write nothing anywhere but warnings (ranks other than the first).
        copy_to: the run's root where that is an object store: :meth:`publish` copies the logs there.
    """

    def __init__(self, folder: Path, quiet: bool = False, copy_to: Storage | None = None) -> None:
        self.folder = folder
        self._quiet = quiet
        self._copy_to = copy_to
        self._metrics: TextIO | None = None
        self._board: SummaryWriter | None = None
        self._bar: tqdm[Any] | None = None
        if quiet:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._fetch()
        self._text = (folder / "train.log").open("a", encoding="utf-8")

    def begin(self, total_steps: int, first_step: int) -> None:
        """Training begins; later entries of an interrupted run are dropped from ``metrics.jsonl``.

        Args:
            total_steps: of the whole run, for the progress bar.
            first_step: where this process starts.
        """
        if self._quiet:
            return
        metrics = self.folder / METRICS_NAME
        _drop_after(metrics, first_step)
        self._metrics = metrics.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=first_step + 1)
        hidden = not sys.stderr.isatty()
        self._bar = tqdm(total=total_steps, initial=first_step, unit="step", disable=hidden, desc="train")

    def advance(self) -> None:
        """One step is done."""
        if self._bar is not None:
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
            epoch: of that step, from 0.
            values: name to number; names are TensorBoard tags such as ``loss/total``. The terminal does not show the
                two directions of every term of the loss.
        """
        if self._metrics is None or self._board is None:
            return
        self._metrics.write(json.dumps({"step": step, "epoch": epoch, **values}) + "\n")
        self._metrics.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        shown = "  ".join(f"{_short(name)} {value:.4g}" for name, value in values.items() if not _is_direction(name))
        self.say(f"epoch {epoch + 1}  step {step}  {shown}")

    def publish(self) -> None:
        """Copy the logs to the run's root, where that is not this folder.

        Raises:
            StorageError: the root cannot be written.
        """
        if self._quiet or self._copy_to is None:
            return
        if self._board is not None:
            self._board.flush()
        for path in sorted(self.folder.rglob("*")):
            if path.is_file() and not path.name.endswith(".partial"):
                self._copy_to.write(path.relative_to(self.folder).as_posix(), path.read_bytes())

    def _fetch(self) -> None:
        """A run that goes on on another machine goes on in its logs."""
        for name in (METRICS_NAME, "train.log"):
            if self._copy_to is not None and self._copy_to.exists(name):
                (self.folder / name).write_bytes(self._copy_to.read(name))

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._quiet:
            return
        if error is not None:
            self._text.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} ended by {type(error).__name__}: {error}\n")
        for part in (self._bar, self._board, self._metrics, self._text):
            if part is not None:
                part.close()


def log_folder(root: Storage) -> Path:
    """Where a run with this root writes its logs: there, or in ``avid-train-logs/`` for one in an object store."""
    if root.local_root is not None:
        return root.local_root
    return Path("avid-train-logs") / re.sub(r"[^A-Za-z0-9.-]+", "-", root.url).strip("-")


def _is_direction(name: str) -> bool:
    return name.startswith("loss/") and "_to_" in name


def _short(name: str) -> str:
    return name.removeprefix("loss/")


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The entries of a run's ``metrics.jsonl``, in order."""
    path = folder / METRICS_NAME
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
