"""Computing features of a data set into a store, by any number of ranks."""

import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from avid_pipeline.clips.batch import ClipBatch
from avid_pipeline.clips.failures import Failure, FailurePolicy
from avid_pipeline.clips.loader import ClipLoader
from avid_pipeline.clips.loading import LoadingSettings, open_cache, sample_fetcher
from avid_pipeline.clips.reading import ClipChoice, EvaluationChoice, TrainingChoice
from avid_pipeline.clips.settings import ClipSettings
from avid_pipeline.collectives import RankGroup
from avid_pipeline.embedding import evaluation_mode
from avid_pipeline.errors import ConfigError
from avid_pipeline.evaluate.checkpoint import EvaluatedModel
from avid_pipeline.evaluate.data import EvaluationData
from avid_pipeline.evaluate.feature_store import Block, FeatureStore, create_store, open_store
from avid_pipeline.evaluate.layers import compute_features, feature_dim, modalities_of
from avid_pipeline.models import AVModel
from avid_pipeline.shards_spec.manifest import fingerprint
from avid_pipeline.shards_spec.storage import Storage
from avid_pipeline.streams.batches import Batch
from avid_pipeline.together import run_together

__all__ = ["FeatureRequest", "extract_features"]

Precision = Literal["float32", "bfloat16"]

_LARGEST_HALF = 65504.0


@dataclass(frozen=True)
class FeatureRequest:
    """What to compute.

    Attributes:
        names: of the features, see :mod:`avid_pipeline.evaluate.layers`.
        clips: of each instance.
        choice: how clips are chosen: evenly spread, or drawn and augmented as for training.
        batch_size: clips in a forward pass.
        dtype: that features are stored as.
        precision: of convolutions and matrix products.
        clip: length and size of clips; None for those that the model was trained on.
    """

    names: tuple[str, ...]
    clips: int = 10
    choice: ClipChoice | None = None
    batch_size: int = 32
    dtype: Literal["float32", "float16"] = "float32"
    precision: Precision = "float32"
    clip: ClipSettings | None = None


