"""What makes every run of the tests end, and soon: limits, and how pytest-xdist's workers share the tests."""

import faulthandler
import os
import signal
from contextlib import suppress
from typing import Any

import pytest
from xdist.scheduler import LoadFileScheduling
from xdist.workermanage import WorkerController

from tests.processes import kill_all, of_test_run, wait_until

_TEAR_DOWN_SECONDS = 120
_stderr = pytest.StashKey[int]()
_runs: set[str] = set()


class FileScheduling(LoadFileScheduling):
    """Files one after the other, each in one worker, for its fixtures may be expensive.

    pytest-xdist's own (3.8) hangs when a worker has died: it hands out files again that were finished, and a worker
    that is given no test that is left, or one alone, waits for ever. It would also run the test again that was fatal.
    """

    def remove_node(self, node: WorkerController) -> str | None:
        workload = self.assigned_work.pop(node)
        crashed = None
        for tests in workload.values():
            for test, completed in tests.items():
                if not completed and crashed is None:
                    crashed, tests[test] = test, True
        self.workqueue.update({file: tests for file, tests in workload.items() if not all(tests.values())})
        for other in self.nodes:
            self._reschedule(other)
        return crashed

    def _reschedule(self, node: WorkerController) -> None:
        super()._reschedule(node)
        # A worker begins a test when it knows the next one, or that there is none.
        while not node.shutting_down and self._pending_of(self.assigned_work[node]) < 2:
            super()._reschedule(node)


def pytest_configure(config: pytest.Config) -> None:
    # Shells without job control start background processes with SIGINT ignored, which all children would inherit.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.stash[_stderr] = os.dup(2)  # Later, it is captured.


@pytest.hookimpl(trylast=True)
def pytest_exception_interact(node: pytest.Item | pytest.Collector) -> None:
    """Limit the rest of a failed test too: its first failure lifts the limits of setup.cfg, for debuggers' sake."""
    if isinstance(node, pytest.Item):
        faulthandler.dump_traceback_later(_TEAR_DOWN_SECONDS, exit=True, file=node.config.stash[_stderr])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: so no worker is long alone at work at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> FileScheduling | None:
    return FileScheduling(config, log) if config.getoption("dist") == "loadfile" else None


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """End what the tests of a pytest-xdist worker started that was killed, for being stuck or otherwise."""
    run_id, worker = node.workerinput["testrunuid"], node.gateway.id
    _runs.add(run_id)
    if error:
        kill_all(lambda: set(of_test_run(run_id, worker)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Tell what tests have left running, and end it."""
    for run_id in _runs:
        with suppress(AssertionError):
            wait_until(lambda run_id=run_id: not of_test_run(run_id), seconds=5)
        for pid, what in of_test_run(run_id).items():
            terminalreporter.write_line(f"left running: {pid} {what}", red=True)
        kill_all(lambda run_id=run_id: set(of_test_run(run_id)))
