"""The folder of one evaluation: what is done of it, in ``progress.pt``, and in the end its results."""

import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from avid_pipeline.collectives import RankGroup
from avid_pipeline.errors import CheckpointError, ConfigError, StorageError
from avid_pipeline.evaluate.classification.config import FREE_TO_CHANGE
from avid_pipeline.evaluate.report import Report, write_report
from avid_pipeline.evaluate.results import REPORT_NAME, RESULTS_NAME, Results, read_results
from avid_pipeline.models.torch_file import read_torch_dict
from avid_pipeline.shards_spec.storage import WRITING_PREFIX, Storage
from avid_pipeline.together import run_together

__all__ = ["MODEL_NAME", "PROGRESS_NAME", "EvaluationFolder", "Identity"]

PROGRESS_NAME = "progress.pt"
MODEL_NAME = "model.safetensors"

_VERSION = 1
_PIECE_BYTES = 8 << 20


@dataclass(frozen=True)
class Identity:
    """What an evaluation is of: only the same one goes on, and only its results are shown.

    Attributes:
        facts: name to plain value, nested.
    """

    facts: dict[str, Any]

    @classmethod
    def of(cls, results: Results) -> "Identity":
        """Of results; those of an evaluation that is not done may have no tables yet."""
        checkpoint = results.checkpoint
        return cls(
            {
                "command": results.command,
                # The same weights may lie elsewhere now; random ones have no file, and their path is their seed.
                "checkpoint": checkpoint.key,
                "data": {
                    data.role: {"fingerprint": data.fingerprint, "subset": data.subset, "instances": data.instances}
                    for data in results.data
                },
                "settings": results.settings,
            }
        )

    def differences(self, now: "Identity") -> list[str]:
        """``field was … and is now …`` for everything that may not change."""
        return _differences(self.facts, now.facts, "")


class EvaluationFolder:
    """Where an evaluation keeps its progress and its results; all ranks use it together.

    Args:
        root: the folder.
        planned: the results without tables: what is evaluated on what, and how.
        group: the ranks; all see the same root.
    """

    def __init__(self, root: Storage, planned: Results, group: RankGroup) -> None:
        self.root = root
        self.planned = planned
        self.group = group
        self._identity = Identity.of(planned)

    def begin(self, *, overwrite: bool) -> Results | None:
        """The results that are there already, or None where there is something to do.

        Args:
            overwrite: remove what an earlier evaluation left.

        Raises:
            ConfigError: the folder holds another evaluation; the message says what differs.
            ResultsError: the results that are there are damaged.
            StorageError: the root cannot be read or written.
        """
        return run_together(self.group, lambda: self._begin(overwrite) if self.group.rank == 0 else None)[0]

    def _begin(self, overwrite: bool) -> Results | None:
        self._remove_remains()
        if overwrite:
            # The results first: while they are there, they say that everything else is.
            for name in (RESULTS_NAME, REPORT_NAME, MODEL_NAME, PROGRESS_NAME):
                self.root.delete(name)
        if not self.root.exists(RESULTS_NAME):
            return None
        results = read_results(self.root)
        self._check_same(Identity.of(results), RESULTS_NAME)
        self.root.delete(PROGRESS_NAME)
        return results

    def read_progress(self) -> dict[str, Any] | None:
        """What :meth:`write_progress` wrote last; None where the evaluation has not begun.

        Raises:
            CheckpointError: the file is damaged.
            ConfigError: it is of another evaluation, or ranks do not see the same root.
            StorageError: it cannot be read.
        """
        found: list[dict[str, Any] | None] = []

        def read() -> Any:
            found.append(self._read_progress() if self.root.exists(PROGRESS_NAME) else None)
            return found[0] and found[0]["place"]

        places = run_together(self.group, read)
        if any(place != places[0] for place in places):
            raise ConfigError(
                f"{self.root.url}: ranks find different progress here ({', '.join(map(str, places))}); --output must "
                "be a folder that all machines share, or the URL of an object store"
            )
        return found[0]

    def _read_progress(self) -> dict[str, Any]:
        where, remedy = self.root.url_of(PROGRESS_NAME), "give --overwrite to begin anew, or remove the file"
        data = self.root.read(PROGRESS_NAME)
        try:
            # torch does not compare the checksums of what it loads.
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                damaged = archive.testzip()
        except (zipfile.BadZipFile, EOFError, ValueError, OSError) as error:
            raise CheckpointError(f"{where}: is damaged ({error}); {remedy}") from error
        if damaged is not None:
            raise CheckpointError(f"{where}: is damaged ({damaged} does not have its checksum); {remedy}")
        content = read_torch_dict(where, data)
        if content.get("version") != _VERSION or "place" not in content or "identity" not in content:
            raise CheckpointError(
                f"{where}: version: expected {_VERSION}, found {content.get('version')!r}: it was written by another "
                f"release, or is another file; {remedy}"
            )
        self._check_same(Identity(content["identity"]), PROGRESS_NAME)
        return content

    def write_progress(self, place: Mapping[str, int], content: Mapping[str, Any]) -> None:
        """Write ``progress.pt`` at once; the first rank does it, all wait.

        Args:
            place: where the evaluation stands.
            content: tensors and plain values, on the first rank.

        Raises:
            StorageError: the root cannot be written.
        """

        def write() -> None:
            if self.group.rank > 0:
                return
            buffer = io.BytesIO()
            torch.save({"version": _VERSION, "place": dict(place), "identity": self._identity.facts, **content}, buffer)
            self._write_durably(PROGRESS_NAME, buffer.getbuffer())

        run_together(self.group, write)

    def finish(self, report: Report, weights: Mapping[str, Tensor]) -> None:
        """Write the weights, the report and the results, these last; then the progress goes.

        Args:
            report: with the results.
            weights: of what was trained, by name.

        Raises:
            StorageError: the root cannot be written.
        """

        def write() -> None:
            if self.group.rank > 0:
                return
            on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
            self._write_durably(MODEL_NAME, memoryview(safetensors.torch.save(on_cpu)))
            write_report(self.root, report)
            self.root.delete(PROGRESS_NAME)

        run_together(self.group, write)

    def _remove_remains(self) -> None:
        """Remove what a write that was killed left."""
        for path in list(self.root.local_root.iterdir()) if self.root.local_root is not None else []:
            if path.name.startswith(WRITING_PREFIX) and path.name.endswith((PROGRESS_NAME, MODEL_NAME)):
                try:
                    path.unlink(missing_ok=True)
                except OSError as error:
                    raise StorageError(f"{path}: cannot remove: {error.strerror}; remove it by hand") from error

    def _check_same(self, found: Identity, name: str) -> None:
        differences = found.differences(self._identity)
        if differences:
            raise ConfigError(
                f"{self.root.url_of(name)}: is of another evaluation: {'; '.join(differences)}; give another --output, "
                "or --overwrite to begin anew"
            )

    def _write_durably(self, name: str, data: memoryview) -> None:
        # On disk even if the machine loses power: the old file is gone by then.
        pieces = (bytes(data[start : start + _PIECE_BYTES]) for start in range(0, len(data), _PIECE_BYTES))
        self.root.write_pieces(name, pieces, len(data))


def _differences(before: Any, now: Any, field: str) -> list[str]:
    if field.removeprefix("settings.") in FREE_TO_CHANGE:
        return []
    if isinstance(before, dict) and isinstance(now, dict):
        return [
            difference
            for key in sorted(before.keys() | now.keys())
            for difference in _differences(before.get(key), now.get(key), f"{field}.{key}" if field else key)
        ]
    return [] if before == now else [f"{field} was {before!r} and is now {now!r}"]
