"""Processes within a rank that work on bytes that may be hostile: a crash, a hang or a flood of memory costs one task.

A worker is a fresh interpreter (no fork: ranks have threads), joined to its rank by a socket, over which it answers in
plain bytes, nothing that the rank would execute. It does its tasks in order, so that the first one without an answer is
to blame for its death; the others go to its successor. It ends by itself when its rank is gone, when a task exceeds its
time (an alarm, which also ends code that is stuck in C), and between two tasks when it has grown beyond its memory.
Results come in the order of the tasks; what is under way is bounded in number and bytes.
"""

from __future__ import annotations

import os
import pickle
import resource
import selectors
import signal
import socket
import struct
import subprocess
import sys
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Generic, TypeVar

from pipeline.distributed.environment import tasks_on_node

Token = TypeVar("Token")
Answer = bytes | bytearray

_DEPTH = 3  # tasks that a worker has, so that the next one is there when one is done
_TASKS = 32  # per worker: taken in and not yet handed out, in all; one that hangs holds up those behind it
_BYTES = 2**26  # the same in bytes, of tasks and results
_LARGEST = 2**31  # bytes of a result
_GRACE = 10.0  # seconds after twice its time that a worker may fail to end itself, in a system call for instance
_STARTS = 3  # workers in a row that may die before their first word
_HEAD = struct.Struct(">BQ")
_HELLO, _TASK, _RESULT, _FAILED, _LEAVING = range(5)


class WorkerError(RuntimeError):
    """Workers do not start, or the function raised what it should not: a defect, never bad data."""


@dataclass(frozen=True, slots=True)
class Lost:
    """The result of a task whose worker died at it."""

    reason: str
    """`crash` or `timeout`."""
    detail: str


@dataclass(slots=True)
class _Load:
    """Bytes of tasks taken in and not yet handed out, and of their results: their owner may still need both."""

    bytes: int = 0


@dataclass(slots=True, eq=False)
class _Task(Generic[Token]):
    token: Token
    data: bytes | None
    load: _Load
    result: Answer | Lost | None = None
    done: bool = False
    tries: int = 0

    def __post_init__(self) -> None:
        self.done = self.data is None
        self.load.bytes += self.size

    def finish(self, result: Answer | Lost) -> None:
        self.load.bytes -= self.size
        self.result, self.done = result, True
        self.load.bytes += self.size

    @property
    def size(self) -> int:
        return len(self.data or b"") + (len(self.result) if isinstance(self.result, (bytes, bytearray)) else 0)


@dataclass(slots=True, eq=False)
class _Worker:
    process: subprocess.Popen[bytes]
    socket: socket.socket
    tasks: deque[_Task[Any]] = field(default_factory=deque)
    outbox: list[memoryview] = field(default_factory=list)
    inbox: bytearray = field(default_factory=lambda: bytearray(_HEAD.size))
    received: int = 0
    kind: int = -1  # of the message whose body is being received; -1: the next is a head
    greeted: bool = False
    leaving: bool = False
    since: float = 0.0  # when it was free for the first of its tasks, by our clock

    def send(self, message: bytes) -> None:
        self.outbox += (memoryview(_HEAD.pack(_TASK, len(message))), memoryview(message))

    def flush(self) -> bool:
        """Send what the socket takes; whether that is all."""
        while self.outbox:
            try:
                sent = self.socket.sendmsg(self.outbox)
            except BlockingIOError:
                return False
            except OSError:
                self.outbox.clear()  # it is gone; what it said before is still to be read
                return True
            while self.outbox and sent >= len(self.outbox[0]):
                sent -= len(self.outbox.pop(0))
            if sent:
                self.outbox[0] = self.outbox[0][sent:]
        return True

    def messages(self) -> Iterator[tuple[int, bytearray]]:
        """What it has said so far: kind and body.

        Raises:
            EOFError: it is gone, or says what no worker of ours would.
        """
        while True:
            while self.received < len(self.inbox):
                try:
                    count = self.socket.recv_into(memoryview(self.inbox)[self.received :])
                except BlockingIOError:
                    return
                except OSError:
                    count = 0
                if count == 0:
                    raise EOFError
                self.received += count
            if self.kind < 0:
                self.kind, length = _HEAD.unpack(self.inbox)
                if length > _LARGEST:
                    raise EOFError
            else:
                kind, body = self.kind, self.inbox
                self.kind, length = -1, _HEAD.size
                yield kind, body
            self.inbox, self.received = bytearray(length), 0


