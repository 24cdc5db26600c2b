"""Processes of tests: waited for with a limit, and ended with everything that they started."""

import os
import secrets
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

# Only there for what never comes: a slow machine must not reach it. Less than the limit of a test, for this one tells
# what the process has written.
SECONDS = 180.0
# Every process inherits it from the one that started it, whatever session or parent it goes to.
_TAG = "AVID_PIPELINE_TEST_PROCESS"


class Started:
    """A process that a test started, in a session of its own and with its output in files.

    Files, for what it started in turn may hold a pipe open for ever.

    Attributes:
        pid: its number, and that of its process group.
    """

    def __init__(self, process: subprocess.Popen[bytes], command: list[str], tag: bytes, files: list[IO[bytes]]):
        self.pid = process.pid
        self._process, self._command, self._tag, self._files = process, command, tag, files

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    @property
    def returncode(self) -> int | None:
        return self._process.poll()

    @property
    def stdout(self) -> str:
        """What it has written up to now."""
        return _content(self._files[0])

    @property
    def stderr(self) -> str:
        """What it has written up to now."""
        return _content(self._files[1])

    def signal(self, number: int, *, group: bool = False) -> None:
        """Send a signal to it, or as a terminal does to its whole process group."""
        (os.killpg if group else os.kill)(self.pid, number)

    def wait(self, seconds: float = SECONDS) -> int:
        """Wait for its end; gives its exit code."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still runs after {seconds} seconds: {self}") from None

    def wait_until(self, condition: Callable[[], object], seconds: float = SECONDS) -> None:
        """Wait for something that it will do; it must not end before."""

        def come_or_ended() -> bool:
            ended = not self.running
            come = bool(condition())
            assert come or not ended, f"ended too early: {self}"
            return come

        wait_until(come_or_ended, seconds, lambda: str(self))

    def family(self) -> set[int]:
        """It and all that it started, directly or not, as far as they run."""
        return _with_variable(self._tag)

    def __str__(self) -> str:
        state = "" if self.running else f", exit code {self.returncode}"
        return f"{' '.join(self._command)}{state}\n--- stdout:\n{self.stdout}\n--- stderr:\n{self.stderr}"


@contextmanager
def started(
    *command: object, cwd: Path | str | None = None, env: Mapping[str, str | None] | None = None, merge: bool = False
) -> Iterator[Started]:
    """Start a process; at the end of the block, it and all that it started are killed.

    Args:
        command: program and arguments.
        cwd: its folder.
        env: environment variables beside those of this process; None leaves one out.
        merge: write its errors where its output goes.
    """
    words, value = [str(word) for word in command], secrets.token_hex(16)
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {}), _TAG: value}
    environment = {name: content for name, content in variables.items() if content is not None}
    tag = f"{_TAG}={value}".encode()
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as own_stderr:
        stderr = stdout if merge else own_stderr
        process = subprocess.Popen(
            words,
            cwd=cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )
        try:
            yield Started(process, words, tag, [stdout, stderr])
        finally:
            kill_all(lambda: _with_variable(tag) | ({process.pid} if process.poll() is None else set()))


def run(
    *command: object, check: bool = True, seconds: float = SECONDS, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run a process to its end; see :func:`started`. With ``check``, it must succeed."""
    with started(*command, **options) as process:
        code = process.wait(seconds)
        assert code == 0 or not check, str(process)
        return subprocess.CompletedProcess(list(command), code, process.stdout, process.stderr)


def wait_until(
    condition: Callable[[], object], seconds: float = SECONDS, describe: Callable[[], str] = lambda: ""
) -> None:
    """Wait for something that must come."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"it never came {describe()}"
        time.sleep(0.02)


def processes() -> dict[int, tuple[int, str]]:
    """Process id to parent and command line of all running processes."""
    found = {}
    for folder in _folders():
        with suppress(OSError):
            status = (folder / "stat").read_text().rpartition(")")[2].split()
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if status[0] != "Z":
                found[int(folder.name)] = (int(status[1]), command)
    return found


def descendants(pid: int, table: Mapping[int, tuple[int, str]] | None = None) -> set[int]:
    """Children of a process, theirs, and so on; in a table of :func:`processes`, by default the present one."""
    table = processes() if table is None else table
    found: set[int] = set()
    generation = {pid}
    while generation:
        generation = {child for child, (parent, _) in table.items() if parent in generation}
        found |= generation
    return found


def kill_all(find: Callable[[], set[int]]) -> None:
    """Kill what is found, until nothing is: meanwhile they may start others."""
    deadline = time.monotonic() + 60
    while found := find():
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert time.monotonic() < deadline, f"cannot be killed: {found}"
        time.sleep(0.01)


def of_test_run(run_id: str, worker: str | None = None) -> dict[int, str]:
    """Processes that tests of a run under pytest-xdist started, and what they are; of one of its workers, or of all."""
    wanted = {f"PYTEST_XDIST_TESTRUNUID={run_id}".encode()}
    if worker is not None:
        wanted.add(f"PYTEST_XDIST_WORKER={worker}".encode())
    found = {}
    for folder in _folders():
        with suppress(OSError):
            variables = (folder / "environ").read_bytes().split(b"\0")
            if wanted <= set(variables):
                test = next((entry for entry in variables if entry.startswith(b"PYTEST_CURRENT_TEST=")), b"")
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ")
                found[int(folder.name)] = f"{command.decode(errors='replace')}({test.decode(errors='replace')})"
    return found


def _with_variable(entry: bytes) -> set[int]:
    found = set()
    for folder in _folders():
        with suppress(OSError):
            # Zombies have no environment any more.
            if entry in (folder / "environ").read_bytes().split(b"\0"):
                found.add(int(folder.name))
    return found


def _folders() -> list[Path]:
    return [folder for folder in Path("/proc").iterdir() if folder.name.isdecimal()]


def _content(file: IO[bytes]) -> str:
    # Not by seeking: the process writes where the file that it inherited stands.
    return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode(errors="replace")
