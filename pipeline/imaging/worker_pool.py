"""Isolated worker processes of a rank that process possibly hostile bytes.

A crash, a hang, excessive memory use or an invalid answer costs one task, never the rank. A worker is a new interpreter
(not forked, because ranks have threads) connected to its rank by a socket. Its answers are plain bytes, which the rank
never executes or unpickles. Large results of a fixed size are written to shared memory (:class:`Slots`).

A worker processes its tasks in order and answers with their numbers, so the first unanswered task caused its death; the
others are passed to its successor. It exits when its rank is gone, when a task exceeds the time limit (by an alarm,
which also stops code that hangs in C), and between two tasks when it exceeds its memory limit. The rank kills a worker
that gives an invalid answer. The number and the bytes of pending tasks are limited.

A compromised worker can write to all slots of its rank, and thus change the pixels of other images in the current
batches, but cannot affect the rank in any other way.
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

_DEPTH = 3  # tasks queued per worker, so that it never waits for the next one
_TASKS = 32  # pending tasks per worker, since one that hangs delays all after it
_BYTES = 2**26  # pending bytes of tasks and results per worker
_LARGEST = 2**31  # maximum bytes of an answer
_GRACE = 10.0  # seconds beyond twice the timeout before a worker is killed
_STARTS = 3  # consecutive workers that may die before their first message
_DEFECTS = 16  # tasks that may fail before the first one succeeds
_ASKED = struct.Struct(">IIIQ")  # task number, slot, lengths of key and data
_SAID = struct.Struct(">BIQ")  # kind of message, task number, length of the body
_HELLO, _RESULT, _FAILED, _LEAVING = range(4)


log = logging.getLogger("pipeline")


class WorkerError(RuntimeError):
    """Workers do not start, or the function raises for all data: a defect, not bad data."""


@dataclass(frozen=True, slots=True)
class Lost:
    """The result of a task whose worker died, raised an exception, or gave an invalid answer."""

    reason: str
    """`crash` or `timeout`."""
    detail: str


@dataclass(frozen=True)
class WorkerLimits:
    """Limits of a worker: seconds per task, and bytes beyond its initial memory; 0: no limit."""

    timeout: float = 60.0
    memory: int = 2**31

    @classmethod
    def of(cls, config: Any) -> WorkerLimits:
        """The limits set by ``decode_timeout=`` and ``worker_memory=`` (MiB)."""
        return cls(config.decode_timeout, config.worker_memory * 2**20)


DEFAULT_WORKER_LIMITS = WorkerLimits()


@dataclass(slots=True)
class _Load:
    """Bytes of pending tasks and their answers, both of which the owner may still need."""

    bytes: int = 0


@dataclass(slots=True, eq=False)
class Task:
    """A task for a worker; ``result`` is set once it is ``done``."""

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
    """Kind and task number of the message whose body is being received; None: a header comes next."""
    greeted: bool = False
    leaving: bool = False
    since: float = 0.0  # when it could start the first of its tasks, by our clock

    def send(self, *parts: bytes) -> None:
        self.outbox += map(memoryview, filter(None, parts))

    def flush(self) -> bool:
        """Send as much as the socket accepts; return whether everything was sent."""
        while self.outbox:
            try:
                sent = self.socket.sendmsg(self.outbox[:_VECTORS])
            except BlockingIOError:
                return False
            except OSError:
                self.outbox.clear()  # it is gone, but earlier messages can still be read
                return True
            while self.outbox and sent >= len(self.outbox[0]):
                sent -= len(self.outbox.pop(0))
            if sent:
                self.outbox[0] = self.outbox[0][sent:]
        return True

    def messages(self, largest: int) -> Iterator[tuple[int, int, bytearray]]:
        """Yield the messages received so far: kind, task number, body.

        Raises:
            EOFError: the worker is gone.
            _WrongAnswer: a message announces a body of more than ``largest`` bytes.
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
_LINES = 40  # lines of a traceback that are shown
_DETAIL = 400  # characters


class _WrongAnswer(Exception):
    """A worker violated the protocol; ``certain``: the current task caused it, not possibly another one."""

    def __init__(self, what: str, certain: bool = False) -> None:
        super().__init__(what)
        self.certain = certain


def _as_it_is(answer: bytearray, data: bytes) -> Any:
    return answer