class Pool:
    """Runs ``module:function`` on bytes, in ``workers`` processes (0: in this one, unprotected).

    Args:
        function: called as ``function(data, *arguments)``; raises nothing, returns bytes.
        timeout: seconds that a task may take; what takes longer twice is lost. 0: any time.
        memory: bytes that a worker may allocate beyond what it starts with; 0: any. More is a ``MemoryError`` in it.
    """

    def __init__(
        self, function: str, arguments: tuple[Any, ...] = (), *, workers: int = 1, timeout: float = 60, memory: int = 0
    ) -> None:
        self._count = workers
        self._timeout = timeout
        self._function = function
        self._arguments = arguments
        self._setup = pickle.dumps((function, arguments, timeout, memory))
        self._workers: list[_Worker] = []
        self._selector = selectors.DefaultSelector()
        self._failed_starts = 0
        self._finalizer = weakref.finalize(self, _end, self._workers, self._selector)

    def close(self) -> None:
        """End all workers; they start again when there is work."""
        for worker in self._workers:
            self._selector.unregister(worker.socket)
        _end_all(self._workers)

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers that run."""
        return [worker.process.pid for worker in self._workers]

    def map(
        self, tasks: Iterable[tuple[Token, bytes | None]], tick: Callable[[], None] = lambda: None
    ) -> Iterator[tuple[Token, Answer | Lost | None]]:
        """(token, result) of each (token, data) in order; without data the result is None.

        ``tick`` is called now and then while waiting, and may raise.

        Raises:
            WorkerError: see there.
        """
        if self._count == 0:
            run = _function(self._function)
            for token, data in tasks:
                yield token, None if data is None else run(data, *self._arguments)
            return
        source = iter(tasks)
        open_tasks: deque[_Task[Token]] = deque()
        waiting: deque[_Task[Token]] = deque()
        load = _Load()
        more = True
        while True:
            block = 1.0
            if more and len(open_tasks) < _TASKS * self._count and load.bytes < _BYTES * self._count:
                taken = next(source, None)
                more = taken is not None
                if taken is not None:
                    task = _Task(*taken, load)
                    open_tasks.append(task)
                    if not task.done:
                        waiting.append(task)
                block = 0.0
            while waiting and self._assign(waiting[0]):
                waiting.popleft()
            while open_tasks and open_tasks[0].done:
                done = open_tasks.popleft()
                load.bytes -= done.size
                yield done.token, done.result
                block = 0.0
            if not more and not open_tasks:
                return
            waiting.extendleft(reversed(self._exchange(block)))
            if block:
                tick()

    # ---- workers

    def _assign(self, task: _Task[Any]) -> bool:
        """Give ``task`` to a worker that has room; starts those that are missing."""
        while len(self._workers) < self._count:
            self._workers.append(self._start())
        worker = min(self._workers, key=lambda w: len(w.tasks))
        if len(worker.tasks) >= _DEPTH:
            return False
        assert task.data is not None
        if not worker.tasks:
            worker.since = time.monotonic()
        worker.tasks.append(task)
        worker.send(task.data)
        self._flush(worker)
        return True

    def _flush(self, worker: _Worker) -> None:
        """Send what can be sent; the rest when the socket takes it."""
        events = selectors.EVENT_READ | (0 if worker.flush() else selectors.EVENT_WRITE)
        if self._selector.get_key(worker.socket).events != events:
            self._selector.modify(worker.socket, events, worker)

    def _start(self) -> _Worker:
        ours, theirs = socket.socketpair()
        with theirs:
            for name in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                ours.setsockopt(socket.SOL_SOCKET, name, 2**20)
                theirs.setsockopt(socket.SOL_SOCKET, name, 2**20)
            paths = [path or os.getcwd() for path in sys.path]
            process = subprocess.Popen(
                [sys.executable, "-c", f"from pipeline.imaging.worker_pool import main; main({theirs.fileno()})"],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
            )
        ours.setblocking(False)
        worker = _Worker(process, ours)
        worker.send(self._setup)
        self._selector.register(ours, selectors.EVENT_READ, worker)
        self._flush(worker)
        return worker

    def _exchange(self, timeout: float) -> list[_Task[Any]]:
        """Send and receive what is due, waiting at most so many seconds; tasks to be assigned anew."""
        anew: list[_Task[Any]] = []
        for key, events in self._selector.select(timeout):
            worker: _Worker = key.data
            if events & selectors.EVENT_WRITE:
                self._flush(worker)
            if events & selectors.EVENT_READ:
                try:
                    for kind, body in worker.messages():
                        self._take(worker, kind, body)
                except EOFError:
                    anew += self._bury(worker)
        late = time.monotonic() - 2 * self._timeout - _GRACE
        for worker in self._workers:
            if self._timeout and worker.greeted and worker.tasks and worker.since < late:
                worker.process.kill()
        return anew

    def _take(self, worker: _Worker, kind: int, body: bytearray) -> None:
        """What a worker has said; raises EOFError if no worker of ours would."""
        if kind == _RESULT and worker.tasks:
            worker.tasks.popleft().finish(body)
            worker.since = time.monotonic()
        elif kind == _HELLO:
            worker.greeted, self._failed_starts, worker.since = True, 0, time.monotonic()
        elif kind == _LEAVING:
            worker.leaving = True
        elif kind == _FAILED:
            raise WorkerError(f"{self._function} failed in a worker:\n{body.decode(errors='replace')}")
        else:
            raise EOFError

    def _bury(self, worker: _Worker) -> list[_Task[Any]]:
        """Forget a worker that has died; its tasks that are to be done by another. The one it was at is blamed, but
        not at the first time where it may be another's doing: a suspended job, somebody short of memory."""
        self._selector.unregister(worker.socket)
        self._workers.remove(worker)
        worker.socket.close()
        with suppress(subprocess.TimeoutExpired):
            worker.process.wait(1)
        worker.process.kill()  # no more than its socket may be closed
        code = worker.process.wait()
        if not worker.greeted:
            self._failed_starts += 1
            if self._failed_starts >= _STARTS:
                raise WorkerError(f"worker processes do not start (exit code {code}): see what they say above")
        elif worker.tasks and not worker.leaving:
            task = worker.tasks[0]
            task.tries += 1
            if task.tries > 1 or -code not in (signal.SIGALRM, signal.SIGKILL):
                worker.tasks.popleft()
                task.finish(_lost(code, self._timeout))
        return list(worker.tasks)


