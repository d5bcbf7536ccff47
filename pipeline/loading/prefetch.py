"""Prefetching: an iterator that runs in its own thread, and announcements of samples that are needed next."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from threading import Condition, Thread
from time import perf_counter
from typing import Any, Generic, TypeVar

import numpy.typing as npt

from pipeline.loading.bucketed import BucketSampler
from pipeline.loading.sampler import Sampler

Item = TypeVar("Item")


class Announced:
    """Announces samples before a sampler reaches them, so that they can be fetched meanwhile.

    Args:
        sampler: start of the announcements; it is copied.
        require: called with the next positions, int64 (n,); None: nothing is announced.
        samples: how many samples, over all ranks, to announce ahead.
        stop: position at which the sampler will stop; 0: at its own end.
    """

    def __init__(
        self,
        sampler: Sampler | BucketSampler,
        require: Callable[[npt.NDArray[Any]], object] | None,
        samples: int,
        stop: int = 0,
    ) -> None:
        self._ahead = replace(sampler)
        self._require = require
        self._samples = samples
        self._stop = stop

    def reach(self, position: int) -> None:
        """Announce the samples ahead of ``position``, which the sampler has reached."""
        ahead = self._ahead
        while self._require and ahead.position < position + self._samples and not ahead.finished:
            if self._stop and ahead.position >= self._stop:
                return
            self._require(ahead.positions())
            ahead.advance()


class Ahead(Generic[Item], Iterator[Item]):
    """Takes up to ``depth`` items from ``items`` ahead of the consumer, in a thread.

    An exception raised by ``items`` is raised in place of the next item. :meth:`close` ends the thread and closes a
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
        """End the thread and wait for it."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        self._thread.join()
