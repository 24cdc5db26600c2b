"""Whole conversions: what is kept, tried again, refused, and what the manifest says of it."""

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from avid_pipeline.preprocess.build import ShardReport, ShardTask, build_shard
from avid_pipeline.preprocess.cli import main
from avid_pipeline.preprocess.errors import PreprocessError
from avid_pipeline.preprocess.ffmpeg import find_ffmpeg
from avid_pipeline.preprocess.job import plan_tasks, run_job
from avid_pipeline.preprocess.settings import Settings
from avid_pipeline.preprocess.sources.base import Source, SourceList
from avid_pipeline.preprocess.sources.kinetics import list_kinetics
from avid_pipeline.shards_spec.manifest import WITH_AUDIO, Manifest, Parameters, VideoParameters
from avid_pipeline.shards_spec.reader import open_dataset
from avid_pipeline.shards_spec.storage import open_storage
from avid_pipeline.shards_spec.validation import validate

PARAMETERS = Parameters(video=VideoParameters(short_side=48), samples_per_shard=4)


class InThisProcess:
    """An executor that counts what it builds."""

    def __init__(self) -> None:
        self.built: list[str] = []

    def run(self, tasks: list[ShardTask], on_source: Callable[[], object]) -> Iterator[ShardReport]:
        for task in tasks:
            self.built.append(task.name)
            yield build_shard(task, on_source)


@pytest.fixture
def tree(kinetics_tree: Path, tmp_path: Path) -> Path:
    """Ten sources, of which one is empty and one has no sound."""
    root = shutil.copytree(kinetics_tree, tmp_path / "tree")
    (root / "class 0" / "video000000.mp4").write_bytes(b"")
    silent = root / "class 1" / "video000001.mp4"
    command = [find_ffmpeg(), "-v", "error", "-i", kinetics_tree / "class 1" / silent.name, "-an", "-c", "copy"]
    subprocess.run([*command, "-y", silent], check=True, timeout=120)
    return root