def _lost(code: int, timeout: float) -> Lost:
    if -code == signal.SIGALRM:
        return Lost("timeout", f"took longer than {timeout:g} s")
    with suppress(ValueError):
        return Lost("crash", f"the worker died of {signal.Signals(-code).name}")
    return Lost("crash", f"the worker ended with code {code}")


def _end(workers: list[_Worker], selector: selectors.BaseSelector) -> None:
    _end_all(workers)
    selector.close()


def _end_all(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.process.kill()
        worker.socket.close()
    for worker in workers:
        worker.process.wait()
    workers.clear()


def available_cpus(local_world_size: int = 1) -> int:
    """CPUs for each of a node's ranks, at least 1: by the affinity, the cgroup's quota, and what SLURM granted.

    srun binds each task to its own share; a task may be one rank, or a torchrun that starts several. Never
    ``os.cpu_count()``, which counts the CPUs of the whole node.
    """
    cpus = len(os.sched_getaffinity(0))
    with suppress(OSError, ValueError):
        quota, period = _cgroup_file("cpu.max").read_text().split()
        cpus = min(cpus, int(quota) // int(period))
    if "SLURM_STEP_ID" not in os.environ:
        return max(1, cpus // local_world_size)
    tasks = tasks_on_node(os.environ) if os.environ.get("SLURM_STEP_TASKS_PER_NODE") else local_world_size
    per_task, on_node = (int(os.environ.get(f"SLURM_CPUS_{name}") or 0) for name in ("PER_TASK", "ON_NODE"))
    share = per_task or on_node // tasks
    return max(1, min(cpus, share or cpus) // max(1, local_world_size // tasks))


def _cgroup_file(name: str) -> Path:
    """A control file of this process's own cgroup (version 2)."""
    own = next(line[3:].strip() for line in Path("/proc/self/cgroup").read_text().splitlines() if line[:3] == "0::")
    return Path("/sys/fs/cgroup") / own.lstrip("/") / name


def worker_count(setting: str, local_world_size: int = 1) -> int:
    """How many processes ``workers=`` asks for: a number, or ``auto`` for the CPUs of this rank."""
    return available_cpus(local_world_size) if setting == "auto" else int(setting)


# ---------------------------------------------------------------- in a worker


def main(descriptor: int) -> None:
    """A worker's life, on the socket with this number."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # meant for the rank: a worker ends with it
    with suppress(ConnectionError, EOFError), socket.socket(fileno=descriptor) as rank:
        _serve(rank)


def _serve(rank: socket.socket) -> None:
    name, arguments, timeout, memory = pickle.loads(_receive(rank))
    run = _function(name)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    most = 0
    if memory:
        virtual, resident = _memory()
        resource.setrlimit(resource.RLIMIT_AS, (virtual + memory, virtual + memory))
        most = resident + memory // 2
    _say(rank, _HELLO)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libraries have much to say about bad files
    while True:
        data = _receive(rank)
        signal.setitimer(signal.ITIMER_REAL, timeout)
        try:
            answer = run(data, *arguments)
        except BaseException:
            _say(rank, _FAILED, traceback.format_exc().encode())
            return
        signal.setitimer(signal.ITIMER_REAL, 0)
        _say(rank, _RESULT, answer)
        if most and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10 > most and _memory()[1] > most:
            _say(rank, _LEAVING)
            return


def _function(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    return getattr(import_module(module), function)  # type: ignore[no-any-return]


def _memory() -> tuple[int, int]:
    """Virtual and resident memory of this process in bytes."""
    sizes = Path("/proc/self/statm").read_text().split()
    return int(sizes[0]) * resource.getpagesize(), int(sizes[1]) * resource.getpagesize()


def _say(rank: socket.socket, kind: int, data: bytes = b"") -> None:
    sent = rank.sendmsg([_HEAD.pack(kind, len(data)), data]) - _HEAD.size
    if sent < len(data):
        rank.sendall(memoryview(data)[sent:])


def _receive(rank: socket.socket) -> bytes:
    return _exactly(rank, _HEAD.unpack(_exactly(rank, _HEAD.size))[1])


def _exactly(rank: socket.socket, length: int) -> bytes:
    data = rank.recv(length, socket.MSG_WAITALL) if length else b""
    while len(data) < length:  # a signal came in between, or it is more than Linux gives at once
        more = rank.recv(length - len(data), socket.MSG_WAITALL)
        if not more:
            raise EOFError
        data += more
    return data
