"""A small cache whose values are loaded once, however many threads want them at the same time."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class LoadOnce(Generic[Key, Value]):
    """Keeps the values that were used last.

    Args:
        load: makes the value of a key; what it raises is raised to all who wait for that key, and not kept.
        most: how many values are kept.
    """

    def __init__(self, load: Callable[[Key], Value], most: int) -> None:
        self._load, self._most = load, most
        self._values: OrderedDict[Key, Future[Value]] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, key: Key) -> Value:
        """The value of a key, loaded in this thread unless another one has it or is loading it."""
        with self._lock:
            value = self._values.get(key)
            mine = value is None
            if value is None:
                value = self._values[key] = Future()
            else:
                self._values.move_to_end(key)
        if mine:
            self._fill(key, value)
        return value.result()

    def ready(self, key: Key) -> Value | None:
        """The value of a key if it is here already."""
        with self._lock:
            value = self._values.get(key)
            if value is not None:
                self._values.move_to_end(key)
        return value.result() if value is not None and value.done() and value.exception() is None else None

    def _fill(self, key: Key, value: Future[Value]) -> None:
        try:
            loaded = self._load(key)
        except BaseException as error:  # noqa: BLE001  (raised by result(), here and in every thread that waits)
            with self._lock:
                if self._values.get(key) is value:
                    del self._values[key]
            value.set_exception(error)
            return
        value.set_result(loaded)
        with self._lock:
            while len(self._values) > self._most:
                self._values.popitem(last=False)
