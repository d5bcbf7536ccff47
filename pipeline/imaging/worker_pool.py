"""The isolated decoder: processes within a rank that work on bytes that may be hostile.

A crash, a hang, a flood of memory or a wrong answer costs one task, never the rank. A worker is a fresh interpreter (no
fork: ranks have threads), joined to its rank by a socket, over which it answers in plain bytes, nothing that the rank
would execute or unpickle. Large results of a fixed size go through memory that both share (:class:`Slots`).

A worker does its tasks in order and answers with their numbers, so that the first one without an answer is to blame for
its death; the others go to its successor. It ends by itself when its rank is gone, when a task exceeds its time (an
alarm, which also ends code that is stuck in C), and between two tasks when it has grown beyond its memory. The rank
ends one whose answer cannot be right. What is under way is bounded in number and bytes.

A worker that somebody has taken over can write into all slots of its rank, so it can change the pixels of other images
of the batches under way. It can do no more than that to the rank.
"""

from __future__ import annotations

import logging
import os
import pickle
import resource
import selectors
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from pipeline.distributed.environment import tasks_on_node
from pipeline.imaging.slots import Slots, mapped

Token = TypeVar("Token")
Answer = bytes | bytearray

_DEPTH = 3  # tasks that a worker has, so that the next one is there when one is done
_TASKS = 32  # per worker: taken in and not yet handed out, in all; one that hangs holds up those behind it
_BYTES = 2**26  # the same in bytes, of tasks and results
_LARGEST = 2**31  # bytes of an answer
_GRACE = 10.0  # seconds after twice its time that a worker may fail to end itself, in a system call for instance
_STARTS = 3  # workers in a row that may die before their first word
_DEFECTS = 16  # tasks at which the function may raise before any task has been answered
_ASKED = struct.Struct(">IIIQ")  # number of the task, its slot, lengths of its key and its data
_SAID = struct.Struct(">BIQ")  # kind of message, number of the task, length of the body
_HELLO, _RESULT, _FAILED, _LEAVING = range(4)


log = logging.getLogger("pipeline")


class WorkerError(RuntimeError):
    """Workers do not start, or the function raises whatever the data: a defect, never bad data."""


@dataclass(frozen=True, slots=True)
class Lost:
    """The result of a task whose worker died at it, raised, or gave an answer that cannot be right."""

    reason: str
    """`crash` or `timeout`."""
    detail: str


@dataclass(frozen=True)
class WorkerLimits:
    """What a worker may take for one task: seconds, and bytes beyond what it starts with; 0: any."""

    timeout: float = 60.0
    memory: int = 2**31

    @classmethod
    def of(cls, config: Any) -> WorkerLimits:
        """As ``decode_timeout=`` and ``worker_memory=`` (MiB) say."""
        return cls(config.decode_timeout, config.worker_memory * 2**20)


DEFAULT_WORKER_LIMITS = WorkerLimits()


@dataclass(slots=True)
class _Load:
    """Bytes of tasks taken in and not yet handed out, and of their answers: their owner may still need both."""

    bytes: int = 0


@dataclass(slots=True, eq=False)
class Task:
    """Something for a worker to do; ``result`` is there once it is ``done``."""

    data: bytes
    slot: int = 0
    key: bytes = b""
    number: int = 0
    result: Any = None
    done: bool = False
    given_up: bool = False
    tries: int = 0
    load: _Load = field(default_factory=_Load)
    size: int = 0

    def __post_init__(self) -> None:
        self._count(len(self.data))

    def _count(self, size: int) -> None:
        self.size += size
        self.load.bytes += size

    def finish(self, result: Any, size: int = 0) -> None:
        self.result, self.done, self.data = result, True, b""
        self._count(size)


