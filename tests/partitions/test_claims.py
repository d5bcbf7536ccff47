"""Claims keep live workers apart, outlive no dead one, and never stop anybody for good."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline import storage
from pipeline.partitions import claims as module
from pipeline.partitions.claims import Claims
from pipeline.storage import Folder

LEASE = 6000.0  # the heartbeat, every sixth of it, never comes in a test


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def folder(memory: Path) -> Iterator[Folder]:
    with Folder.open(memory) as opened:
        yield opened


@pytest.fixture
def two(folder: Folder, clock: Clock) -> Iterator[tuple[Claims, Claims]]:
    first, second = Claims(folder, LEASE), Claims(folder, LEASE)
    yield first, second
    first.close()
    second.close()


def test_one_of_two_has_a_claim(two: tuple[Claims, Claims]) -> None:
    first, second = two
    assert first.take("000/00001")
    assert not second.take("000/00001")
    assert second.take("000/00002")


def test_a_released_claim_is_free(two: tuple[Claims, Claims]) -> None:
    first, second = two
    first.take("plan")
    first.release("plan")
    assert second.take("plan")


def test_a_claim_that_stands_still_for_a_lease_is_taken_over(two: tuple[Claims, Claims], clock: Clock) -> None:
    first, second = two
    first.take("000/00001")
    assert not second.take("000/00001")
    clock.now += LEASE - 1
    assert not second.take("000/00001")
    clock.now += 2
    assert second.take("000/00001")


def test_a_heartbeat_keeps_a_claim(two: tuple[Claims, Claims], clock: Clock) -> None:
    first, second = two
    first.take("000/00001")
    for _ in range(4):
        assert not second.take("000/00001")
        clock.now += LEASE - 1
        first._move()


def test_the_observer_s_own_clock_counts_from_its_first_look(two: tuple[Claims, Claims], clock: Clock) -> None:
    first, second = two
    first.take("000/00001")
    clock.now += 10 * LEASE
    assert not second.take("000/00001")


def test_the_claim_of_a_dead_process_of_this_host_is_free_at_once(two: tuple[Claims, Claims], folder: Folder) -> None:
    first, second = two
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    dead = {**first._host, "pid": gone.pid, "start": "1", "owner": "x", "counter": 3}
    folder.mkdir("claims/000")
    folder.write_new("claims/000/00001", json.dumps(dead).encode())
    assert second.take("000/00001")


def test_the_claim_of_another_host_is_believed_for_a_lease(
    two: tuple[Claims, Claims], folder: Folder, clock: Clock
) -> None:
    _, second = two
    folder.mkdir("claims/000")
    elsewhere = {"host": "other", "boot": "x", "pid": 1, "start": "1", "owner": "x", "counter": 3}
    folder.write_new("claims/000/00001", json.dumps(elsewhere).encode())
    assert not second.take("000/00001")
    clock.now += LEASE
    assert second.take("000/00001")


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"host": 3}', b"\xff\xfe", b"null"])
def test_a_damaged_claim_grows_stale(two: tuple[Claims, Claims], folder: Folder, clock: Clock, text: bytes) -> None:
    _, second = two
    folder.write_new("claims/plan", text)
    assert not second.take("plan")
    clock.now += LEASE
    assert second.take("plan")


def test_claims_come_back_when_their_folder_was_removed(two: tuple[Claims, Claims], folder: Folder) -> None:
    first, _ = two
    folder.trash("claims")
    assert first.take("000/00001")


def test_a_claim_that_cannot_be_released_stops_nobody(
    two: tuple[Claims, Claims], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = two
    assert first.take("plan")

    def refuse(operation: str, path: str, do: Callable[[], Any]) -> Any:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(storage, "interpose", refuse)
    first.release("plan")
    monkeypatch.setattr(storage, "interpose", None)
    assert not second.take("plan")  # it still stands there, and grows stale
    assert second.take("000/00001") and first.take("000/00002")
