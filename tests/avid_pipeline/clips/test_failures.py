"""Samples that cannot be decoded inside sound shards."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from avid_pipeline.clips.failures import Failure, FailurePolicy
from avid_pipeline.clips.loader import ClipLoader, evaluation_batches
from avid_pipeline.clips.reading import EvaluationChoice, TrainingChoice
from avid_pipeline.clips.settings import AugmentationSettings, ClipSettings
from avid_pipeline.errors import DecodeError, SampleError
from avid_pipeline.shards_spec.manifest import MANIFEST_NAME, Manifest
from avid_pipeline.shards_spec.reader import ShardReader, open_dataset
from avid_pipeline.shards_spec.sample import Sample
from avid_pipeline.shards_spec.shard_file import ShardWriter
from avid_pipeline.streams.plan import plan
from avid_pipeline.streams.substitution import Substitutes

CLIP = ClipSettings(crop_size=16)
CHOICE = TrainingChoice(seed=0, epoch=0, augmentation=AugmentationSettings())
BROKEN = 5


@pytest.fixture(scope="module")
def broken_dataset(small_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small data set, but the video of one sample is noise; all checksums fit."""
    return break_sample(small_dataset, tmp_path_factory.mktemp("broken"), no_pictures)


def no_pictures(sample: Sample) -> Sample:
    assert sample.video is not None
    start = sample.video.index(b"mdat") + 4
    return replace(sample, video=sample.video[:start] + bytes(len(sample.video) - start))


def unknown_codec(sample: Sample) -> Sample:
    assert sample.video is not None
    return replace(sample, video=sample.video.replace(b"avc1", b"zzzz"))


def cut_sound(sample: Sample) -> Sample:
    assert sample.spectrogram is not None
    return replace(sample, spectrogram=sample.spectrogram[:60])


def smaller_picture(sample: Sample) -> Sample:
    assert sample.record.video is not None
    video = sample.record.video.model_copy(update={"width": 640, "height": 480})
    return replace(sample, record=sample.record.model_copy(update={"video": video}))


def break_sample(small_dataset: Path, root: Path, damage: Callable[[Sample], Sample]) -> Path:
    reader = open_dataset(small_dataset)
    shards = []
    for shard in reader.manifest.shards:
        with ShardWriter(root / shard.name) as writer:
            for place, sample in enumerate(reader.read_shard(shard)):
                writer.add(damage(sample) if shard.first_index + place == BROKEN else sample)
            finished = writer.finish()
        (root / shard.index_name).write_bytes(finished.index.to_bytes())
        shards.append(shard.model_copy(update={"bytes": finished.bytes, "sha256": finished.sha256}))
    manifest = Manifest(**{**reader.manifest.__dict__, "shards": tuple(shards)})
    (root / MANIFEST_NAME).write_bytes(manifest.to_json())
    return root


def load(
    reader: ShardReader, world_size: int = 1, max_rate: float = 1.0, operators: str = "opencv"
) -> tuple[dict[int, set[tuple[int, int]]], list[Failure], FailurePolicy]:
    """Step to its (instance, visit) pairs over all ranks; what was reported; and the last rank's policy."""
    order = plan(reader.manifest, seed=0, epoch=0, clips_per_instance=3, global_batch_size=4)
    substitutes = Substitutes(order, torch.arange(len(reader)).numpy(), seed=0, epoch=0)
    reported: list[Failure] = []
    steps: dict[int, set[tuple[int, int]]] = {}
    for rank in range(world_size):
        policy = FailurePolicy(substitutes, max_rate, reported.append)
        loader = ClipLoader(
            reader,
            order.rank_batches(rank, world_size),
            CLIP,
            CHOICE,
            workers=2,
            failures=policy,
            operators=operators,  # type: ignore[arg-type]
        )
        for step, batch in enumerate(loader):
            pairs = zip(batch["index"].tolist(), batch["visit"].tolist(), strict=True)
            steps.setdefault(step, set()).update(pairs)
            assert torch.isfinite(batch["video"]).all()
    return steps, reported, policy