def extract_features(
    evaluated: EvaluatedModel,
    data: EvaluationData,
    request: FeatureRequest,
    storage: Storage,
    group: RankGroup,
    *,
    loading: LoadingSettings,
    say: Callable[[str], object],
) -> FeatureStore:
    """Compute what is missing of the features of a data set; every rank calls this.

    A batch never spans two chunks of the store, so the features are the same on any number of ranks, and whether or not
    the work was interrupted.

    Args:
        evaluated: the model.
        data: the instances.
        request: which features.
        storage: where they are, or go.
        group: the ranks, which divide the chunks.
        loading: how clips are read.
        say: is told of clips that cannot be decoded, and of features that are there already.

    Returns:
        The finished store.

    Raises:
        ConfigError: the data lack a modality, the store holds something else, or features are not finite.
        StorageError: the store cannot be read or written.
        ShardError: a shard is damaged.
        SampleError: too many clips cannot be decoded.
    """
    clip = data.clip_settings(request.clip or evaluated.clip, modalities_of(request.names))

    def begin() -> list[Block]:
        if group.rank > 0:
            return []
        store = _create(evaluated, data, request, clip, storage)
        missing, count = store.missing(), len(store.blocks())
        if len(missing) < count:
            say(f"{storage.url}: {count - len(missing)} of {count} parts of the features are there already")
        return missing

    missing = run_together(group, begin)[0]
    own = missing[group.rank * len(missing) // group.size : (group.rank + 1) * len(missing) // group.size]
    is_first = group.rank == 0
    run_together(
        group,
        lambda: _write_blocks(evaluated, data, request, clip, storage, own, loading, say, show_progress=is_first),
    )
    return open_store(storage)


def _create(
    evaluated: EvaluatedModel, data: EvaluationData, request: FeatureRequest, clip: ClipSettings, storage: Storage
) -> FeatureStore:
    choice = request.choice
    description = {
        "checkpoint": evaluated.identity.key,
        "data": data.identity().model_dump(mode="json", exclude={"role", "url"}),
        "clip": clip.model_dump(mode="json"),
        "augmented": None
        if not isinstance(choice, TrainingChoice)
        else {"seed": choice.seed, "epoch": choice.epoch, **choice.augmentation.model_dump(mode="json")},
        "precision": request.precision,
        "statistics": None if "audio" not in (clip.modalities or ()) else _fingerprint(evaluated, data),
    }
    dims = {name: feature_dim(name, evaluated.model) for name in request.names}
    return create_store(
        storage, data.instances, request.clips, dims, len(data.classes), description, dtype=request.dtype
    )


def _fingerprint(evaluated: EvaluatedModel, data: EvaluationData) -> str | None:
    """Of what sound is normalised with."""
    statistics = evaluated.statistics or data.manifest.spectrogram_statistics
    return None if statistics is None else fingerprint(statistics.model_dump(mode="json"))


def _write_blocks(
    evaluated: EvaluatedModel,
    data: EvaluationData,
    request: FeatureRequest,
    clip: ClipSettings,
    storage: Storage,
    blocks: Sequence[Block],
    loading: LoadingSettings,
    say: Callable[[str], object],
    *,
    show_progress: bool,
) -> None:
    """Compute and write these chunks, each as soon as its last batch is done."""
    if not blocks:
        return
    store = open_store(storage, complete=False)
    batches = [_batches(store, block, request.batch_size) for block in blocks]
    loader = ClipLoader(
        data.reader,
        [batch for of_block in batches for batch in of_block],
        clip,
        request.choice or EvaluationChoice(request.clips),
        statistics=evaluated.statistics,
        device=loading.device,
        operators=loading.operators,
        workers=loading.workers,
        failures=leave_out(data, loading.max_failure_rate, say),
        fetcher=partial(sample_fetcher, settings=loading, cache=open_cache(loading, data.reader)),
    )
    hidden = not (show_progress and sys.stderr.isatty())
    with closing(iter(loader)) as clips, tqdm(total=len(loader), unit="batch", disable=hidden, desc="features") as bar:
        for block, wanted in zip(blocks, batches, strict=True):
            computed = []
            for batch in wanted:
                computed.append(_compute(evaluated.model, request, batch, next(clips)))
                bar.update()
            _write(store, block, computed)


def _batches(store: FeatureStore, block: Block, batch_size: int) -> list[Batch]:
    instances = store.index[block.start : block.stop]
    pieces = [instances[start : start + batch_size] for start in range(0, len(instances), batch_size)]
    return [Batch(piece, np.full(len(piece), block.clip, dtype=np.int64)) for piece in pieces]


@dataclass(frozen=True)
class _Computed:
    features: dict[str, Tensor]
    labels: list[tuple[int, ...]]
    found: Tensor


@torch.inference_mode()
def _compute(model: AVModel, request: FeatureRequest, wanted: Batch, clips: ClipBatch) -> _Computed:
    weight = next(model.parameters())
    inputs: dict[str, Tensor] = {}
    for modality in modalities_of(request.names):
        inputs[modality] = clips[modality].to(weight.device, weight.dtype)
    autocast = torch.autocast(weight.device.type, torch.bfloat16, enabled=request.precision == "bfloat16")
    with evaluation_mode(model), autocast:
        features = compute_features(model, request.names, inputs)
    # Another instance stands where one could not be decoded.
    found = clips["index"] == torch.from_numpy(wanted.instances)
    labels = [each if ok else () for each, ok in zip(clips["labels"], found.tolist(), strict=True)]
    on_host = {name: values.float().cpu() * found[:, None] for name, values in features.items()}
    return _Computed(on_host, labels, found)


def _write(store: FeatureStore, block: Block, computed: Sequence[_Computed]) -> None:
    features = {name: torch.cat([each.features[name] for each in computed]).numpy() for name in store.names}
    for name, values in features.items():
        if not np.isfinite(values).all():
            raise ConfigError(
                f"features {name}: the network's features hold NaN or infinite numbers; its training diverged: take an "
                "earlier checkpoint"
            )
    largest = max(float(np.abs(values).max()) for values in features.values())
    if store.description["dtype"] == "float16" and largest > _LARGEST_HALF:
        raise ConfigError("features: hold numbers beyond the range of float16; store them as float32")
    labels = [label for each in computed for label in each.labels]
    store.write(block, features, labels, torch.cat([each.found for each in computed]).numpy())


def leave_out(data: EvaluationData, max_rate: float, say: Callable[[str], object]) -> FailurePolicy:
    """Clips that cannot be decoded are reported and left out, up to a share of all.

    The loader puts another instance in their place, which its ``index`` tells.
    """

    # A lone instance has no neighbour; itself fails again, which is an error.
    def neighbour(number: int, instance: int, visit: int, attempt: int) -> int:
        place = int(np.searchsorted(data.instances, instance))
        return int(data.instances[(place + 1 + attempt) % len(data.instances)])

    def report(failure: Failure) -> None:
        say(f"warning: left out: {failure.reason}")

    return FailurePolicy(neighbour, max_rate, report)
