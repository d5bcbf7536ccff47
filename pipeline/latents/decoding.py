"""Images decoded and cut by worker processes, into memory that is shared, reused and, for a GPU, pinned.

A slot of the memory holds all that a network takes of one image: its crops, and the noise of its samples. So its size
does not depend on the image's, and nothing of an image but a few numbers comes through the sockets.

The memory has no name that could outlive the processes (it is a memfd), and workers end with the process that started
them. A worker that dies over an image costs that image alone.
"""

from __future__ import annotations

import json
import mmap
import os
import pickle
import selectors
import signal
import socket
import subprocess
import sys
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.encoders.crop import Crop
from pipeline.imaging import transform
from pipeline.randomness import normals

_ROOT = str(Path(__file__).resolve().parents[2])
_ALIGNED = 64  # bytes
_CHUNK = 8  # images that a worker is sent at once
Said = tuple[int, int, str, str]
"""Of an image: width and height (upright, before it was cut), reason and detail of what is wrong."""


@dataclass(frozen=True)
class Noise:
    """Standard normal float32 of ``shape``, keyed by (seed, "posterior", the sample's key, resolution)."""

    seed: int
    resolution: int
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return 4 * int(np.prod(self.shape))


@dataclass(frozen=True)
class Layout:
    """What lies in a slot, in this order."""

    crops: tuple[Crop, ...]
    noises: tuple[Noise, ...] = ()

    @property
    def starts(self) -> list[int]:
        """Where each part starts, and at last the slot's size; in bytes."""
        starts = [0]
        parts: tuple[Crop | Noise, ...] = (*self.crops, *self.noises)
        for part in parts:
            starts.append(starts[-1] + -(-part.bytes // _ALIGNED) * _ALIGNED)
        return starts

    def fill(self, slot: np.ndarray, data: bytes, key: str) -> Said:
        """Decode ``data`` and fill ``slot``, uint8 (bytes,); with zeros where that cannot be done."""
        width = height = 0
        starts = self.starts
        try:
            header = transform.probe(data, transform.Limits())
            width, height = header.upright
            pixels = transform.decode_fast(data, header)
            for crop, start in zip(self.crops, starts, strict=False):
                slot[start : start + crop.bytes].reshape(crop.edge, crop.edge, 3)[:] = crop.cut(pixels)
        except transform.ImageError as error:
            slot[:] = 0
            return width, height, error.reason, error.detail
        for noise, start in zip(self.noises, starts[len(self.crops) :], strict=False):
            drawn = normals(noise.shape, noise.seed, "posterior", key, noise.resolution)
            slot[start : start + noise.bytes] = drawn.reshape(-1).view(np.uint8)
        return width, height, "", ""


@dataclass(slots=True)
class Decoded:
    """An image on its way; it is in its slot, and what follows is known, once :meth:`Decoders.wait` has returned.

    Attributes:
        width, height: of the source, upright.
        reason, detail, retryable: why there are no pixels; empty if there are.
    """

    data: bytes
    slot: int
    key: str = ""
    done: bool = False
    alone: bool = False
    width: int = 0
    height: int = 0
    reason: str = ""
    detail: str = ""
    retryable: bool = False

    def finish(self, said: Sequence[Any]) -> None:
        self.width, self.height, self.reason, self.detail = said
        self.done, self.data = True, b""


class Decoders:
    """Fills slots with what ``layout`` says of images.

    Args:
        workers: processes; none: images are decoded at once, here.
        slots: how many images the memory holds.
    """

    def __init__(self, workers: int, slots: int, layout: Layout) -> None:
        self.memory, self._fd = _shared(slots, layout.starts[-1])
        self._layout = layout
        self._queue: deque[Decoded] = deque()
        self._selector = selectors.DefaultSelector()
        self._workers: list[_Worker] = []
        self._idle: list[_Worker] = []
        self._unpin: Callable[[], object] = lambda: None
        self._here = not workers
        self._end = weakref.finalize(self, os.close, self._fd)
        for _ in range(workers):
            self._start()

    def _start(self) -> None:
        worker = _Worker(self._fd, self.memory.shape, self._layout)
        self._workers.append(worker)
        self._idle.append(worker)
        self._selector.register(worker.connection, selectors.EVENT_READ, worker)

    def pin(self) -> None:
        """Make the memory such that a GPU can copy from it by itself; of the calling thread's current device."""
        import torch

        address, cudart = self.memory.ctypes.data, torch.cuda.cudart()
        torch.cuda.check_error(cudart.cudaHostRegister(address, self.memory.nbytes, 0))
        self._unpin = weakref.finalize(self.memory.base, cudart.cudaHostUnregister, address)

    def submit(self, data: bytes, slot: int, key: str = "") -> Decoded:
        """Have ``data`` decoded into ``slot``, which must not be in use."""
        job = Decoded(data, slot, key)
        if self._here:
            job.finish(self._layout.fill(self.memory[slot], data, key))
        else:
            self._queue.append(job)
            if self._idle and len(self._queue) >= _CHUNK:
                self._pump(0)
        return job

    def wait(self, job: Decoded) -> None:
        """Until ``job`` is done."""
        while not job.done:
            self._pump(None)

    def drain(self) -> None:
        """Forget what waits, and wait for what is being decoded."""
        self._queue.clear()
        while len(self._idle) < len(self._workers):
            self._pump(None)

    def _pump(self, timeout: float | None) -> None:
        while self._queue and self._idle:
            worker = self._idle.pop()
            if worker.process.poll() is None:
                worker.send(self._chunk())
            else:
                self._bury(worker)
        for ready, _ in self._selector.select(timeout):
            busy: _Worker = ready.data
            try:
                busy.receive()
            except (EOFError, OSError, ValueError, TypeError):  # gone, or says what no worker of ours would
                self._bury(busy)
            else:
                self._idle.append(busy)

    def _chunk(self) -> list[Decoded]:
        """The next images for one worker: as many for each, if there are few; one that is to be alone is."""
        most = min(_CHUNK, -(-len(self._queue) // len(self._workers)))
        chunk = [self._queue.popleft()]
        while len(chunk) < most and not (chunk[0].alone or self._queue[0].alone):
            chunk.append(self._queue.popleft())
        return chunk

    def _bury(self, worker: _Worker) -> None:
        """Replace a worker that has died. If it had several images, each is tried again by itself."""
        self._selector.unregister(worker.connection)
        self._workers.remove(worker)
        worker.end()
        if len(worker.jobs) == 1:
            worker.jobs[0].finish((0, 0, "decoder_died", ""))
            worker.jobs[0].retryable = True
            self.memory[worker.jobs[0].slot] = 0
        else:
            for job in reversed(worker.jobs):
                job.alone = True
                self._queue.appendleft(job)
        self._start()

    def close(self) -> None:
        """End the workers; the memory is pinned no longer."""
        for worker in self._workers:
            worker.end()
        self._workers, self._idle = [], []
        self._selector.close()
        self._unpin()
        self._end()


@dataclass(init=False, eq=False)
class _Worker:
    """A process, the way to talk to it, and what it is at."""

    process: subprocess.Popen[bytes]
    connection: Connection
    jobs: list[Decoded] = field(default_factory=list)

    def __init__(self, memory: int, shape: tuple[int, ...], layout: Layout) -> None:
        ours, theirs = socket.socketpair()
        program = f"from pipeline.latents.decoding import serve; serve({theirs.fileno()}, {memory}, {shape})"
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
        self.jobs = []
        self.connection.send(layout)

    def send(self, jobs: list[Decoded]) -> None:
        self.jobs = jobs
        with suppress(OSError):  # it is dead: reading from it tells
            self.connection.send([(job.slot, job.key, job.data) for job in jobs])

    def receive(self) -> None:
        """Raises EOFError or OSError if it is gone."""
        for job, said in zip(self.jobs, json.loads(self.connection.recv_bytes()), strict=True):
            job.finish(said)
        self.jobs = []

    def end(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.wait()


def _shared(slots: int, slot_bytes: int) -> tuple[np.ndarray, int]:
    fd = os.memfd_create("latentmill")
    size = max(1, slots * slot_bytes)
    os.ftruncate(fd, size)
    return np.frombuffer(mmap.mmap(fd, size), np.uint8)[: slots * slot_bytes].reshape(slots, slot_bytes), fd


def serve(connection: int, memory: int, shape: tuple[int, int]) -> None:
    """The body of a worker: decodes what it is sent until nobody is there any more. It answers in JSON, nothing that
    the rank would execute."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    slots = np.frombuffer(mmap.mmap(memory, shape[0] * shape[1]), np.uint8).reshape(shape)
    requests = Connection(connection)
    try:
        layout: Layout = requests.recv()
        while True:
            chunk: list[tuple[int, str, bytes]] = pickle.loads(requests.recv_bytes())
            said = [layout.fill(slots[slot], data, key) for slot, key, data in chunk]
            requests.send_bytes(json.dumps(said).encode())
    except (EOFError, OSError):
        return
