"""Tasks on a Ray cluster, or on a Ray started on this machine for the time of the job."""

import os
import platform
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from avid_pipeline.preprocess.build import BUILDING_PREFIX, ShardReport, ShardTask, build_shard
from avid_pipeline.preprocess.errors import PreprocessError
from avid_pipeline.shards_spec.errors import AvidPipelineError, StorageError
from avid_pipeline.shards_spec.storage import is_remote, open_storage

if TYPE_CHECKING:
    from ray import ObjectRef

# How often Ray builds a shard again whose worker or node died.
MOST_RETRIES = 3
# Enough that no CPU waits for the driver, few enough that two million sources are never all on their way.
TASKS_IN_FLIGHT_PER_CPU = 2

_POLL_SECONDS = 0.5
_CONNECT_SECONDS = 10.0
_SECONDS_TO_CLEAN_UP = 10.0
_SECONDS_BETWEEN_WAKES = 0.5
# Arguments and reports are small; Ray's default of 30 % of the memory is for data that tasks share.
_OBJECT_STORE_BYTES = 256 << 20


class RayExecutor:
    """Builds shards as Ray tasks of one CPU each.

    A shard whose worker or node died is built again, at most :data:`MOST_RETRIES` times; errors of ours are not
    retried.

    Args:
        address: ``host:port`` of a running cluster, or ``auto`` for the one that this machine belongs to. None is the
            environment variable ``RAY_ADDRESS``, and where that is not set either, a Ray of this machine's own is
            started for the job and ended with it. Where the program is connected to Ray already, that is used.
        workers: on a cluster the most shards at a time, by default as many as it has CPUs; without one, the CPUs
            of the Ray that is started, by default one for each core this process may use.
    """

    def __init__(self, address: str | None = None, workers: int | None = None) -> None:
        self.address = address or os.environ.get("RAY_ADDRESS") or None
        self.workers = workers

    def run(self, tasks: list[ShardTask], on_source: Callable[[], object]) -> Iterator[ShardReport]:
        """Build all tasks and yield their reports as they finish.

        Raises:
            PreprocessError: Ray is not installed or cannot be reached, a node does not see the root or the sources,
                or workers or nodes died too often.
            StorageError: the root cannot be written.
        """
        if not tasks:
            return
        ray = _import_ray()
        with _connection(ray, self.address, self.workers), _marker(tasks[0]) as marker:
            # What limits an own Ray are its CPUs.
            most = self.workers if self.address else None
            flight = _Flight(ray, on_source, marker, most)
            try:
                yield from flight.reports(tasks)
            finally:
                flight.stop()


class ProgressCount:
    """Counts every source once, however often its shard is begun.

    Attempts at a shard report how many of its sources they have through. A source counts when the first attempt
    reports it; what is missing when the shard is finished counts then.

    Args:
        on_source: called once for every source.
    """

    def __init__(self, on_source: Callable[[], object]) -> None:
        self._on_source = on_source
        self._counted: dict[int, int] = {}

    def begin(self, number: int) -> None:
        """Shard ``number`` is on its way."""
        self._counted[number] = 0

    def reach(self, number: int, done: int) -> None:
        """Some attempt at a shard has ``done`` sources through; late news of finished shards is nothing new."""
        if number in self._counted:
            for _ in range(done - self._counted[number]):
                self._on_source()
            self._counted[number] = max(self._counted[number], done)

    def finish(self, number: int, sources: int) -> None:
        """A shard of so many sources is finished."""
        self.reach(number, sources)
        del self._counted[number]


class _Flight:
    """The tasks on their way, never many at a time, and their progress."""

    def __init__(self, ray: ModuleType, on_source: Callable[[], object], marker: Path | None, most: int | None) -> None:
        self._ray = ray
        self._marker = marker
        self._most = most
        self._count = ProgressCount(on_source)
        self._pending: dict[ObjectRef[ShardReport], ShardTask] = {}
        self._build = ray.remote(num_cpus=1, max_retries=MOST_RETRIES, retry_exceptions=False)(_build)
        self._board = _start_board(ray)
        self._news = self._board.take.remote()

    def reports(self, tasks: list[ShardTask]) -> Iterator[ShardReport]:
        waiting = iter(tasks)
        while True:
            for task in islice(waiting, max(0, self._limit() - len(self._pending))):
                self._submit(task)
            if not self._pending:
                return
            done, _ = self._ray.wait(list(self._pending), timeout=_POLL_SECONDS)
            self._read_news()
            for reference in done:
                report = self._result(reference)
                self._count.finish(report.number, len(self._pending.pop(reference).sources))
                yield report

    def stop(self) -> None:
        """Cancel what is on its way; tasks get some time to end their ffmpeg and remove their temporary files."""
        for reference in self._pending:
            self._ray.cancel(reference)
        if self._pending:
            everything = list(self._pending)
            _, left = self._ray.wait(everything, num_returns=len(everything), timeout=_SECONDS_TO_CLEAN_UP)
            for reference in left:
                self._ray.cancel(reference, force=True)
        self._ray.kill(self._board)

    def _limit(self) -> int:
        # Asked for anew each time, for nodes come and go.
        cpus = int(self._ray.cluster_resources().get("CPU", 0))
        return self._most or max(1, cpus) * TASKS_IN_FLIGHT_PER_CPU

    def _submit(self, task: ShardTask) -> None:
        build = self._build.options(name=f"build {task.name}")
        self._count.begin(task.number)
        self._pending[build.remote(task, _visible(task, self._marker), self._board)] = task

    def _read_news(self) -> None:
        ready, _ = self._ray.wait([self._news], timeout=0)
        if not ready:
            return
        try:
            news = self._ray.get(self._news)
        except self._ray.exceptions.RayActorError:
            # The board is started again by Ray; until then there is no news, and nothing but progress is lost.
            news = {}
        for number, done in news.items():
            self._count.reach(number, done)
        self._news = self._board.take.remote()

    def _result(self, reference: "ObjectRef[ShardReport]") -> ShardReport:
        exceptions = self._ray.exceptions
        try:
            report: ShardReport = self._ray.get(reference)
        except exceptions.RayTaskError as error:
            if isinstance(error.cause, AvidPipelineError):
                raise error.cause from None
            raise
        except exceptions.RayError as error:
            raise PreprocessError(
                f"{self._pending[reference].name}: its Ray task died {MOST_RETRIES + 1} times or was stopped: "
                f"{_first_line(error)}; if memory is short, start the nodes with fewer CPUs (--num-cpus) or give fewer "
                "--workers, and run the command again (finished shards are kept)"
            ) from error
        return report


