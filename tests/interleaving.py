"""A scheduler of processes that share an output: each is a thread that stops before every storage operation.

One of them moves at a time, one operation at a time, so that any interleaving can be had, and had again. The file
system is a real one; what NFS may do besides is played: look-ups that do not see yet what another node has created,
renames that succeeded and report ENOENT.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import threading
import traceback
import uuid
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline import storage
from pipeline.config.schema import ConfigError
from pipeline.partitions import claims, engine, finalize, planning
from pipeline.partitions.attempt import Superseded
from pipeline.partitions.dataset import Dataset, SlotReader
from pipeline.partitions.stage import Stage
from pipeline.storage import Folder, StorageError
from pipeline.telemetry import events as telemetry

_PATIENCE = 60.0  # real seconds for one operation, before we call it a deadlock
_CREATING = ("mkdir", "rename", "create", "write_small")
_LOOKING = ("stat", "read", "open", "listdir")
EXPECTED = (StorageError, Superseded, ConfigError)


def meaning(operation: str, name: str) -> str:
    """Renames by what they do: commit a partition or a plan, publish a file of a finished output, take away."""
    if operation == "mkdir" and name.startswith(".final."):
        return "finish"
    if operation != "rename" or name in ("b", "c"):  # those of the probe
        return ""
    if name[:1].isdigit():
        return "commit"
    if name.startswith("plan"):
        return "plan"
    return "trash" if name.startswith(".trash.") else "move aside" if name.startswith(".") else "publish"


class Killed(BaseException):
    """The process is no more: every operation that it still tries raises this, and does nothing."""


class Actor:
    """One process: a function that runs from one storage operation to the next, when it is told to."""

    def __init__(self, world: World, number: int, kind: str, function: Callable[[], Any]) -> None:
        self.world = world
        self.number = number
        self.kind = kind
        self.next = ("start", "")
        self.steps = 0
        self.done = False
        self.dead = False
        self.result: Any = None
        self.error: BaseException | None = None
        self.trace = ""
        self.opened: set[int] = set()  # inodes of roots that it has opened by their path
        self.enoent_after_rename = False
        self.stale_look_ups = 0
        self.horizon = 0  # what others have created since is not seen by stale look-ups
        self.fresh: dict[str, int] = {}  # folder → when we changed it last: our view of it is at least of then
        self.uuids = 0
        self._function = function
        self._go = threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, name=f"{kind} {number}", daemon=True)

    def __repr__(self) -> str:
        return f"<{self.kind} {self.number} after {self.steps} before {self.next[0]} {os.path.basename(self.next[1])}>"

    def start(self) -> None:
        self._thread.start()
        self.world.wait()

    def _run(self) -> None:
        self.world.actors_by_thread[threading.get_ident()] = self
        try:
            self.pause("start", "")
            self.result = self._function()
        except Killed:
            pass
        except BaseException as error:
            self.error = error
            self.trace = traceback.format_exc()
        finally:
            self.done = True
            self.world.moved.release()

    def pause(self, operation: str, path: str) -> None:
        """Called in the thread: wait until it is our turn."""
        if self.dead:
            raise Killed
        self.next = (operation, path)
        self.world.moved.release()
        self._go.acquire()
        if self.dead:
            raise Killed

    # ---- called by the scheduler

    def step(self) -> None:
        """Let it do its next operation, and go on to the one after."""
        self.steps += 1
        self._go.release()
        self.world.wait()

    def run(self, most: int, before: str = "") -> int:
        """Let it do up to ``most`` operations, but stop before one that is called ``before``; how many it did."""
        for count in range(most):
            if self.done or (count and before and before in self.about_to):
                return count
            self.step()
        return most

    @property
    def about_to(self) -> tuple[str, str]:
        """What its next operation is called: its kind, and for some what it means."""
        operation, path = self.next
        return operation, meaning(operation, os.path.basename(path))

    def kill(self) -> None:
        if not self.done:
            self.dead = True
            self._go.release()
            self.world.wait()
        self._thread.join(_PATIENCE)
        assert not self._thread.is_alive(), f"{self!r} did not die"

    @property
    def unexpected(self) -> str:
        """The traceback of an error that no person should see."""
        ours = self.error is None or self.dead or isinstance(self.error, EXPECTED)
        return "" if ours else f"{self!r}:\n{self.trace}"


class World:
    """The file system, the clock and all processes."""

    def __init__(self, folder: Path, statistics: Counter[str]) -> None:
        self.folder = folder
        self.statistics = statistics
        self.actors: list[Actor] = []
        self.actors_by_thread: dict[int, Actor] = {}
        self.moved = threading.Semaphore(0)
        self.clock = 1000.0
        self.operations = 0
        self.created: dict[str, tuple[int, Actor | None]] = {}
        self.uuids = 0
        self.winners: set[str] = set()  # ids of attempts that were committed
        self._patch = pytest.MonkeyPatch()

    def __enter__(self) -> World:
        time = SimpleNamespace(monotonic=lambda: self.clock, sleep=self._sleep)
        for module in (engine, planning, claims):
            self._patch.setattr(module, "time", time)
        for value in [value for owner in (Dataset, SlotReader, Stage) for value in vars(owner).values()]:
            if isinstance(value, cached_property) and hasattr(value, "lock"):  # until Python 3.12, one for all threads
                self._patch.setattr(value, "lock", nullcontext())
        self._patch.setattr(claims.Claims, "_heartbeat", lambda claims: None)
        self._patch.setattr(telemetry.Events, "_beats", lambda events, ended: None)
        self._patch.setattr(finalize, "software", self._software)
        self._patch.setattr(uuid, "uuid4", self._uuid)
        self._patch.setattr(Folder, "open", classmethod(self._opening(Folder.open.__func__)))  # type: ignore[attr-defined]
        self._patch.setattr(storage, "interpose", self._interpose)
        return self

    def __exit__(self, *error: object) -> None:
        for actor in self.actors:
            actor.kill()
        self._patch.undo()
        shutil.rmtree(self.folder, ignore_errors=True)

    def wait(self) -> None:
        assert self.moved.acquire(timeout=_PATIENCE), f"deadlock: {self.actors}"

    def spawn(self, kind: str, function: Callable[[], Any]) -> Actor:
        actor = Actor(self, len(self.actors), kind, function)
        self.actors.append(actor)
        actor.start()
        return actor

    @property
    def alive(self) -> list[Actor]:
        return [actor for actor in self.actors if not actor.done]

    # ---- what stands in for the system

    def _current(self) -> Actor | None:
        return self.actors_by_thread.get(threading.get_ident())

    def _sleep(self, seconds: float) -> None:
        actor = self._current()
        if actor is not None:
            actor.pause("sleep", "")
        self.clock += max(seconds, 0.001)

    def _uuid(self) -> SimpleNamespace:
        """Like uuid4, but it tells who made it, and is the same in every repetition."""
        actor = self._current()
        counter = actor or self
        counter.uuids += 1
        owner = actor.number + 1 if actor else 0
        text = f"{hashlib.md5(f'{owner} {counter.uuids}'.encode()).hexdigest()[:28]}{owner:04x}"
        return SimpleNamespace(hex=text, int=int(text, 16))

    def _software(self) -> dict[str, str]:
        """No two processes have the same versions of everything, so that it shows whose manifest.json is there."""
        actor = self._current()
        return {"process": str(actor.number if actor else -1)}

    def _opening(self, real: Callable[..., Folder]) -> Callable[..., Folder]:
        def opened(cls: type[Folder], path: str | Path, *, create: bool = False) -> Folder:
            folder = real(cls, path, create=create)
            actor = self._current()
            if actor is not None:
                actor.opened.add(os.fstat(folder.fd).st_ino)
            return folder

        return opened

    def _interpose(self, operation: str, path: str, do: Callable[[], Any]) -> Any:
        actor = self._current()
        if actor is not None:
            actor.pause(operation, path)
        self.operations += 1
        if operation == "fsync":
            return None
        if actor is not None and operation in _LOOKING and actor.stale_look_ups:
            return self._look_stale(actor, operation, path, do)
        result = self._do(actor, operation, path, do)
        if operation in _CREATING:
            self.created[path] = (self.operations, actor)
        if actor is not None and operation not in _LOOKING:
            actor.fresh[os.path.dirname(path)] = self.operations
        return result

    def _do(self, actor: Actor | None, operation: str, path: str, do: Callable[[], Any]) -> Any:
        meant = meaning(operation, os.path.basename(path))
        try:
            result = do()
        except OSError as error:
            if meant and actor is not None:
                how = "taken" if error.errno in storage.TAKEN else "gone"
                self.statistics[f"{meant} lost: {how}"] += 1
            raise
        if meant and actor is not None:
            self.statistics[f"{meant} won"] += 1
        if meant == "commit" and (record := Path(path) / "record.json").exists():
            self.winners.add(json.loads(record.read_bytes())["attempt"])
        if operation == "rename" and actor is not None and actor.enoent_after_rename:
            actor.enoent_after_rename = False
            self.statistics["renames that succeeded and reported ENOENT"] += 1
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return result

    # ---- stale look-ups

    def _unseen(self, actor: Actor, path: str) -> bool:
        """Whether the view that ``actor`` has of the folder of ``path`` is older than what lies there."""
        created, creator = self.created.get(path, (0, None))
        return creator is not actor and created > max(actor.horizon, actor.fresh.get(os.path.dirname(path), 0))

    def _look_stale(self, actor: Actor, operation: str, path: str, do: Callable[[], Any]) -> Any:
        actor.stale_look_ups -= 1
        place = Path(path)
        if operation == "listdir":
            names = do()
            seen = [name for name in names if not self._unseen(actor, str(place / name))]
            self.statistics["stale look-ups"] += len(seen) < len(names)
            return seen
        depth = len(self.folder.parts) + 1  # the root of the output is open: nobody looks it up any more
        if any(self._unseen(actor, str(part)) for part in (place, *place.parents) if len(part.parts) > depth):
            self.statistics["stale look-ups"] += 1
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return do()
