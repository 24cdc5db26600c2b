import os
import signal

import pytest

from avid_pipeline.preprocess.errors import PreprocessError
from avid_pipeline.preprocess.executors.local import LocalExecutor

from .conftest import Killer, descendants, ffmpegs, make_tasks, processes, wait_until


def test_every_source_counts_once(kinetics_tree, tmp_path):
    count = []
    reports = list(LocalExecutor(2).run(make_tasks(kinetics_tree, tmp_path), lambda: count.append(1)))
    assert sorted(report.number for report in reports) == [0, 1, 2]
    assert len(count) == 10


def test_killed_worker_is_one_clear_error(slow_tree, tmp_path):
    tasks = make_tasks(slow_tree, tmp_path / "out")
    with Killer(slow_tree, lambda: True, most=1) as killer, pytest.raises(PreprocessError) as caught:
        list(LocalExecutor(2).run(tasks, lambda: None))
    assert len(killer.killed) == 1
    assert "worker process died" in str(caught.value)
    assert "run the command again" in str(caught.value)
    wait_until(lambda: not ffmpegs(slow_tree))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL, signal.SIGTERM])
def test_stopped_command_leaves_no_process(start_job, endless_tree, tmp_path, number):
    process = start_job()
    below = descendants(process.pid)
    os.kill(process.pid, number)
    output = process.communicate()
    assert process.returncode != 0
    assert "Traceback" not in output[1]
    wait_until(lambda: not below & processes().keys())
    assert not ffmpegs(endless_tree)
    if number == signal.SIGINT:
        assert not list((tmp_path / "out").glob(".building-*"))
