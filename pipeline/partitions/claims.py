"""Claims: which rank works on which partition, so that work is rarely done twice. Correctness never depends on them.

A claim is a small file with its owner's id and a counter that the owner's heartbeat increments. It is stale if the
counter has not changed for ``lease`` seconds of the observer's clock, or if its owner ran on this host and is dead.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from functools import cache
from pathlib import Path

from pipeline.storage import GONE, Folder


@cache
def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _started(pid: int) -> str | None:
    """Start time of process ``pid``, in clock ticks since boot; None if it is not running."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state[0] == "Z" else state[19]


class Claims:
    """The claims of one process on the dataset in ``root``; its heartbeat runs until :meth:`close`."""

    def __init__(self, root: Folder, lease: float) -> None:
        self.owner = uuid.uuid4().hex
        self._root = root
        self._lease = lease
        self._host = {"host": socket.gethostname(), "boot": _boot(), "pid": os.getpid(), "start": _started(os.getpid())}
        self._counter = 0
        self._held: set[str] = set()
        self._seen: dict[str, tuple[str, float]] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._heartbeat, name="heartbeat", daemon=True)
        root.mkdir("claims", exist_ok=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        for name in list(self._held):
            self.release(name)

    def take(self, name: str) -> bool:
        """Claim ``name`` (a path below ``claims/``); False if another process holds a fresh claim on it."""
        path = f"claims/{name}"
        for attempt in range(2):
            try:
                self._root.write_new(path, self._text())
                break
            except OSError as error:
                if error.errno in GONE and attempt == 0:
                    self._root.mkdir("claims", exist_ok=True)
                    if "/" in name:
                        self._root.mkdir(f"claims/{name.rpartition('/')[0]}", exist_ok=True)
                    continue
                if error.errno != errno.EEXIST:
                    raise
            if self.fresh(name):
                return False
            self._root.unlink(path, missing_ok=True)
        else:
            return False
        with self._lock:
            self._held.add(name)
        return True

    def fresh(self, name: str) -> bool:
        """Whether the claim ``name`` exists and its owner was alive within the lease, as far as this process knows."""
        try:
            text = self._root.read(f"claims/{name}").decode("utf-8", "replace")
        except OSError as error:
            if error.errno in (*GONE, errno.ENOTDIR):
                return False
            raise
        try:
            owner = json.loads(text)
            here = owner["host"] == self._host["host"] and owner["boot"] == self._host["boot"]
            if here and _started(int(owner["pid"])) != owner["start"]:
                return False
        except (ValueError, KeyError, TypeError):
            pass  # being written, or damaged: the lease decides
        known, since = self._seen.get(name, ("", 0.0))
        now = time.monotonic()
        if known != text:
            self._seen[name] = (text, now)
            return True
        return now - since < self._lease

    def release(self, name: str) -> None:
        with self._lock:
            self._held.discard(name)
            self._seen.pop(name, None)
            with suppress(OSError):  # if it cannot be removed, it becomes stale
                self._root.unlink(f"claims/{name}", missing_ok=True)

    def _text(self) -> bytes:
        return json.dumps({**self._host, "owner": self.owner, "counter": self._counter}).encode()

    def _heartbeat(self) -> None:
        while not self._stop.wait(self._lease / 6):
            try:
                self._move()
            except OSError:
                continue  # a full or removed file system: the worker will notice

    def _move(self) -> None:
        with self._lock:
            self._counter += 1
            for name in self._held:
                self._root.overwrite(f"claims/{name}", self._text())  # the counter grows, so the text never shrinks
