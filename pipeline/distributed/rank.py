"""A stage's view of its own process and of the other ranks."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pipeline.config.life import Life
from pipeline.config.schema import ConfigError
from pipeline.distributed import ending
from pipeline.distributed.device import choose_device, isolation_cost
from pipeline.distributed.environment import Launcher, Place
from pipeline.distributed.peers import FINISHED, LINGER, Peers, somebody_listens
from pipeline.distributed.signals import EXIT_PEER, Stopped, StopSignals

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

Value = TypeVar("Value", "torch.Tensor", float)
Operation = Literal["sum", "mean", "max", "min"]

TIMEOUT = 600.0  # seconds; torch's own defaults are 30 minutes for gloo and 10 for NCCL
_FAREWELL = 5.0  # seconds for which a failed rank 0 keeps the store open, so that the others can read the reason


class Rank:
    """One rank. ``Rank()`` is a single process; a stage receives its rank from ``@distributed``.

    Args:
        place: rank and world size, see :func:`pipeline.distributed.find_place`.
        timeout: maximum seconds to wait for other ranks.
        device: ``auto``, ``cpu`` or ``cuda``, see :func:`pipeline.distributed.device.choose_device`.
    """

    def __init__(self, place: Place | None = None, timeout: float = TIMEOUT, device: str = "auto") -> None:
        self.place = place or Place()
        self.timeout = timeout
        self._device = device
        self.signals = StopSignals()
        self.log = logging.getLogger("pipeline")
        self.life = Life(self.place.rank)
        self.steps = 0
        """Number of safe boundaries reached so far."""
        self.begin = time.monotonic()
        self.waited = 0.0
        """Seconds spent in :meth:`waiting`."""
        self.now: dict[str, Any] = {}
        """What the rank is currently doing, for monitoring: added to each of its events."""
        self.on_hang: Callable[[], None] = lambda: None
        """Called in another thread when the watchdog has found this rank stuck and is about to end it."""
        self._peers: Peers | None = None
        self._group: ProcessGroup | None = None

    def __repr__(self) -> str:
        return f"rank {self.rank}/{self.world_size} {self.node}"

    # ---- rank and node

    @property
    def rank(self) -> int:
        return self.place.rank

    @property
    def world_size(self) -> int:
        return self.place.world_size

    @property
    def local_rank(self) -> int:
        """Rank among the processes on this node."""
        return self.place.local_rank

    @property
    def local_world_size(self) -> int:
        """Number of processes on this node."""
        return self.place.local_world_size

    @property
    def node(self) -> str:
        return self.place.node

    @property
    def launcher(self) -> Launcher:
        return self.place.launcher

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def launched(self) -> bool:
        """Whether a launcher started this process as a rank; False for example in a notebook or a test."""
        return self.launcher != "single" or self.world_size > 1

    @cached_property
    def device(self) -> torch.device:
        """This rank's GPU, or the CPU.

        Raises:
            ConfigError: GPUs were allocated or requested, but torch sees none.
        """
        return choose_device(self._device, self.local_rank, self.node)

    @property
    def environment(self) -> dict[str, str]:
        """torchrun's variables, for libraries that read them (SLURM and a single process do not set them)."""
        place = self.place
        variables = {
            "RANK": str(place.rank),
            "WORLD_SIZE": str(place.world_size),
            "LOCAL_RANK": str(place.local_rank),
            "LOCAL_WORLD_SIZE": str(place.local_world_size),
        }
        return variables | ({"MASTER_ADDR": place.address, "MASTER_PORT": str(place.port)} if place.address else {})

    # ---- stopping

    @property
    def stopping(self) -> bool:
        """Whether SIGTERM, SIGUSR2 or SIGINT was received, so that the rank must stop at the next safe boundary.

        Signals reach ranks at different times: where all must stop at the same step, reduce this with ``"max"`` first.
        Each access counts as progress for the watchdog: read it, or call :meth:`check_stop`, after each sample or step.
        """
        self.steps += 1
        return bool(self.signals.received)

    def request_stop(self, reason: str = "request") -> None:
        """Stop at the next safe boundary, as after a signal."""
        self.signals.received = self.signals.received or reason

    def check_stop(self) -> None:
        """Stop here, at a safe boundary, if requested.

        Raises:
            Stopped: a signal was received.
        """
        if self.stopping:
            raise Stopped(f"{self.signals.received}: stopped at a safe boundary; the same command resumes")

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Context: counts the time as waiting for other ranks or for data."""
        begin = time.monotonic()
        try:
            yield
        finally:
            self.waited += time.monotonic() - begin

    def saved(self) -> None:
        """Report lasting progress, such as a commit or a checkpoint: a job that makes some is worth restarting."""
        self.life.saved()

    # ---- the other ranks

    @property
    def peers(self) -> Peers:
        """The connection to the other ranks, made at the first use, which imports torch.

        Raises:
            ConnectionError: they cannot be reached.
        """
        if self._peers is None:
            if not self.place.address or not self.place.port:
                reason = "elements of an array" if self.launcher == "array" else "no MASTER_ADDR and MASTER_PORT"
                raise ConnectionError(f"{self!r} cannot talk to the other ranks ({reason}): start them as one job")
            self._peers = Peers(self.place, self.timeout, self.log, lambda: ending.hard_exit(EXIT_PEER))
        return self._peers

    def barrier(self, name: str = "", timeout: float | None = None) -> None:
        """Wait for all ranks.

        Args:
            name: for messages.
            timeout: seconds; default: the rank's ``timeout``.

        Raises:
            BarrierTimeout: some did not arrive in time; the message and ``missing`` name them.
            PeerFailed: one of them failed or ended in the meantime.
        """
        if self.world_size > 1:
            with self.waiting():
                self.peers.barrier(name, timeout)

    def broadcast(self, value: Any = None, src: int = 0) -> Any:
        """Return the ``value`` of rank ``src`` on every rank: anything JSON-able up to 4 MiB. Waits for all ranks."""
        return self.peers.broadcast(value, src) if self.world_size > 1 else value

    def all_reduce(self, value: Value, op: Operation = "sum") -> Value:
        """The sum, mean, maximum or minimum of all ranks' values: a new tensor, or a Python number.

        Tensors are reduced on their device: by NCCL on GPUs, by gloo on CPUs. Numbers are exact up to 2^53.
        """
        if self.world_size == 1:
            return value
        import torch

        if isinstance(value, torch.Tensor):
            return self._reduce(value.detach().clone(), op)
        return self._reduce(torch.tensor(float(value), dtype=torch.float64), op).item()

    def _reduce(self, tensor: torch.Tensor, op: Operation) -> torch.Tensor:
        import torch.distributed as dist

        operation = {"max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}.get(op, dist.ReduceOp.SUM)
        dist.all_reduce(tensor, operation, group=self.process_group())
        return tensor / self.world_size if op == "mean" else tensor

    def process_group(self) -> ProcessGroup:
        """torch's default process group, created at the first call: NCCL for GPU tensors, gloo for CPU tensors.

        Raises:
            BarrierTimeout: some ranks do not take part; the message names them.
            ConfigError: there are more ranks than GPUs.
        """
        import torch.distributed as dist

        if self._group is None:
            if not dist.is_initialized():
                self._init_process_group()
            self._group = dist.group.WORLD
            assert self._group is not None
        return self._group

    def _init_process_group(self) -> None:
        import torch
        import torch.distributed as dist

        self.barrier("process group")  # unlike torch, it says which ranks are missing
        gpus = self.device.type == "cuda"
        if gpus:
            torch.cuda.set_device(self.device)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if gpus and dist.is_nccl_available() else "gloo",
            store=dist.PrefixStore("group", self.peers.store) if self.world_size > 1 else dist.HashStore(),
            rank=self.rank,
            world_size=self.world_size,
            timeout=timedelta(seconds=self.timeout),
        )
        if gpus:
            names: list[str] = [""] * self.world_size
            dist.all_gather_object(names, f"{self.node}'s GPU {torch.cuda.get_device_properties(self.device).uuid}")
            require_own_gpus(names)
            cost = isolation_cost(torch.cuda.device_count(), self.local_world_size)
            if cost and self.is_main:
                self.log.warning("%s", cost)

    # ---- ending

    def close(self, how: str = FINISHED, linger: float = LINGER) -> None:
        """Disconnect from the other ranks and report how this one ended. Idempotent.

        Args:
            how: ``finished`` or ``stopped``.
            linger: seconds for which rank 0 keeps serving ranks that are not done yet.
        """
        if self._group is not None:
            import torch.distributed as dist

            if dist.is_initialized():
                dist.destroy_process_group()
            self._group = None
        if self._peers is not None:
            self._peers.leave(how, linger)
            self._peers = None

    def failed_peer(self) -> str:
        """The reason given by another rank that failed; empty if none failed, or if the store cannot be reached."""
        try:
            return self._peers.failure() if self._peers is not None else ""
        except RuntimeError:  # raised by torch: the connection broke
            return ""

    def abort(self, reason: str) -> None:
        """Make the other ranks end because this one failed. If no store serves them, that is left to the launcher."""
        try:
            if self._peers is None and self._others_may_wait():
                self.timeout = _FAREWELL
            elif self._peers is None:
                return
            self.peers.fail(reason)
            self.peers.leave(f"failed: {reason}", _FAREWELL)
        except (RuntimeError, OSError) as error:
            self.log.warning("could not tell the other ranks: %s", str(error).partition("\n")[0])

    def _others_may_wait(self) -> bool:
        """Whether other ranks may be waiting for this one, which has not connected to them yet.

        They can only wait if rank 0 listens. On rank 0 itself, a loaded torch indicates a stage in which ranks wait.
        """
        if self.world_size == 1 or not self.place.address or not self.place.port:
            return False
        return "torch" in sys.modules if self.is_main and not self.place.hosted else somebody_listens(self.place)


def require_own_gpus(names: Sequence[str]) -> None:
    """Raise an error if ranks share a GPU, which would be slow and which NCCL does not support.

    Args:
        names: each rank's GPU.

    Raises:
        ConfigError: ranks share a GPU; the message names them.
    """
    for name in sorted(set(names)):
        sharing = [rank for rank, own in enumerate(names) if own == name]
        if len(sharing) > 1:
            raise ConfigError(
                f"ranks {', '.join(map(str, sharing))} share {name}: start as many ranks on a node as it has GPUs"
            )
