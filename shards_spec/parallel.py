"""Running the same function on many items: in threads for waiting on storage, in processes for decoding."""

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from queue import Empty
from signal import SIG_BLOCK, SIG_SETMASK, SIGINT, pthread_sigmask
from typing import Any, TypeVar

from avid_pipeline.shards_spec.errors import AvidPipelineError

Item = TypeVar("Item")
Result = TypeVar("Result")

_POLL_SECONDS = 0.2
_progress_queue: Any = None


def usable_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def in_threads(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int, stop: threading.Event | None = None
) -> Generator[Result, None, None]:
    """Results in the order of the items, with a bounded number of items under way.

    Closing the generator, an error or an interrupt starts no further item, sets ``stop`` so that long work can give
    up, and waits for those items that run.
    """
    pool = ThreadPoolExecutor(workers)
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BaseException:
        if stop is not None:
            stop.set()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def in_processes(
    function: Callable[[Item, Callable[[], object]], Result],
    items: Sequence[Item],
    workers: int,
    on_progress: Callable[[], object],
    name_of: Callable[[Item], str],
) -> Iterator[Result]:
    """Results in any order, from spawned processes that end with this one, however it ends.

    Args:
        function: importable; gets an item and a function to call once for every step of progress.
        items: picklable.
        workers: number of processes; with one, or with one item, the work is done in this process.
        on_progress: called here for every step of progress.
        name_of: what an item is called in messages.

    Raises:
        AvidPipelineError: a process died.
    """
    if min(workers, len(items)) <= 1:
        yield from (function(item, on_progress) for item in items)
        return
    # Spawned, not forked: this process may hold threads of obstore and of the progress bar.
    context = get_context("spawn")
    queue = context.Queue()
    pool = ProcessPoolExecutor(
        min(workers, len(items)), mp_context=context, initializer=_start_worker, initargs=(queue,)
    )
    taken = seen = 0
    # Ctrl-C reaches the whole process group. Only this process answers, and then stops its workers, which inherit the
    # mask and so never see the signal, not even while they start.
    mask = pthread_sigmask(SIG_BLOCK, {SIGINT})
    try:
        waiting = {pool.submit(_call, function, item): item for item in items}
    finally:
        pthread_sigmask(SIG_SETMASK, mask)
    try:
        while waiting:
            done, _ = wait(waiting, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
            seen += _drain(queue, on_progress)
            for future in done:
                result, steps = future.result()
                taken += steps
                del waiting[future]
                yield result
        # The queue may be behind the results.
        for _ in range(taken - seen):
            on_progress()
        pool.shutdown()
    except BrokenProcessPool as error:
        names = ", ".join(sorted(name_of(item) for item in waiting.values())[:workers])
        raise AvidPipelineError(
            f"a worker process died (killed, out of memory, or a decoder crashed) at one of {names}; "
            "run the command again, with fewer --workers if memory is short"
        ) from error
    finally:
        _stop(pool)
        queue.close()


def _start_worker(queue: Any) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    global _progress_queue
    _progress_queue = queue


def _end_with_parent() -> None:
    # The pool's own workers would wait for ever for the next task of a parent that was killed.
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _call(function: Callable[[Item, Callable[[], object]], Result], item: Item) -> tuple[Result, int]:
    steps = 0

    def on_progress() -> None:
        nonlocal steps
        steps += 1
        _progress_queue.put(None)

    return function(item, on_progress), steps


def _drain(queue: Any, on_progress: Callable[[], object]) -> int:
    count = 0
    while True:
        try:
            queue.get_nowait()
        except Empty:
            return count
        on_progress()
        count += 1


def _stop(pool: ProcessPoolExecutor) -> None:
    processes = list((pool._processes or {}).values())
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        process.terminate()
    for process in processes:
        process.join()