@dataclass(slots=True, eq=False)
class _Worker:
    process: subprocess.Popen[bytes]
    socket: socket.socket
    tasks: deque[Task] = field(default_factory=deque)
    outbox: list[memoryview] = field(default_factory=list)
    inbox: bytearray = field(default_factory=lambda: bytearray(_SAID.size))
    received: int = 0
    head: tuple[int, int] | None = None
    """Kind and number of the message whose body is being received; None: the next is a head."""
    greeted: bool = False
    leaving: bool = False
    since: float = 0.0  # when it was free for the first of its tasks, by our clock

    def send(self, *parts: bytes) -> None:
        self.outbox += map(memoryview, filter(None, parts))

    def flush(self) -> bool:
        """Send what the socket takes; whether that is all."""
        while self.outbox:
            try:
                sent = self.socket.sendmsg(self.outbox[:_VECTORS])
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

    def messages(self, largest: int) -> Iterator[tuple[int, int, bytearray]]:
        """What it has said so far: kind, number of the task, body.

        Raises:
            EOFError: it is gone.
            _WrongAnswer: a body of more than ``largest`` bytes is announced.
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
            length = _SAID.size
            if self.head is None:
                kind, number, length = _SAID.unpack(self.inbox)
                if length > (_TEXT if kind == _FAILED else largest):
                    raise _WrongAnswer("gave an answer that is too long")
                self.head = kind, number
            else:
                (kind, number), self.head = self.head, None
                yield kind, number, self.inbox
            self.inbox, self.received = bytearray(length), 0


_VECTORS = 512  # buffers of one sendmsg; Linux takes 1024
_TEXT = 2**16  # bytes of a traceback
_LINES = 40  # of a traceback that are shown
_DETAIL = 400  # characters


class _WrongAnswer(Exception):
    """A worker does what none of ours should; ``certain``: at the task that it is at, not perhaps at another."""

    def __init__(self, what: str, certain: bool = False) -> None:
        super().__init__(what)
        self.certain = certain


def _as_it_is(answer: bytearray, data: bytes) -> Any:
    return answer


class Pool:
    """Runs ``module:function`` on bytes, in ``workers`` processes (0: in this one, unprotected).

    Args:
        function: called as ``function(data, *arguments)``, with ``slots`` as ``function(slot, data, key, *arguments)``,
            where ``slot`` is uint8 (size,); returns bytes. A task at which it raises is lost.
        timeout: seconds that a task may take; what takes longer twice is lost. 0: any time.
        memory: bytes that a worker may allocate beyond what it starts with; 0: any. More is a ``MemoryError`` in it.
        slots: the memory that tasks are done into.
        read: ``read(answer, data)`` gives a task's result; raises ValueError if the answer cannot be right: then the
            task is lost and its worker is ended. The default gives the answer as it is.
        largest: bytes that an answer may have.
        depth: tasks that a worker is given at once.
    """

    def __init__(
        self,
        function: str,
        arguments: tuple[Any, ...] = (),
        *,
        workers: int = 1,
        timeout: float = 60,
        memory: int = 0,
        slots: Slots | None = None,
        read: Callable[[bytearray, bytes], Any] = _as_it_is,
        largest: int = _LARGEST,
        depth: int = _DEPTH,
    ) -> None:
        self._count = workers
        self._timeout = timeout
        self._function = function
        self._arguments = arguments
        self._slots = slots
        self._read = read
        self._largest = largest
        self._depth = depth
        shared = (slots.descriptor, slots.memory.shape) if slots else None
        self._setup = pickle.dumps((function, arguments, timeout, memory, shared))
        self._queue: deque[Task] = deque()
        self._number = 0
        self._workers: list[_Worker] = []
        self._selector = selectors.DefaultSelector()
        self._failed_starts = 0
        self._defects = 0
        self._works = False
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

    # ---- tasks

    def map(
        self, tasks: Iterable[tuple[Token, bytes | None]], tick: Callable[[], None] = lambda: None
    ) -> Iterator[tuple[Token, Any]]:
        """(token, result) of each (token, data) in order; without data the result is None. For pools without slots.

        ``tick`` is called now and then while waiting, and may raise.

        Raises:
            WorkerError: see there.
        """
        source = iter(tasks)
        under_way: deque[tuple[Token, Task | None]] = deque()
        load = _Load()
        most, most_bytes = _TASKS * max(1, self._count), _BYTES * max(1, self._count)
        more = True
        try:
            while more or under_way:
                block = 1.0
                if more and len(under_way) < most and load.bytes < most_bytes:
                    taken = next(source, None)
                    more = taken is not None
                    if taken is not None:
                        token, data = taken
                        under_way.append((token, None if data is None else self._submit(Task(data, load=load))))
                    block = 0.0
                self._assign()
                while under_way and (under_way[0][1] is None or under_way[0][1].done):
                    token, task = under_way.popleft()
                    load.bytes -= 0 if task is None else task.size
                    yield token, None if task is None else task.result
                    block = 0.0
                if not more and not under_way:
                    return
                if self._count:
                    self._exchange(block)
                if block:
                    tick()
        finally:
            for _, task in under_way:
                if task is not None:
                    task.given_up = True

    def submit(self, data: bytes, slot: int = 0, key: str = "") -> Task:
        """Have ``data`` worked on; with slots into ``slot``, which must not be in use."""
        return self._submit(Task(data, slot, key.encode(errors="surrogatepass")))

    def _submit(self, task: Task) -> Task:
        if self._count:
            self._number = task.number = (self._number + 1) % 2**32
            self._queue.append(task)
        else:
            answer = self._run_here(task)
            task.finish(self._read(answer, task.data), len(answer))
        return task

    def push(self) -> None:
        """Give waiting tasks to workers, if there are enough of them to be worth it; see what workers have said."""
        if len(self._queue) >= self._depth:
            self._assign()
            self._exchange(0)

    def wait(self, task: Task) -> Any:
        """The result of ``task``.

        Raises:
            WorkerError: see there.
        """
        while not task.done:
            self._assign()
            self._exchange(1.0)
        return task.result

    def drain(self) -> None:
        """Forget what waits, and wait for what is being worked on: then all slots are free."""
        self._queue.clear()
        while any(worker.tasks for worker in self._workers):
            self._exchange(1.0)
            self._queue.clear()  # what a worker that died had left

    def _run_here(self, task: Task) -> Any:
        run = _function(self._function)
        if self._slots is None:
            return run(task.data, *self._arguments)
        key = task.key.decode(errors="surrogatepass")
        return run(self._slots.memory[task.slot], task.data, key, *self._arguments)

    # ---- workers

    def _assign(self) -> None:
        """Give waiting tasks to workers that have few, several at once; starts workers that are missing."""
        while self._queue:
            while len(self._workers) < self._count:
                self._workers.append(self._start())
            worker = min(self._workers, key=lambda w: len(w.tasks))
            if len(worker.tasks) > self._depth // 2:
                return
            if not worker.tasks and worker.process.poll() is not None:
                self._bury(worker)  # it has died meanwhile, over no task
                continue
            if not worker.tasks:
                worker.since = time.monotonic()
            share = -(-len(self._queue) // self._count)  # as many for each, if there are few
            for _ in range(min(self._depth - len(worker.tasks), share)):
                task = self._queue.popleft()
                if not task.given_up:
                    worker.tasks.append(task)
                    worker.send(_ASKED.pack(task.number, task.slot, len(task.key), len(task.data)), task.key, task.data)
            self._flush(worker)

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
                pass_fds=[theirs.fileno(), *([self._slots.descriptor] if self._slots else [])],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
            )
        ours.setblocking(False)
        worker = _Worker(process, ours)
        worker.send(_ASKED.pack(0, 0, 0, len(self._setup)), self._setup)
        self._selector.register(ours, selectors.EVENT_READ, worker)
        self._flush(worker)
        return worker

    def _exchange(self, timeout: float) -> None:
        """Send and receive what is due, waiting at most ``timeout`` seconds; tasks of workers that died go back."""
        for key, events in self._selector.select(timeout):
            worker: _Worker = key.data
            if events & selectors.EVENT_WRITE:
                self._flush(worker)
            if events & selectors.EVENT_READ:
                try:
                    for kind, number, body in worker.messages(self._largest):
                        self._take(worker, kind, number, body)
                except EOFError:
                    self._bury(worker)
                except _WrongAnswer as wrong:
                    self._bury(worker, wrong)
        late = time.monotonic() - 2 * self._timeout - _GRACE
        for worker in self._workers:
            if self._timeout and worker.greeted and worker.tasks and worker.since < late:
                worker.process.kill()

    def _take(self, worker: _Worker, kind: int, number: int, body: bytearray) -> None:
        """What a worker has said; raises _WrongAnswer if no worker of ours would."""
        if kind in (_RESULT, _FAILED) and worker.tasks:
            task = worker.tasks[0]
            if number != task.number:
                raise _WrongAnswer("gave the answer to another task")
            if kind == _FAILED:
                raise _WrongAnswer(self._defect(body.decode(errors="replace")), certain=True)
            try:
                result = self._read(body, task.data)
            except ValueError as error:
                raise _WrongAnswer(f"gave {error}", certain=True) from None
            worker.tasks.popleft().finish(result, len(body))
            worker.since, self._works = time.monotonic(), True
        elif kind == _HELLO and not worker.greeted:
            worker.greeted, self._failed_starts, worker.since = True, 0, time.monotonic()
        elif kind == _LEAVING and not worker.leaving:
            worker.leaving = True
        else:
            raise _WrongAnswer("gave no answer")

    def _defect(self, traceback: str) -> str:
        """What to say of a task at which the function raised; the first traceback is logged.

        Raises:
            WorkerError: it raises at all tasks, not only at some images.
        """
        lines = ["".join(c if c.isprintable() else "?" for c in line) for line in traceback.splitlines()] or [""]
        self._defects += 1
        said = f"{self._function} failed in a worker:\n" + textwrap.indent("\n".join(lines[-_LINES:]), "  | ")
        if not self._works and self._defects >= _DEFECTS:
            raise WorkerError(said)
        if self._defects == 1:
            log.warning("%s", said)
        return f"failed with {lines[-1][:_DETAIL]}"

    def _bury(self, worker: _Worker, wrong: _WrongAnswer | None = None) -> None:
        """Forget a worker that has died, or whose answer was ``wrong``; its tasks go to another. The one it was at is
        blamed, but not at the first time where it may be another's doing: a suspended job, somebody short of memory,
        the task before that answered twice or made the worker leave."""
        self._selector.unregister(worker.socket)
        self._workers.remove(worker)
        worker.socket.close()
        if not wrong:
            with suppress(subprocess.TimeoutExpired):
                worker.process.wait(1)
        worker.process.kill()  # no more than its socket may be closed
        code = worker.process.wait()
        if not worker.greeted:
            self._failed_starts += 1
            if self._failed_starts >= _STARTS:
                raise WorkerError(f"worker processes do not start (exit code {code}): see what they say above")
        elif worker.tasks:
            task = worker.tasks[0]
            task.tries += 1
            perhaps = worker.leaving or -code in (signal.SIGALRM, signal.SIGKILL)
            if task.tries > 1 or (wrong.certain if wrong else not perhaps):
                lost = Lost("crash", f"the worker {wrong}") if wrong else _lost(code, self._timeout)
                worker.tasks.popleft().finish(lost)
                if self._slots is not None:
                    self._slots.memory[task.slot] = 0
        self._queue.extendleft(reversed(worker.tasks))


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
    name, arguments, timeout, memory, shared = pickle.loads(_receive(rank)[-1])
    run = _function(name)
    slots = mapped(*shared) if shared else None
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    most = 0
    if memory:
        virtual, own = _memory()
        resource.setrlimit(resource.RLIMIT_AS, (virtual + memory, virtual + memory))
        most = own + memory // 2
    _say(rank, _HELLO)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libraries have much to say about bad files
    while True:
        number, slot, key, data = _receive(rank)
        signal.setitimer(signal.ITIMER_REAL, timeout)
        try:
            answer = run(data, *arguments) if slots is None else run(slots[slot], data, key, *arguments)
        except BaseException:
            _say(rank, _FAILED, number, traceback.format_exc().encode()[-_TEXT:])
            return
        signal.setitimer(signal.ITIMER_REAL, 0)
        _say(rank, _RESULT, number, answer)
        if most and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10 > most and _memory()[1] > most:
            _say(rank, _LEAVING)
            return


def _function(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    return getattr(import_module(module), function)  # type: ignore[no-any-return]


def _memory() -> tuple[int, int]:
    """Virtual memory of this process, and the resident memory that is its own, without slots; in bytes."""
    virtual, resident, shared = map(int, Path("/proc/self/statm").read_text().split()[:3])
    return virtual * resource.getpagesize(), (resident - shared) * resource.getpagesize()


def _say(rank: socket.socket, kind: int, number: int = 0, data: bytes = b"") -> None:
    sent = rank.sendmsg([_SAID.pack(kind, number, len(data)), data]) - _SAID.size
    if sent < len(data):
        rank.sendall(memoryview(data)[max(0, sent) :])


def _receive(rank: socket.socket) -> tuple[int, int, str, bytes]:
    """Number of a task, its slot, key and data."""
    number, slot, key, data = _ASKED.unpack(_exactly(rank, _ASKED.size))
    return number, slot, _exactly(rank, key).decode(errors="surrogatepass"), _exactly(rank, data)


def _exactly(rank: socket.socket, length: int) -> bytes:
    data = rank.recv(length, socket.MSG_WAITALL) if length else b""
    while len(data) < length:  # a signal came in between, or it is more than Linux gives at once
        more = rank.recv(length - len(data), socket.MSG_WAITALL)
        if not more:
            raise EOFError
        data += more
    return data