class Pool:
    """Runs ``module:function`` on bytes, in ``workers`` processes (0: in this one, unprotected).

    Args:
        function: called as ``function(data, *arguments)``, or with ``slots`` as ``function(slot, data, key,
            *arguments)``, where ``slot`` is uint8 (size,); returns bytes. A task for which it raises is lost.
        timeout: maximum seconds per task; a task that exceeds it twice is lost. 0: no limit.
        memory: bytes that a worker may allocate beyond its initial memory; more raises ``MemoryError`` in it. 0: no
            limit.
        slots: shared memory for results.
        read: ``read(answer, data)`` returns a task's result, or raises ValueError if the answer is invalid: the task is
            then lost and its worker killed. By default, the result is the answer itself.
        largest: maximum bytes of an answer.
        depth: maximum tasks queued per worker.
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
        """Kill all workers; they are restarted when there is work."""
        for worker in self._workers:
            self._selector.unregister(worker.socket)
        _end_all(self._workers)

    @property
    def pids(self) -> list[int]:
        """Process IDs of the running workers."""
        return [worker.process.pid for worker in self._workers]

    # ---- tasks

    def map(
        self, tasks: Iterable[tuple[Token, bytes | None]], tick: Callable[[], None] = lambda: None
    ) -> Iterator[tuple[Token, Any]]:
        """Yield (token, result) for each (token, data) in order; the result is None without data. Not for pools with
        slots.

        ``tick`` is called regularly while waiting and may raise.

        Raises:
            WorkerError: workers do not start, or the function always raises.
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
        """Queue ``data``; with slots, the result is written to ``slot``, which must not be in use."""
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
        """Send queued tasks to workers if there are enough of them, and process answers."""
        if len(self._queue) >= self._depth:
            self._assign()
            self._exchange(0)

    def wait(self, task: Task) -> Any:
        """Wait for ``task`` and return its result.

        Raises:
            WorkerError: workers do not start, or the function always raises.
        """
        while not task.done:
            self._assign()
            self._exchange(1.0)
        return task.result

    def drain(self) -> None:
        """Discard queued tasks and wait for running ones, after which all slots are free."""
        self._queue.clear()
        while any(worker.tasks for worker in self._workers):
            self._exchange(1.0)
            self._queue.clear()  # tasks left by a worker that died

    def _run_here(self, task: Task) -> Any:
        run = _function(self._function)
        if self._slots is None:
            return run(task.data, *self._arguments)
        key = task.key.decode(errors="surrogatepass")
        return run(self._slots.memory[task.slot], task.data, key, *self._arguments)

    # ---- workers

    def _assign(self) -> None:
        """Send queued tasks to workers with few tasks, several at once; start missing workers."""
        while self._queue:
            while len(self._workers) < self._count:
                self._workers.append(self._start())
            worker = min(self._workers, key=lambda w: len(w.tasks))
            if len(worker.tasks) > self._depth // 2:
                return
            if not worker.tasks and worker.process.poll() is not None:
                self._bury(worker)  # it died while idle
                continue
            if not worker.tasks:
                worker.since = time.monotonic()
            share = -(-len(self._queue) // self._count)  # distribute few tasks evenly
            for _ in range(min(self._depth - len(worker.tasks), share)):
                task = self._queue.popleft()
                if not task.given_up:
                    worker.tasks.append(task)
                    worker.send(_ASKED.pack(task.number, task.slot, len(task.key), len(task.data)), task.key, task.data)
            self._flush(worker)

    def _flush(self, worker: _Worker) -> None:
        """Send as much as possible now, and the rest when the socket is ready."""
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
        """Send and receive messages, waiting at most ``timeout`` seconds; requeue the tasks of dead workers."""
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
        """Process a worker's message; raises _WrongAnswer if it violates the protocol."""
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
        """Describe a task for which the function raised; the first traceback is logged.

        Raises:
            WorkerError: it raises for all tasks, not only for some images.
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
        """Remove a worker that died or gave a ``wrong`` answer, and requeue its tasks.

        Its current task is lost, but only at the second time if something else may be the cause: a suspended job, lack
        of memory on the node, or the previous task, if that answered twice or made the worker leave.
        """
        self._selector.unregister(worker.socket)
        self._workers.remove(worker)
        worker.socket.close()
        if not wrong:
            with suppress(subprocess.TimeoutExpired):
                worker.process.wait(1)
        worker.process.kill()  # it may only have closed its socket
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
    """Number of CPUs for each rank of a node, at least 1, from CPU affinity, cgroup quota and SLURM allocation.

    srun binds each task to its share; a task can be one rank, or a torchrun that starts several. ``os.cpu_count()`` is
    not used because it counts all CPUs of the node.
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
    """Number of processes for ``workers=``: a number, or ``auto`` for the number of this rank's CPUs."""
    return available_cpus(local_world_size) if setting == "auto" else int(setting)


# ---------------------------------------------------------------- in a worker


def main(descriptor: int) -> None:
    """Run a worker on the socket with this file descriptor."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # meant for the rank; a worker exits with its rank
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
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libraries write messages about bad files
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
    """Virtual memory of this process and its private resident memory (without slots), in bytes."""
    virtual, resident, shared = map(int, Path("/proc/self/statm").read_text().split()[:3])
    return virtual * resource.getpagesize(), (resident - shared) * resource.getpagesize()


def _say(rank: socket.socket, kind: int, number: int = 0, data: bytes = b"") -> None:
    sent = rank.sendmsg([_SAID.pack(kind, number, len(data)), data]) - _SAID.size
    if sent < len(data):
        rank.sendall(memoryview(data)[max(0, sent) :])


def _receive(rank: socket.socket) -> tuple[int, int, str, bytes]:
    """Receive a task: number, slot, key, data."""
    number, slot, key, data = _ASKED.unpack(_exactly(rank, _ASKED.size))
    return number, slot, _exactly(rank, key).decode(errors="surrogatepass"), _exactly(rank, data)


def _exactly(rank: socket.socket, length: int) -> bytes:
    data = rank.recv(length, socket.MSG_WAITALL) if length else b""
    while len(data) < length:  # interrupted by a signal, or more than Linux returns at once
        more = rank.recv(length - len(data), socket.MSG_WAITALL)
        if not more:
            raise EOFError
        data += more
    return data
