import signal
import sys

import pytest

from avid_pipeline.preprocess.errors import PreprocessError
from avid_pipeline.preprocess.executors.local import LocalExecutor
from tests.processes import descendants, processes, run, wait_until

from .conftest import TRIES, Killer, ffmpegs, make_tasks


def test_every_source_counts_once(kinetics_tree, tmp_path):
    count = []
    reports = list(LocalExecutor(2).run(make_tasks(kinetics_tree, tmp_path), lambda: count.append(1)))
    assert sorted(report.number for report in reports) == [0, 1, 2]
    assert len(count) == 10


def test_killed_worker_is_one_clear_error(slow_tree, tmp_path):
    for attempt in range(TRIES):
        tasks = make_tasks(slow_tree, tmp_path / str(attempt))
        caught = None
        with Killer(slow_tree, lambda: True, most=1) as killer:
            try:
                list(LocalExecutor(2).run(tasks, lambda: None))
            except PreprocessError as error:
                caught = str(error)
        assert (caught is not None) == bool(killer.killed)
        if caught is not None:
            break
    assert "worker process died" in caught
    assert "run the command again" in caught
    wait_until(lambda: not ffmpegs(slow_tree))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL, signal.SIGTERM])
def test_stopped_command_leaves_no_process(start_job, endless_tree, tmp_path, number):
    process = start_job()
    below = descendants(process.pid)
    process.signal(number)
    assert process.wait() != 0
    assert "Traceback" not in process.stderr
    wait_until(lambda: not below & processes().keys() and not process.family())
    assert not ffmpegs(endless_tree)
    if number == signal.SIGINT:
        assert not list((tmp_path / "out").glob(".building-*"))


SWALLOWED = """
import os, signal, sys
from avid_pipeline.preprocess.executors import local

class Stopped:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        print("not reached")

sys.unraisablehook = local._note_swallowed
signal.signal(signal.SIGTERM, local._raise_exit)
for time in range(3):
    print("terminated", time)
    Stopped()
try:
    os.kill(os.getpid(), signal.SIGTERM)
    print("not reached")
finally:
    os.kill(os.getpid(), signal.SIGTERM)  # which does not interrupt cleaning up
    print("cleaned up")
"""


def test_a_termination_that_a_destructor_swallows_is_not_the_last():
    done = run(sys.executable, "-c", SWALLOWED, check=False)
    assert done.stdout.splitlines() == ["terminated 0", "terminated 1", "terminated 2", "cleaned up"]
    assert done.stderr == ""
    assert done.returncode == 128 + signal.SIGTERM
