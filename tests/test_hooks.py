"""A run of tests ends, whatever its tests do: they fail, the others run, and nothing of them goes on."""

import re
import sys

import pytest

from tests.conftest import REPOSITORY
from tests.processes import run

STUCK = """
import ctypes, os, signal, subprocess, time
import pytest


def block():
    lock = ctypes.create_string_buffer(64)
    libc = ctypes.CDLL(None)
    libc.pthread_mutex_lock(lock)
    libc.pthread_mutex_lock(lock)


@pytest.fixture
def never_made():
    time.sleep(1000)


@pytest.fixture
def never_torn_down():
    yield
    time.sleep(1000)


def test_in_a_fixture(never_made):
    pass


def test_in_c_with_a_child():
    subprocess.Popen(["sleep", "4321"], start_new_session=True)
    block()


def test_in_tear_down_after_a_failure(never_torn_down):
    raise AssertionError


def test_killed():
    os.kill(os.getpid(), signal.SIGKILL)


def test_fine():
    subprocess.Popen(["sleep", "4321"], start_new_session=True)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
"""
FINE = """
import pytest


@pytest.mark.parametrize("number", range({}))
def test_fine(number):
    pass
"""
CONFTEST = """
from tests import hooks

pytest_plugins = ("tests.hooks",)
hooks._TEAR_DOWN_SECONDS = 3
"""
LIMITS = ("timeout=2", "timeout_method=signal", "faulthandler_timeout=4", "faulthandler_exit_on_timeout=true")


@pytest.mark.slow
def test_stuck_and_killed_tests_fail_and_the_others_run(tmp_path):
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_stuck.py").write_text(STUCK)
    # Files that are finished when the first worker dies, and some of one test.
    for number in range(8):
        (tmp_path / f"test_fine_{number}.py").write_text(FINE.format(1 + number % 3))
    limits = [word for limit in LIMITS for word in ("-o", limit)]
    options = ["-n", "2", "--dist", "loadfile", "--no-loadscope-reorder", "-p", "no:cacheprovider", *limits]
    # As from a shell without job control.
    shell = ["bash", "-c", 'trap "" INT; exec "$@"', "bash", sys.executable, "-m", "pytest", "-v", *options]
    done = run(*shell, tmp_path, cwd=tmp_path, env={"PYTHONPATH": str(REPOSITORY)}, check=False)
    assert done.returncode == 1
    ended = {
        (test, result) for result, test in re.findall(r"(PASSED|FAILED|ERROR) test_stuck.py::test_(\w+)", done.stdout)
    }
    assert ended == {
        ("in_a_fixture", "ERROR"),
        ("in_c_with_a_child", "FAILED"),
        ("in_tear_down_after_a_failure", "FAILED"),
        ("killed", "FAILED"),
        ("fine", "PASSED"),
    }
    assert len(set(re.findall(r"PASSED (test_fine_\d.py::test_fine\[\d\])", done.stdout))) == 15
    # A test that was fatal is not run again.
    assert done.stdout.count("node down: Not properly terminated") == 3
    assert re.search(r"block\n.*in test_in_c_with_a_child", done.stderr), "where it was stuck"
    assert re.search(r"left running: \d+ sleep 4321 .*::test_fine", done.stdout)
    assert done.stdout.count("left running") == 1
