"""An iterator that runs ahead in a thread of its own."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from threading import Condition, Thread
from time import perf_counter
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Ahead(Generic[Item], Iterator[Item]):
    """Takes up to ``depth`` items of ``items`` before they are asked for, in a thread.

    An exception of ``items`` comes out where its next item would have. :meth:`close` ends the thread and closes a
    generator; an iterator that was not exhausted must be closed.

    Attributes:
        waited: seconds that the consumer has waited for items.
    """

    def __init__(self, items: Iterator[Item], depth: int) -> None:
        self.waited = 0.0
        self._items = items
        self._depth = depth
        self._ready: deque[Item] = deque()
        self._changed = Condition()
        self._ended = False
        self._closed = False
        self._error: BaseException | None = None
        self._thread = Thread(target=self._run, name="ahead", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for item in self._items:
                with self._changed:
                    self._ready.append(item)
                    self._changed.notify_all()
                    while len(self._ready) >= self._depth and not self._closed:
                        self._changed.wait()
                    if self._closed:
                        break
        except BaseException as error:
            self._error = error
        finally:
            with suppress(AttributeError):
                self._items.close()  # type: ignore[attr-defined]
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def __next__(self) -> Item:
        begin = perf_counter()
        with self._changed:
            while not self._ready and not self._ended:
                self._changed.wait()
            self.waited += perf_counter() - begin
            if self._ready:
                self._changed.notify_all()
                return self._ready.popleft()
        if self._error is not None:
            raise self._error
        raise StopIteration

    def close(self) -> None:
        """End the thread, and wait for its end."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        self._thread.join()
