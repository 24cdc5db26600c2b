"""A pool of processes on this machine."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from queue import Empty
from typing import Any

from avid_pipeline.preprocess.build import ShardReport, ShardTask, build_shard
from avid_pipeline.preprocess.errors import PreprocessError

_POLL_SECONDS = 0.2
_SECONDS_BETWEEN_TERMINATIONS = 1.0
_worker_queue: Any = None


class LocalExecutor:
    """Builds shards in worker processes, one shard at a time each.

    Args:
        workers: number of processes; by default one for each core this process may use.
    """

    def __init__(self, workers: int | None = None) -> None:
        self.workers = workers or len(os.sched_getaffinity(0))

    def run(self, tasks: list[ShardTask], on_source: Callable[[], object]) -> Iterator[ShardReport]:
        """Build all tasks and yield their reports as they finish.

        Raises:
            PreprocessError: a worker process died (killed, or out of memory).
            StorageError: the root cannot be written.
        """
        if not tasks:
            return
        # Spawned, not forked: this process may hold threads of obstore and of the progress bar.
        context = get_context("spawn")
        queue = context.Queue()
        pool = ProcessPoolExecutor(
            min(self.workers, len(tasks)), mp_context=context, initializer=_start_worker, initargs=(queue,)
        )
        try:
            waiting = _submit(pool, tasks)
            while waiting:
                done, waiting = wait(waiting, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
                _drain(queue, on_source)
                for future in done:
                    yield future.result()
            _drain(queue, on_source)
            pool.shutdown()
        except BrokenProcessPool as error:
            raise PreprocessError(
                "a worker process died: it was killed or ran out of memory; run the command again (finished "
                "shards are kept), with fewer --workers if memory is short"
            ) from error
        finally:
            _stop(pool)
            queue.close()


def _submit(pool: ProcessPoolExecutor, tasks: list[ShardTask]) -> set[Future[ShardReport]]:
    """Start the workers.

    Ctrl-C reaches the whole process group, but only the parent answers, and then stops its workers: they inherit the
    mask and never see the signal, not even while they start.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return {pool.submit(_build, task) for task in tasks}
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _start_worker(queue: Any) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sys.unraisablehook = _note_swallowed
    global _worker_queue
    _worker_queue = queue


def _raise_exit(number: int, frame: Any) -> None:
    # When one worker ends, the pool terminates the others once more: that must not interrupt their cleaning up.
    signal.signal(number, signal.SIG_IGN)
    raise SystemExit(128 + number)


def _note_swallowed(unraisable: "sys.UnraisableHookArgs") -> None:
    # A signal may come in a destructor or a callback, which swallow exceptions: then the next one ends the worker.
    if isinstance(unraisable.exc_value, SystemExit):
        signal.signal(signal.SIGTERM, _raise_exit)
    else:
        sys.__unraisablehook__(unraisable)


def _end_with_parent() -> None:
    # The pool's own workers would wait for ever for the next task of a parent that was killed.
    parent = parent_process()
    if parent is not None:
        parent.join()
        while True:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(_SECONDS_BETWEEN_TERMINATIONS)


def _build(task: ShardTask) -> ShardReport:
    try:
        # Only here, where there is something to clean up: outside of it, the pool would report the exit as an error.
        signal.signal(signal.SIGTERM, _raise_exit)
        report = build_shard(task, on_source=lambda: _worker_queue.put(None))
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        return report
    except SystemExit as stop:
        # The pool's worker loop would take this for a failed task and begin its next one.
        os._exit(stop.code if isinstance(stop.code, int) else 1)


def _drain(queue: Any, on_source: Callable[[], object]) -> None:
    while True:
        try:
            queue.get_nowait()
        except Empty:
            return
        on_source()


def _stop(pool: ProcessPoolExecutor) -> None:
    processes = list((pool._processes or {}).values())
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        process.terminate()
    for process in processes:
        while process.is_alive():
            process.join(_SECONDS_BETWEEN_TERMINATIONS)
            process.terminate()