def contents(root: Path, progress: bool = False) -> dict[str, bytes]:
    """All files below a root."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and (progress or "_progress" not in path.parts)
    }


def convert(listing: SourceList, out: Path, **options: object) -> Manifest:
    return run_job(listing, PARAMETERS, str(out), InThisProcess(), **options).manifest  # type: ignore[arg-type]


def test_mended_sources_are_tried_again_and_nothing_else(tree: Path, kinetics_tree: Path, tmp_path: Path) -> None:
    executor = InThisProcess()
    result = run_job(list_kinetics(tree), PARAMETERS, str(tmp_path / "out"), executor)
    assert {entry.reason for entry in result.quarantined} == {"empty_file", "no_audio_stream"}
    assert result.quarantined_fraction == 0.2
    shutil.copytree(kinetics_tree, tree, dirs_exist_ok=True)
    # What is converted already must not be read again.
    converted = {entry.source for entry in result.quarantined} ^ {source.name for source in list_kinetics(tree).sources}
    for name in converted:
        (tree / name).write_bytes(b"changed since")

    executor = InThisProcess()
    run_job(list_kinetics(tree), PARAMETERS, str(tmp_path / "out"), executor)
    assert executor.built == []
    counted: list[int] = []
    result = run_job(
        list_kinetics(tree),
        PARAMETERS,
        str(tmp_path / "out"),
        executor,
        retry_quarantined=True,
        on_planned=lambda total, done: counted.append(total - done),
        on_source=lambda: counted.append(-1),
    )
    assert sum(counted) == 0
    assert 1 <= len(executor.built) <= 2
    assert result.quarantined == ()
    fresh = tmp_path / "fresh"
    convert(list_kinetics(kinetics_tree), fresh)
    assert contents(tmp_path / "out") == contents(fresh)


def test_retry_converts_a_damaged_shard_from_its_sources(tree: Path, kinetics_tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quarantined = run_job(list_kinetics(tree), PARAMETERS, str(out), InThisProcess()).quarantined
    assert quarantined
    for path in out.glob("*.tar"):
        data = bytearray(path.read_bytes())
        data[2000] ^= 1
        path.write_bytes(data)
    for path in out.glob("shard-*.json"):
        path.unlink()
    shutil.copytree(kinetics_tree, tree, dirs_exist_ok=True)
    run_job(list_kinetics(tree), PARAMETERS, str(out), InThisProcess(), retry_quarantined=True)
    tasks = plan_tasks(list_kinetics(tree), PARAMETERS, str(out))
    rejected = {entry.source for entry in quarantined}
    built_again = {task.name for task in tasks if rejected & {planned.source.name for planned in task.sources}}
    problems = validate(open_storage(out)).problems
    assert {task.name for task in tasks} - built_again == {problem.split(":")[0] for problem in problems}


def test_a_run_that_builds_again_has_no_manifest_until_it_is_done(tree: Path, tmp_path: Path) -> None:
    class Killed(InThisProcess):
        def run(self, tasks: list[ShardTask], on_source: Callable[[], object]) -> Iterator[ShardReport]:
            yield from super().run(tasks[:1], on_source)
            raise KeyboardInterrupt

    out = tmp_path / "out"
    convert(list_kinetics(tree), out)
    undisturbed = contents(out)
    with pytest.raises(KeyboardInterrupt):
        run_job(list_kinetics(tree), PARAMETERS, str(out), Killed(), retry_quarantined=True)
    assert not (out / "manifest.json").exists()
    convert(list_kinetics(tree), out)
    assert contents(out) == undisturbed


def test_videos_without_sound_can_be_kept(tree: Path, tmp_path: Path) -> None:
    settings = Settings(missing_audio="keep")
    manifest = convert(list_kinetics(tree), tmp_path, settings=settings)
    assert manifest.num_samples == 9
    assert manifest.modalities == ("video",)
    reader = open_dataset(tmp_path)
    with_audio = set(manifest.subset_indices(WITH_AUDIO).tolist())
    for index in range(9):
        sample = reader.read(index)
        assert (sample.spectrogram is not None) == (sample.record.audio is not None) == (index in with_audio)
    assert len(with_audio) == 8
    assert manifest.spectrogram_statistics is not None
    assert validate(open_storage(tmp_path)).problems == []


def test_subsets_are_ranges_of_instance_indices(kinetics_tree: Path, tmp_path: Path) -> None:
    listing = list_kinetics(kinetics_tree)
    folds = {
        source.name: ("fold1",) if number % 3 else ("fold1", "fold2") for number, source in enumerate(listing.sources)
    }
    sources = [
        Source(source.name, source.location, source.id, source.labels, subsets=folds[source.name])
        for source in listing.sources
    ]
    sources.append(Source("missing", None, "missing", subsets=("fold2",), rejection=("source_not_found", "gone")))
    manifest = convert(
        SourceList("sports", "all", listing.classes, tuple(sources), subsets=("fold1", "fold2", "fold3")), tmp_path
    )
    assert manifest.subsets["fold1"] == ((0, 10),)
    assert manifest.subset_indices("fold3").tolist() == []
    reader = open_dataset(tmp_path)
    for index in range(10):
        assert ("fold2" in folds[reader.read(index).record.source]) == (index in manifest.subset_indices("fold2"))
    (entry,) = map(json.loads, (tmp_path / "quarantine.jsonl").read_text().splitlines())
    assert entry == {"source": "missing", "reason": "source_not_found", "detail": "gone"}


def test_only_sound_or_only_picture(kinetics_tree: Path, tmp_path: Path) -> None:
    listing = list_kinetics(kinetics_tree)
    for modality in ("video", "audio"):
        one = SourceList("one", "train", listing.classes, listing.sources[:2], modalities=(modality,))
        manifest = convert(one, tmp_path / modality)
        assert manifest.modalities == (modality,)
        sample = open_dataset(tmp_path / modality).read(0)
        assert (sample.video is None, sample.spectrogram is None) == (modality == "audio", modality == "video")
        assert (manifest.spectrogram_statistics is None) == (modality == "video")
        assert validate(open_storage(tmp_path / modality)).problems == []


def test_limits_may_change_and_what_decides_bytes_may_not(kinetics_tree: Path, tmp_path: Path) -> None:
    listing = list_kinetics(kinetics_tree)
    convert(listing, tmp_path)
    convert(listing, tmp_path, settings=Settings(timeout=1.0))
    with pytest.raises(PreprocessError, match="missing_audio was 'quarantine' and is now 'keep'"):
        convert(listing, tmp_path, settings=Settings(missing_audio="keep"))
    with pytest.raises(PreprocessError, match="sources was 10 and is now 9"):
        convert(SourceList("kinetics", "train", listing.classes, listing.sources[:9]), tmp_path)


def test_share_of_quarantine_decides_the_exit_code(tree: Path, tmp_path: Path) -> None:
    def run(*options: str) -> int:
        return CliRunner().invoke(main, ["kinetics", str(tree), str(tmp_path / "out"), *options]).exit_code

    assert run() == 3
    assert run("--max-quarantine-fraction", "0.2") == 0
    assert run("--max-quarantine-fraction", "0.19") == 3
