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
_FAREWELL = 5.0  # seconds for which a rank 0 that failed lets the others read why


class Rank:
    """One rank. ``Rank()`` is a single process; a stage gets its own from ``@distributed``.

    Args:
        place: which rank of how many, see :func:`pipeline.distributed.find_place`.
        timeout: seconds after which waiting for other ranks is given up.
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
        """Safe boundaries that were reached so far."""
        self.begin = time.monotonic()
        self.waited = 0.0
        """Seconds that were spent in :meth:`waiting`."""
        self.now: dict[str, Any] = {}
        """What the rank is at, for those who watch it: goes into each of its events."""
        self.on_hang: Callable[[], None] = lambda: None
        """Called, in another thread, when the watchdog has found this rank stuck and is about to end it."""
        self._peers: Peers | None = None
        self._group: ProcessGroup | None = None

    def __repr__(self) -> str:
        return f"rank {self.rank}/{self.world_size} {self.node}"

    # ---- where

    @property
    def rank(self) -> int:
        return self.place.rank

    @property
    def world_size(self) -> int:
        return self.place.world_size

    @property
    def local_rank(self) -> int:
        """Rank among the processes of this node."""
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
        """Whether a launcher started this process as a rank, so that it is not somebody's notebook or test."""
        return self.launcher != "single" or self.world_size > 1

    @cached_property
    def device(self) -> torch.device:
        """This rank's GPU, or the CPU.

        Raises:
            ConfigError: GPUs were given or asked for, and torch sees none.
        """
        return choose_device(self._device, self.local_rank, self.node)

    @property
    def environment(self) -> dict[str, str]:
        """torchrun's variables, for libraries that read them (SLURM and a single process don't set them)."""
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
        """Whether SIGTERM, SIGUSR2 or SIGINT came: stop at the next safe boundary, by :meth:`check_stop` for example.

        Signals reach ranks at different times: where all must stop at the same step, reduce this by ``"max"`` first.
        To ask is what the watchdog takes for progress: ask after each sample or step.
        """
        self.steps += 1
        return bool(self.signals.received)

    def request_stop(self, reason: str = "request") -> None:
        """As if a signal had come."""
        self.signals.received = self.signals.received or reason

    def check_stop(self) -> None:
        """At a safe boundary.

        Raises:
            Stopped: a signal came.
        """
        if self.stopping:
            raise Stopped(f"{self.signals.received}: stopped at a safe boundary; the same command resumes")

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Context: there is nothing to compute, as other ranks or the data are not ready yet."""
        begin = time.monotonic()
        try:
            yield
        finally:
            self.waited += time.monotonic() - begin

    def saved(self) -> None:
        """Something was done for good, a commit or a checkpoint: a job that gets this far is worth starting again."""
        self.life.saved()

    # ---- the others

    @property
    def peers(self) -> Peers:
        """The other ranks; joined at the first use, which imports torch.

        Raises:
            ConnectionError: there is no way to reach them.
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
            timeout: seconds; the rank's own by default.

        Raises:
            BarrierTimeout: some did not arrive in time; the message (and ``missing``) names them.
            PeerFailed: one of them failed or ended meanwhile.
        """
        if self.world_size > 1:
            with self.waiting():
                self.peers.barrier(name, timeout)

    def broadcast(self, value: Any = None, src: int = 0) -> Any:
        """Give every rank the ``value`` of rank ``src``: anything that JSON can say, up to 4 MiB. Waits for all."""
        return self.peers.broadcast(value, src) if self.world_size > 1 else value

    def all_reduce(self, value: Value, op: Operation = "sum") -> Value:
        """The sum, mean, largest or smallest of all ranks' values: a new tensor, or a number of Python's.

        Tensors are reduced where they are: by NCCL on GPUs, by gloo on CPUs. Numbers are exact up to 2^53.
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
        """torch's default process group, made at the first call: NCCL for tensors on GPUs, gloo for those on CPUs.

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

        self.barrier("process group")  # torch would only say that someone is missing
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

    # ---- the end

    def close(self, how: str = FINISHED, linger: float = LINGER) -> None:
        """Leave the other ranks in peace: they know that this one is done. Idempotent.

        Args:
            linger: seconds for which rank 0 serves others that are not done yet.
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
        """What another rank that failed has said; empty if none did, or if nobody can be asked."""
        try:
            return self._peers.failure() if self._peers is not None else ""
        except RuntimeError:  # torch's own: the connection broke
            return ""

    def abort(self, reason: str) -> None:
        """Make the other ranks end: this one failed. Where there is nothing to tell it to, the launcher must see it."""
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
        """Whether others may be waiting for this rank, which has not joined them yet.

        They can only be where rank 0 listens. If this is rank 0, a loaded torch is the sign of a stage that uses it.
        """
        if self.world_size == 1 or not self.place.address or not self.place.port:
            return False
        return "torch" in sys.modules if self.is_main and not self.place.hosted else somebody_listens(self.place)


def require_own_gpus(names: Sequence[str]) -> None:
    """Refuse that ranks share a GPU: they would be slow, and NCCL cannot.

    Args:
        names: each rank's GPU.

    Raises:
        ConfigError: names ranks and GPU.
    """
    for name in sorted(set(names)):
        sharing = [rank for rank, own in enumerate(names) if own == name]
        if len(sharing) > 1:
            raise ConfigError(
                f"ranks {', '.join(map(str, sharing))} share {name}: start as many ranks on a node as it has GPUs"
            )
