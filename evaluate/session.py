"""What the commands share: the ranks, the model on its device, and where results go."""

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from avid_pipeline.clips.loading import LoadingSettings
from avid_pipeline.collectives import RankGroup
from avid_pipeline.evaluate.checkpoint import EvaluatedModel, open_checkpoint
from avid_pipeline.evaluate.data import EvaluationData
from avid_pipeline.evaluate.extraction import FeatureRequest, extract_features
from avid_pipeline.evaluate.feature_store import FeatureStore, remove_store
from avid_pipeline.evaluate.results import REPORT_NAME, RESULTS_NAME
from avid_pipeline.process_group import in_process_group, join_process_group
from avid_pipeline.shards_spec.storage import Storage, is_remote, open_storage
from avid_pipeline.together import run_together

__all__ = ["Session", "choose_device", "evaluation_ranks", "open_session"]


@dataclass(frozen=True)
class Session:
    """One run of a command.

    Attributes:
        evaluated: the model.
        group: the ranks.
        loading: how clips are read.
        options: of object stores.
        random_weights: seed of the model's random weights; None for those of its checkpoint.
    """

    evaluated: EvaluatedModel
    group: RankGroup
    loading: LoadingSettings
    options: Mapping[str, str]
    random_weights: int | None = None

    def say(self, message: str) -> None:
        """A line for people; from the first rank to standard output, from others to standard error."""
        if self.group.rank == 0:
            tqdm.write(message, file=sys.stdout)
        else:
            tqdm.write(f"rank {self.group.rank}: {message}", file=sys.stderr)

    def default_output(self, checkpoint: str, name: str) -> str:
        """Where results go unless told otherwise: below a local run or checkpoint folder, else the current folder."""
        step = self.evaluated.identity.step
        which = None if self.random_weights is None else f"random-{self.random_weights}"
        if is_remote(checkpoint) or not Path(checkpoint).is_dir():
            stem = re.sub(r"[^A-Za-z0-9-]+", "-", checkpoint.rstrip("/").rpartition("/")[2])
            return str(Path("evaluation") / (which or stem) / name)
        which = which or ("weights" if step is None else f"step-{step:08d}")
        return str(Path(checkpoint) / "evaluation" / which / name)

    def output(self, url: str, overwritten: Sequence[str] | None = None) -> Storage:
        """Open an output on every rank.

        Results, and the features in the folders ``overwritten``, are removed first, unless that is None.

        Raises:
            StorageError: it cannot be written.
        """

        def begin() -> None:
            if self.group.rank == 0:
                root = open_storage(url, create=True, options=self.options)
                if overwritten is not None:
                    _clear(root, tuple(overwritten), self.options)

        run_together(self.group, begin)
        return open_storage(url, create=True, options=self.options)

    def features(self, data: EvaluationData, request: FeatureRequest, output: Storage, folder: str) -> FeatureStore:
        """Compute features of data into a folder of the output, or what is missing of them; all ranks call this.

        Raises:
            AvidPipelineError: see :func:`~avid_pipeline.evaluate.extraction.extract_features`.
        """
        storage = open_storage(output.url_of(folder), create=True, options=self.options)
        return extract_features(self.evaluated, data, request, storage, self.group, loading=self.loading, say=self.say)


@contextmanager
def evaluation_ranks() -> Iterator[RankGroup]:
    """The ranks that torchrun started, or this process alone.

    Raises:
        AvidPipelineError: other ranks did not come.
    """
    in_group = in_process_group()
    if in_group:
        join_process_group()
    yield RankGroup()
    # After an error the others may wait in a collective, and this would wait for them.
    if in_group:
        dist.destroy_process_group()


@contextmanager
def open_session(
    checkpoint: str,
    loading: LoadingSettings,
    options: Mapping[str, str],
    random_weights: int | None = None,
) -> Iterator[Session]:
    """Join the ranks and load the model on each.

    Args:
        checkpoint: see :func:`~avid_pipeline.evaluate.checkpoint.open_checkpoint`.
        loading: how clips are read.
        options: of object stores.
        random_weights: seed of random weights that take the place of the checkpoint's; None for the checkpoint's.

    Raises:
        AvidPipelineError: other ranks did not come, or the checkpoint cannot be used.
    """
    with evaluation_ranks() as group:
        evaluated = open_checkpoint(checkpoint, options, random_weights=random_weights, device=choose_device())
        # A run that is still training may have moved on between two ranks' looks at it.
        group.require_equal({"checkpoint": evaluated.identity.key})
        yield Session(evaluated, group, loading, options, random_weights)


def choose_device() -> torch.device:
    """The GPU of this process, or the CPU where there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _clear(root: Storage, folders: Sequence[str], options: Mapping[str, str]) -> None:
    """Remove results, and the features in these folders, below a root, and nothing else."""
    for folder in folders:
        place = root if not folder else open_storage(root.url_of(folder), create=True, options=options)
        remove_store(place)
    if folders != ("",):
        for name in (RESULTS_NAME, REPORT_NAME):
            root.delete(name)
