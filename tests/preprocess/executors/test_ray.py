"""The Ray executor. All that starts a Ray runs in processes of its own; see ray_worker.py."""

import json
import secrets
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from avid_pipeline.preprocess.errors import PreprocessError
from avid_pipeline.preprocess.executors import ray as ray_module
from avid_pipeline.preprocess.executors.local import LocalExecutor
from avid_pipeline.preprocess.executors.ray import ProgressCount, RayExecutor
from avid_pipeline.preprocess.job import run_job
from avid_pipeline.preprocess.sources.kinetics import list_kinetics
from tests.conftest import REPOSITORY
from tests.processes import descendants, processes, started, wait_until

from .conftest import SMALL, ffmpegs, files, make_tasks

WORKER = "tests.preprocess.executors.ray_worker"


@pytest.fixture
def own_ray():
    """Environment for a Ray with a folder of its own, no cluster of the machine, and nothing of it in the home folder.

    The folder's path is short, for those of sockets are limited.
    """
    folder = tempfile.mkdtemp(prefix="ray-")
    token = secrets.token_hex(32)
    yield {"RAY_ADDRESS": None, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "RAY_TMPDIR": folder}
    shutil.rmtree(folder)


def run_worker(env: dict[str, str | None], *arguments: object) -> dict[str, dict]:
    """Run ray_worker.py; gives what it reports of its jobs."""
    with started(sys.executable, "-m", WORKER, *arguments, cwd=REPOSITORY, env=env) as process:
        assert process.wait() == 0, str(process)
        wait_until(lambda: not process.family())
        lines = [json.loads(line) for line in process.stdout.splitlines() if line.startswith('{"job"')]
    return {line["job"]: line for line in lines}


def convert(tree: Path, root: Path, workers: int = 1) -> dict[str, bytes]:
    """What local processes make of a tree."""
    count = []
    run_job(list_kinetics(tree), SMALL, str(root), LocalExecutor(workers), on_source=lambda: count.append(1))
    assert len(count) == len(list_kinetics(tree).sources)
    return files(root)


@pytest.fixture(scope="module")
def slow_files(slow_tree, tmp_path_factory):
    return convert(slow_tree, tmp_path_factory.mktemp("slow") / "one", 2)


@given(
    st.integers(1, 6).flatmap(
        lambda sources: st.tuples(st.just(sources), st.lists(st.integers(1, sources), max_size=20))
    )
)
def test_progress_counts_every_source_once(case):
    """News of attempts that died, of the one that goes on, and late ones, in any order."""
    sources, news = case
    calls = []
    count = ProgressCount(lambda: calls.append(1))
    count.begin(7)
    for place, done in enumerate(news):
        count.reach(7, done)
        assert len(calls) == max(news[: place + 1])
    count.finish(7, sources)
    count.reach(7, 1)
    assert len(calls) == sources


@pytest.mark.slow
def test_same_bytes_as_local(kinetics_tree, tmp_path, own_ray):
    expected = convert(kinetics_tree, tmp_path / "one")
    assert convert(kinetics_tree, tmp_path / "two", 2) == expected
    assert run_worker(own_ray, "own", tmp_path, kinetics_tree)["own"]["sources"] == 10
    assert files(tmp_path / "own") == expected
    assert {"manifest.json", "_progress/shard-000002.json", "shard-000002.tar"} < expected.keys()


@pytest.mark.slow
def test_jobs_in_a_ray_that_runs(kinetics_tree, slow_tree, slow_files, tmp_path, own_ray):
    found = run_worker(own_ray, "one", tmp_path, kinetics_tree, slow_tree)
    # The shard of a killed worker is built again.
    assert (found["killed"]["sources"], found["killed"]["killed"]) == (8, 1)
    assert files(tmp_path / found["killed"]["root"]) == slow_files
    # Errors of ours come out as themselves.
    kind, message = found["blocked"]["error"]
    assert kind == "StorageError"
    assert "cannot write" in message
    # A shard that kills its workers ends the job.
    kind, message = found["dies"]["error"]
    assert kind == "PreprocessError"
    assert message.startswith("shard-00000")
    assert ".tar: its Ray task died 2 times" in message
    assert found["dies"]["killed"] == 2
    # The program's Ray is not the job's to end.
    assert found["still connected"]["connected"]


@pytest.mark.slow
def test_lost_node(slow_tree, slow_files, tmp_path, own_ray):
    assert run_worker(own_ray, "lost", tmp_path, slow_tree)["lost"] == {"job": "lost", "sources": 8, "left": 0}
    assert files(tmp_path / "lost") == slow_files


@pytest.mark.slow
def test_ctrl_c_leaves_no_process(start_job, endless_tree, tmp_path, own_ray):
    process = start_job("--executor", "ray", env=own_ray)
    below = descendants(process.pid)
    process.signal(signal.SIGINT)
    assert process.wait() != 0
    assert "Traceback" not in process.stderr
    wait_until(lambda: not below & processes().keys() and not process.family())
    assert not ffmpegs(endless_tree)
    assert not list((tmp_path / "out").glob(".building-*"))


def test_node_that_does_not_see_the_files(kinetics_tree, tmp_path):
    """As on a node where the root is another folder."""
    task = make_tasks(kinetics_tree, tmp_path / "out")[0]
    with ray_module._marker(task) as marker:
        visible = ray_module._visible(task, marker)
        assert [path.exists() for path in visible] == [True, True]
        assert {path.parents[1] for path in visible} == {tmp_path, kinetics_tree}
    with pytest.raises(PreprocessError, match=r"does not exist on node .* shared file system"):
        ray_module._build(task, visible, board=None)
    assert not files(tmp_path / "out")


def test_without_ray_installed(kinetics_tree, tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(PreprocessError, match=r"pip install 'avid-pipeline\[ray\]'"):
        next(RayExecutor().run(make_tasks(kinetics_tree, tmp_path), lambda: None))


@pytest.mark.parametrize(
    ("address", "reason"), [("127.0.0.1:1", "refused"), ("ray://127.0.0.1:10001", "Ray Client is not supported")]
)
def test_no_cluster_at_the_address(kinetics_tree, tmp_path, monkeypatch, address, reason):
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(PreprocessError, match=reason) as caught:
        next(RayExecutor().run(make_tasks(kinetics_tree, tmp_path), lambda: None))
    assert f"--ray-address {address}" in str(caught.value)
    assert list(tmp_path.iterdir()) == []
