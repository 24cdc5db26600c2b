import os
import secrets
import signal
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from avid_pipeline.preprocess.errors import PreprocessError
from avid_pipeline.preprocess.executors import ray as ray_module
from avid_pipeline.preprocess.executors.local import LocalExecutor
from avid_pipeline.preprocess.executors.ray import ProgressCount, RayExecutor
from avid_pipeline.preprocess.job import run_job
from avid_pipeline.preprocess.sources.kinetics import list_kinetics
from avid_pipeline.shards_spec.errors import StorageError

from .conftest import SMALL, Killer, descendants, ffmpegs, files, make_tasks, processes, wait_until

# Ray reads it once in a process.
TOKEN = secrets.token_hex(32)


@pytest.fixture(autouse=True)
def _own_ray(monkeypatch):
    """No cluster of the machine, and nothing of Ray's in the home folder."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)


def convert(tree, root, executor):
    """Run a job; gives the files and how many sources were counted."""
    count = []
    run_job(list_kinetics(tree), SMALL, str(root), executor, on_source=lambda: count.append(1))
    assert not list(root.glob(".building-*"))
    return files(root), len(count)


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
def test_same_bytes_as_local(kinetics_tree, tmp_path, monkeypatch):
    expected, _ = convert(kinetics_tree, tmp_path / "one", LocalExecutor(1))
    assert convert(kinetics_tree, tmp_path / "two", LocalExecutor(2)) == (expected, 10)
    monkeypatch.chdir(tmp_path)
    assert convert(kinetics_tree, tmp_path / "ray", RayExecutor(None, 2)) == (expected, 10)
    assert {"manifest.json", "_progress/shard-000002.json", "shard-000002.tar"} < expected.keys()
    wait_until(lambda: not [pid for pid in descendants(os.getpid()) if "ray" in processes().get(pid, (0, ""))[1]])


@pytest.mark.slow
def test_killed_worker_s_shard_is_built_again(slow_tree, tmp_path):
    expected, _ = convert(slow_tree, tmp_path / "one", LocalExecutor(1))
    count = []
    with Killer(slow_tree, lambda: len(count) > 0, most=1) as killer:
        run_job(
            list_kinetics(slow_tree),
            SMALL,
            str(tmp_path / "ray"),
            RayExecutor(None, 2),
            on_source=lambda: count.append(1),
        )
    assert len(killer.killed) == 1
    assert files(tmp_path / "ray") == expected
    assert len(count) == 8
    assert not list((tmp_path / "ray").glob(".building-*"))


@pytest.mark.slow
def test_shard_that_kills_its_workers_ends_the_job(slow_tree, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_module, "MOST_RETRIES", 1)
    tasks = make_tasks(slow_tree, tmp_path / "out")
    with (
        Killer(slow_tree, lambda: True, most=20) as killer,
        pytest.raises(PreprocessError, match=r"shard-\d{6}\.tar: its Ray task died 2 times"),
    ):
        list(RayExecutor(None, 1).run(tasks[:1], lambda: None))
    assert len(killer.killed) == 2


@pytest.mark.slow
def test_lost_node(slow_tree, tmp_path):
    """The driver is on one node; the other is killed while it builds a shard."""
    from ray.cluster_utils import Cluster

    expected, _ = convert(slow_tree, tmp_path / "one", LocalExecutor(1))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        nodes = [cluster.add_node(num_cpus=1)]

        def on_source():
            count.append(1)
            if nodes:
                cluster.remove_node(nodes.pop(), allow_graceful=False)

        count = []
        executor = RayExecutor(cluster.address)
        run_job(list_kinetics(slow_tree), SMALL, str(tmp_path / "ray"), executor, on_source=on_source)
    finally:
        cluster.shutdown()
    assert files(tmp_path / "ray") == expected
    assert len(count) == 8


@pytest.mark.slow
def test_our_errors_come_out_as_themselves(kinetics_tree, tmp_path):
    tasks = make_tasks(kinetics_tree, tmp_path / "out")
    (tmp_path / "out" / "_progress").write_text("a file where a folder must be")
    with pytest.raises(StorageError, match="cannot write") as caught:
        list(RayExecutor(None, 2).run(tasks, lambda: None))
    assert type(caught.value) is StorageError


@pytest.mark.slow
def test_ctrl_c_leaves_no_process(start_job, endless_tree, tmp_path):
    process = start_job("--executor", "ray")
    below = descendants(process.pid)
    os.kill(process.pid, signal.SIGINT)
    output = process.communicate()
    assert process.returncode != 0
    assert "Traceback" not in output[1]
    wait_until(lambda: not below & processes().keys())
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
