"""Pictures decoded by worker processes, into memory that is shared, reused and, for a GPU, pinned.

The memory has no name that could outlive the processes (it is a memfd), and workers end with the process that started
them. A worker that dies over a picture costs that picture alone.
"""

from __future__ import annotations

import mmap
import os
import signal
import socket
import subprocess
import sys
from collections import deque
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import images

_ROOT = str(Path(__file__).resolve().parents[2])


@dataclass
class Decoded:
    """A picture on its way; ``pixels`` and the size are there once :meth:`Decoders.wait` has returned.

    Attributes:
        width, height: of the source, upright; ``pixels`` may be smaller, see :func:`pipeline.images.decode`.
        pixels: uint8 (h, w, 3), in the slot if it fits.
        in_slot: whether it did.
        reason, detail, retryable: why there are no pixels.
    """

    data: bytes
    slot: int
    done: bool = False
    width: int = 0
    height: int = 0
    pixels: np.ndarray | None = None
    in_slot: bool = False
    reason: str = ""
    detail: str = ""
    retryable: bool = False


class Decoders:
    """Decodes pictures for square crops of ``resolution`` pixels and less.

    Args:
        workers: processes; none: pictures are decoded at once, here.
        slots: how many pictures the shared memory holds, at ``slot_bytes`` each. Larger pictures come by themselves.
    """

    def __init__(self, workers: int, slots: int, slot_bytes: int, resolution: int) -> None:
        self.memory, self._fd = _shared(slots, slot_bytes)
        self._resolution = resolution
        self._queue: deque[Decoded] = deque()
        self._idle: list[_Worker] = []
        self._busy: dict[Connection, tuple[_Worker, Decoded]] = {}
        for _ in range(workers):
            self._idle.append(self._started())
        self._here = not workers

    def _started(self) -> _Worker:
        return _Worker(self._fd, self.memory.shape, self._resolution)

    def submit(self, data: bytes, slot: int) -> Decoded:
        """Have ``data`` decoded into ``slot``, which must not be in use."""
        job = Decoded(data, slot)
        if self._here:
            _take(job, *_decode(data, self.memory[slot], self._resolution), self.memory)
        else:
            self._queue.append(job)
            self._pump(0)
        return job

    def wait(self, job: Decoded) -> None:
        """Until ``job`` is done."""
        while not job.done:
            self._pump(None)

    def drain(self) -> None:
        """Forget what waits, and wait for what is being decoded."""
        self._queue.clear()
        while self._busy:
            self._pump(None)

    def _pump(self, timeout: float | None) -> None:
        while self._queue and self._idle:
            worker, job = self._idle.pop(), self._queue.popleft()
            self._busy[worker.connection] = (worker, job)
            try:
                worker.connection.send((job.slot, job.data))
            except OSError:
                continue  # it is dead: reading from it tells
        for ready in wait(list(self._busy), timeout):
            assert isinstance(ready, Connection)
            worker, job = self._busy.pop(ready)
            try:
                said, pixels = worker.connection.recv()
                _take(job, said, pixels, self.memory)
            except (EOFError, OSError):
                worker.process.kill()
                worker.process.wait()
                job.done, job.reason, job.retryable = True, "decoder_died", True
                worker = self._started()
            self._idle.append(worker)

    def close(self) -> None:
        """End the workers."""
        for worker in [*self._idle, *(worker for worker, _ in self._busy.values())]:
            worker.connection.close()
            worker.process.wait()
        self._idle, self._busy = [], {}


class _Worker:
    """A process, and the way to talk to it."""

    def __init__(self, memory: int, shape: tuple[int, ...], resolution: int) -> None:
        ours, theirs = socket.socketpair()
        program = (
            f"from pipeline.latents.decoding import serve; serve({theirs.fileno()}, {memory}, {shape}, {resolution})"
        )
        path = os.pathsep.join([_ROOT, *filter(None, [os.environ.get("PYTHONPATH")])])
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", program],
                pass_fds=(theirs.fileno(), memory),
                env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # signals are for the rank
            )
        self.connection = Connection(ours.detach())


def _shared(slots: int, slot_bytes: int) -> tuple[np.ndarray, int]:
    fd = os.memfd_create("latentmill")
    size = max(1, slots * slot_bytes)
    os.ftruncate(fd, size)
    return np.frombuffer(mmap.mmap(fd, size), np.uint8)[: slots * slot_bytes].reshape(slots, slot_bytes), fd


def _take(job: Decoded, said: dict[str, Any], pixels: np.ndarray | None, memory: np.ndarray) -> None:
    job.width, job.height = said["size"]
    if said["shape"]:
        height, width = said["shape"]
        job.pixels = memory[job.slot, : height * width * 3].reshape(height, width, 3)
        job.in_slot = True
    else:
        job.pixels = pixels
    job.reason, job.detail, job.done = said["reason"], said["detail"], True


def _decode(data: bytes, slot: np.ndarray, resolution: int) -> tuple[dict[str, Any], np.ndarray | None]:
    """What to say of ``data``, and its pixels where they do not fit into ``slot`` (uint8, one-dimensional)."""
    said: dict[str, Any] = {"size": (0, 0), "shape": (), "reason": "", "detail": ""}
    try:
        header = images.probe(data, images.Limits())
        said["size"] = header.upright
        target = images.target_size(*header.upright, resolution)
        pixels = images.decode(data, header, at_least=target)
    except images.ImageError as error:
        return {**said, "reason": error.reason, "detail": error.detail}, None
    if pixels.size > slot.size:
        return said, pixels
    slot[: pixels.size] = pixels.reshape(-1)
    return {**said, "shape": pixels.shape[:2]}, None


def serve(connection: int, memory: int, shape: tuple[int, int], resolution: int) -> None:
    """The body of a worker: decodes what it is sent until nobody is there any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    slots = np.frombuffer(mmap.mmap(memory, shape[0] * shape[1]), np.uint8).reshape(shape)
    requests = Connection(connection)
    while True:
        try:
            slot, data = requests.recv()
            requests.send(_decode(data, slots[slot], resolution))
        except (EOFError, OSError):
            return
