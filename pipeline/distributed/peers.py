"""Barriers and small messages between ranks, and notifications that a rank has failed.

All of them use one key-value store (torch's TCPStore) that rank 0 or the launcher serves:

    seen/<rank>      node of that rank, and the last barrier that it reached
    arrivals         number of arrivals at barriers, of all ranks and barriers: no rank can arrive at the next barrier
                     before all arrived at this one, so barrier n is complete at n × world_size; no key is ever deleted
    broadcast/<0|1>  the last two broadcasts: a rank that still reads the older one has not yet arrived at the barrier
                     that the writer of the next one must pass
    left, left/<rank>    number of ranks that have ended, and how each ended
    failure          reason given by the first rank that failed

A blocked collective of torch cannot be interrupted, and does not notice a failure elsewhere before its own timeout.
Every rank therefore has a thread that checks for ``failure`` and ends the process if the main thread does not.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from pipeline.distributed.environment import Place
from pipeline.distributed.signals import Stopped

if TYPE_CHECKING:
    from torch.distributed import Store

FINISHED, STOPPED = "finished", "stopped"  # how a rank can end without failing
MAX_BROADCAST = 4 * 2**20  # above 8 MiB, the store closes the connection
LINGER = 30.0  # seconds for which rank 0 serves the store after its own end, if other ranks need it
_WATCH = 1.0  # seconds between two checks for a failure of another rank
_GRACE = 3.0  # seconds for the main thread to end by itself after such a failure
_NAMED = 16  # maximum number of ranks in a message


class BarrierTimeout(TimeoutError):
    """Some ranks did not arrive in time; the message and ``missing`` name them."""

    def __init__(self, message: str, missing: list[int]) -> None:
        super().__init__(message)
        self.missing = missing


class PeerFailed(RuntimeError):
    """Another rank failed or is gone, so that waiting for it will not help."""


class Peers:
    """Communication of this rank with all others.

    Args:
        place: rank and world size of this process; must have an address.
        timeout: seconds to wait for rank 0, and for other ranks at a barrier.
        die: ends the process at once; called if the main thread is stuck.

    Raises:
        ConnectionError: rank 0 does not listen at its address.
    """

    def __init__(self, place: Place, timeout: float, log: logging.Logger, die: Callable[[], None]) -> None:
        self.place, self.timeout, self.log = place, timeout, log
        self._die = die
        self._serves = place.rank == 0 and not place.hosted
        self.store = _connect(place, timeout, serve=self._serves)
        self._barriers = 0
        self._broadcasts = 0
        self._broken = ""
        self._ended = threading.Event()
        self._see("")
        threading.Thread(target=self._watch, name="latentmill-peers", daemon=True).start()

    # ---- barriers and broadcasts

    def barrier(self, name: str, timeout: float | None = None) -> None:
        """Wait until every rank has called this.

        Raises:
            BarrierTimeout: some did not; the message says which, and where they were last seen.
            PeerFailed: one of them has failed or ended in the meantime.
            Stopped: one of them was stopped by a signal.
        """
        if self._broken:
            raise PeerFailed(f"barrier {name!r}: the ranks lost each other at an earlier one: {self._broken}")
        timeout = self.timeout if timeout is None else timeout
        self._barriers += 1
        try:
            self._see(name)
            self.store.add("arrivals", 1)
            self._wait(name, timeout)
        except (BarrierTimeout, PeerFailed) as error:
            self._broken = str(error)
            raise
        except RuntimeError as error:  # raised by torch: the connection broke
            self._broken = f"barrier {name!r}: lost contact with rank 0 at {self.place.address}:{self.place.port}"
            raise PeerFailed(self._broken) from error

    def _wait(self, name: str, timeout: float) -> None:
        complete = self._barriers * self.place.world_size
        for _ in _pauses(timeout):
            left = self.store.add("left", 0)  # read before the arrivals: the last rank to arrive may end at once
            if self.store.add("arrivals", 0) >= complete:
                return
            if failure := self.failure():
                raise PeerFailed(f"barrier {name!r}: {failure}")
            if left:
                self._raise_in_vain(name)
        missing = self._missing()
        raise BarrierTimeout(f"barrier {name!r}: after {timeout:g} s still without {self._describe(missing)}", missing)

    def _raise_in_vain(self, name: str) -> None:
        """Raise because ranks have ended and cannot arrive: Stopped if a signal stopped one, since it concerns all."""
        missing = self._missing()
        message = f"barrier {name!r}: {self._describe(missing)} cannot arrive any more"
        stopped = any(self._read(f"left/{rank}")["how"] == STOPPED for rank in missing)
        raise Stopped(message) if stopped else PeerFailed(message)

    def _see(self, name: str) -> None:
        seen = {"barriers": self._barriers, "name": name, "node": self.place.node}
        self.store.set(f"seen/{self.place.rank}", json.dumps(seen))

    def _missing(self) -> list[int]:
        ranks = range(self.place.world_size)
        return [rank for rank in ranks if self._read(f"seen/{rank}")["barriers"] < self._barriers]

    def _describe(self, ranks: list[int]) -> str:
        """The ranks as text: ``rank 1 on node1 (last at barrier 'plan'), rank 2 (never joined)``."""
        words = []
        for rank in ranks[:_NAMED]:
            seen, left = self._read(f"seen/{rank}"), self._read(f"left/{rank}")
            where = f" on {seen['node']}" if seen["node"] else ""
            last = f"last at barrier {seen['name']!r}" if seen["name"] else "at no barrier yet"
            state = f"ended: {left['how']}" if left["how"] else last if where else "never joined"
            words.append(f"rank {rank}{where} ({state})")
        return ", ".join(words) + (f" and {len(ranks) - _NAMED} more" if len(ranks) > _NAMED else "")

    def _read(self, key: str) -> dict[str, Any]:
        nothing = {"barriers": -1, "name": "", "node": "", "how": ""}
        return nothing | (json.loads(self.store.get(key)) if self.store.check([key]) else {})

    def broadcast(self, value: Any, source: int) -> Any:
        """Return the JSON-able ``value`` of rank ``source`` on every rank. Waits for all ranks, as :meth:`barrier`.

        Raises:
            ValueError: the value is larger than :data:`MAX_BROADCAST`: pass it in a file.
        """
        key = f"broadcast/{self._broadcasts % 2}"
        self._broadcasts += 1
        if self.place.rank == source:
            text = json.dumps(value)
            if len(text) > MAX_BROADCAST:
                raise ValueError(f"broadcast of {len(text)} bytes: more than {MAX_BROADCAST}, pass it in a file")
            self.store.set(key, text)
        self.barrier(f"broadcast from rank {source}")
        return json.loads(self.store.get(key))

    # ---- failures

    def failure(self) -> str:
        """The reason given by the rank that failed first; empty if none failed."""
        return self.store.get("failure").decode() if self.store.check(["failure"]) else ""

    def fail(self, reason: str) -> None:
        """Report to the other ranks that this rank failed; without effect if another rank failed first."""
        self.store.compare_set("failure", "", f"rank {self.place.rank} on {self.place.node} failed: {reason}")

    def leave(self, how: str, linger: float) -> None:
        """Report how this rank ended. Rank 0 then serves the store until all have left, at most ``linger`` seconds."""
        self._ended.set()
        with contextlib.suppress(RuntimeError):  # raised by torch: rank 0 has already stopped serving the store
            self.store.set(f"left/{self.place.rank}", json.dumps({"how": how}))
            self.store.add("left", 1)
            for _ in _pauses(linger if self._serves else 0):
                if self.store.add("left", 0) >= self.place.world_size:
                    break

    def _watch(self) -> None:
        try:
            store = _connect(self.place, self.timeout, serve=False)  # two threads cannot share one client
            while not store.check(["failure"]):
                if self._ended.wait(_WATCH):
                    return
            failure = store.get("failure").decode()
        except (RuntimeError, OSError):
            return  # the store is gone, and rank 0 with it: ranks that wait for rank 0 will notice
        if self._ended.wait(_GRACE):
            return
        self.log.error("%s; this rank was stuck here:\n%s", failure, _stack_of_main_thread())
        self._die()


def _connect(place: Place, timeout: float, *, serve: bool) -> Store:
    import torch.distributed as dist

    where = f"rank 0 at {place.address}:{place.port}"
    if not serve:
        _await_listener(place, timeout)
    try:
        store = dist.TCPStore(
            place.address,
            place.port,
            is_master=serve,
            timeout=timedelta(seconds=timeout),
            wait_for_workers=False,  # unlike a barrier, this would not say which ranks are missing
        )
    except RuntimeError as error:
        advice = "; is the port taken? MASTER_PORT sets another" if serve else ""
        raise ConnectionError(f"{where}: {str(error).splitlines()[0]}{advice}") from error
    return dist.PrefixStore(f"latentmill/{place.life}", store)


def _await_listener(place: Place, timeout: float) -> None:
    """Wait for rank 0 with plain sockets, because torch prints pages of stack frames while it waits."""
    reason: OSError | None = None
    for _ in _pauses(timeout):
        try:
            socket.create_connection((place.address, place.port), timeout=max(1.0, timeout)).close()
            return
        except OSError as error:
            reason = error
    raise ConnectionError(
        f"rank 0 does not listen at {place.address}:{place.port} after {timeout:g} s ({reason}); "
        "did it start? MASTER_ADDR and MASTER_PORT set another place"
    )


def somebody_listens(place: Place) -> bool:
    """Whether rank 0 (or the launcher) serves a store to which a failure could be reported."""
    try:
        socket.create_connection((place.address, place.port), timeout=1.0).close()
    except OSError:
        return False
    return True


def _pauses(timeout: float) -> Iterator[None]:
    """Yield at once and then after growing pauses, for the last time when ``timeout`` seconds have passed."""
    end = time.monotonic() + timeout
    pause = 0.002
    yield
    while (rest := end - time.monotonic()) > 0:
        time.sleep(min(pause, rest))
        pause = min(1.5 * pause, 0.25)
        yield


def _stack_of_main_thread() -> str:
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return "".join(traceback.format_stack(frame, limit=12)) if frame else ""


def quiet_torch() -> None:
    """Keep a lost connection from printing pages of C++ frames on every rank. Call before torch is imported."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