@pytest.mark.parametrize("operators", ["opencv", "dali"])
def test_another_instance_takes_the_place_the_same_on_any_ranks(broken_dataset: Path, operators: str) -> None:
    reader = open_dataset(broken_dataset)
    steps, reported, policy = load(reader, operators=operators)
    assert [failure.instance for failure in reported] == [BROKEN]
    assert "video" in reported[0].reason
    assert 1 <= policy.failures <= 3
    assert policy.clips == 28 + policy.failures
    order = plan(reader.manifest, seed=0, epoch=0, clips_per_instance=3, global_batch_size=4)
    for step, found in steps.items():
        planned = order.global_batch(step)
        pairs = set(zip(planned.instances.tolist(), planned.visits.tolist(), strict=True))
        assert len(found) == 4
        replaced = {pair for pair in pairs if pair[0] == BROKEN}
        assert pairs - found == replaced
        assert {instance for instance, _ in found - pairs}.isdisjoint(planned.instances.tolist())
    elsewhere, _, _ = load(reader, world_size=2, operators=operators)
    assert elsewhere == steps


@pytest.mark.parametrize("operators", ["opencv", "dali"])
@pytest.mark.parametrize("damage", [unknown_codec, cut_sound, smaller_picture])
def test_whatever_is_wrong_with_a_sample_it_is_replaced(
    small_dataset: Path, tmp_path: Path, damage: Callable[[Sample], Sample], operators: str
) -> None:
    reader = open_dataset(break_sample(small_dataset, tmp_path, damage))
    steps, reported, _ = load(reader, operators=operators)
    assert [failure.instance for failure in reported] == [BROKEN]
    assert all(len(pairs) == 4 for pairs in steps.values())


def test_too_many_failures_are_an_error() -> None:
    policy = FailurePolicy(lambda number, instance, visit, attempt: 100 + instance, max_rate=0.1)

    def read(instance: int) -> int:
        if instance < 100 and instance % 4 == 0:
            raise DecodeError(f"sample {instance}: no frames")
        return instance

    for instance in range(40):
        made = policy.make(0, instance, 0, read)
        assert made == (100 + instance if instance % 4 == 0 else instance)
    assert (policy.failures, policy.clips) == (10, 50)
    with pytest.raises(SampleError, match=r"11 of 51 clips.*0\.1.*sample 40: no frames.*validate --deep"):
        policy.make(0, 40, 0, read)


def test_a_sample_whose_substitutes_all_fail_is_an_error() -> None:
    def read(instance: int) -> int:
        raise DecodeError("no frames")

    with pytest.raises(SampleError, match="cannot be decoded"):
        FailurePolicy(lambda *_: 1, max_rate=1.0).make(0, 0, 0, read)


def test_evaluation_replaces_nothing(broken_dataset: Path) -> None:
    loader = ClipLoader(open_dataset(broken_dataset), evaluation_batches(10, 1, 4), CLIP, EvaluationChoice(1))
    with pytest.raises(DecodeError, match="video"):
        list(loader)


def test_substitutes_are_drawn_from_the_given_instances_outside_of_the_batch(small_dataset: Path) -> None:
    reader = open_dataset(small_dataset)
    order = plan(reader.manifest, seed=0, epoch=0, clips_per_instance=1, global_batch_size=4)
    drawn = set()
    instances = torch.arange(0, 10, 2).numpy()
    substitutes = Substitutes(order, instances, seed=3, epoch=1)
    taken = set(order.global_batch(1).instances.tolist())
    for attempt in range(30):
        first = substitutes(1, 7, 0, attempt)
        assert first == Substitutes(order, instances, seed=3, epoch=1)(1, 7, 0, attempt)
        drawn.add(first)
    assert drawn == set(instances.tolist()) - taken
    everything = torch.tensor(sorted(taken)).numpy()
    assert Substitutes(order, everything, seed=3, epoch=1)(1, 7, 0, 0) == 7
