"""An iterator that runs ahead: order, errors and ends are those of the iterator itself."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from pipeline.loading.prefetch import Ahead


def test_items_come_in_order() -> None:
    assert list(Ahead(iter(range(100)), 3)) == list(range(100))


def test_it_runs_ahead_by_its_depth_and_no_further() -> None:
    taken: list[int] = []
    reached = threading.Event()

    def items() -> Iterator[int]:
        for number in range(10):
            taken.append(number)
            if len(taken) == 3:
                reached.set()
            yield number

    ahead = Ahead(items(), 2)
    assert next(ahead) == 0
    assert reached.wait(60)
    assert len(taken) == 3
    ahead.close()


def test_an_error_comes_where_it_happened() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise OSError("no disk")

    ahead = Ahead(items(), 2)
    assert next(ahead) == 1
    with pytest.raises(OSError, match="no disk"):
        next(ahead)


def test_closing_ends_the_thread_and_the_generator() -> None:
    ended = threading.Event()

    def items() -> Iterator[int]:
        try:
            yield from range(10**9)
        finally:
            ended.set()

    ahead = Ahead(items(), 2)
    next(ahead)
    ahead.close()
    assert ended.is_set() and not ahead._thread.is_alive()