class _Board:
    """An actor on which the tasks of all nodes write how far they are."""

    def __init__(self) -> None:
        self._news: dict[int, int] = {}

    def put(self, number: int, done: int) -> None:
        self._news[number] = max(done, self._news.get(number, 0))

    def take(self) -> dict[int, int]:
        news, self._news = self._news, {}
        return news


def _start_board(ray: ModuleType) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    return ray.remote(_Board).options(num_cpus=0, max_restarts=-1, scheduling_strategy=here).remote()


def _build(task: ShardTask, visible: list[Path], board: Any) -> ShardReport:
    """The Ray task; ``visible`` are files and folders that the driver sees."""
    for path in visible:
        if not path.exists():
            raise PreprocessError(
                f"{path}: does not exist on node {platform.node()}, but where the command runs it does; a local folder "
                "must be one shared file system on all nodes of the cluster, or use URLs (s3://, gs://, az://)"
            )
    done = 0

    def on_source() -> None:
        nonlocal done
        done += 1
        board.put.remote(task.number, done)

    with _interruptible():
        return build_shard(task, on_source)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let Ray's cancellation in while a call of the operating system blocks, above all reading from ffmpeg.

    Ray only marks the main thread as interrupted, which Python notices between two instructions; a signal ends the
    waiting of the blocked call for a moment.
    """
    main = threading.get_ident()
    stopped = threading.Event()
    before = signal.signal(signal.SIGURG, lambda number, frame: None)

    def wake() -> None:
        while not stopped.wait(_SECONDS_BETWEEN_WAKES):
            signal.pthread_kill(main, signal.SIGURG)

    thread = threading.Thread(target=wake, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()
        signal.signal(signal.SIGURG, before)


def _visible(task: ShardTask, marker: Path | None) -> list[Path]:
    """What a node must see to build a task: the marker in a local root, and one local source that is there."""
    locations = (source.source.location for source in task.sources)
    sources = (place.absolute() for place in locations if isinstance(place, Path) and place.exists())
    return [path for path in (marker, next(sources, None)) if path is not None]


@contextmanager
def _marker(task: ShardTask) -> Iterator[Path | None]:
    """A folder in a local root for the time of the job: a node that does not see it has another folder there."""
    if is_remote(task.root):
        yield None
        return
    storage = open_storage(task.root)
    try:
        folder = tempfile.TemporaryDirectory(prefix=f"{BUILDING_PREFIX}ray-", dir=storage.local_root)
    except OSError as error:
        raise StorageError(f"{task.root}: cannot write: {error.strerror}; make room or permit it") from error
    with folder as name:
        yield Path(name)


def _import_ray() -> ModuleType:
    try:
        import ray
    except ImportError as error:
        raise PreprocessError(
            "--executor ray needs Ray, which is not installed: pip install 'avid-pipeline[ray]'"
        ) from error
    return ray


@contextmanager
def _connection(ray: ModuleType, address: str | None, workers: int | None) -> Iterator[None]:
    if ray.is_initialized():
        yield
        return
    init = partial(ray.init, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        _connect(init, address, workers)
        yield
    finally:
        ray.shutdown(wait_for_processes=True)


def _connect(init: Callable[..., object], address: str | None, workers: int | None) -> None:
    if address is None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        cpus = workers or len(os.sched_getaffinity(0))
        try:
            # "local" is Ray's word for a new one: None would join any that runs on this machine.
            init(address="local", num_cpus=cpus, num_gpus=0, object_store_memory=_OBJECT_STORE_BYTES)
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            raise PreprocessError(
                f"cannot start Ray on this machine: {_first_line(error)}; its log files are in /tmp/ray/session_latest "
                "(or --executor local needs no Ray)"
            ) from error
        return
    if address.startswith("ray://"):
        raise PreprocessError(
            f"--ray-address {address}: Ray Client is not supported; run the command on a node of the cluster and give "
            "the address host:port that `ray start` printed, or auto"
        )
    try:
        _knock(address)
        init(address=address)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise PreprocessError(
            f"--ray-address {address}: cannot connect to this Ray cluster: {_first_line(error)}; start it with `ray "
            "start --head`, and run the command on one of its nodes with the same versions of Python and Ray"
        ) from error


def _knock(address: str) -> None:
    """Try a ``host:port`` first, for Ray itself keeps on trying for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__
