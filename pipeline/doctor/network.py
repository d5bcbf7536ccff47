"""Checks how the ranks of a job reach each other: rank 0's port, ports between nodes, clocks, a real all-reduce."""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

from pipeline.distributed import Rank
from pipeline.doctor.filesystem import SKEW_FAIL
from pipeline.doctor.finding import Finding

_CONNECT = 5.0  # seconds for one connection
_NEIGHBOURS = 8  # nodes that each node tries to reach
_SKEW = 1.0  # seconds of clock skew that are reported
ADVICE = "a firewall, or the wrong interface: name the network in slurm/env.sh, section 5 (GLOO_SOCKET_IFNAME)"


class Meeting:
    """Communication between the ranks that can reach rank 0 in time; ``members`` does not contain the others.

    Args:
        patience: seconds to wait for other ranks.

    Raises:
        ConnectionError: this rank cannot reach rank 0; the message says why.
    """

    def __init__(self, rank: Rank, patience: float) -> None:
        self.place, self.rank, self.patience = rank.place, rank.rank, patience
        if not self.place.address or not self.place.port:
            raise ConnectionError("the launcher gave no MASTER_ADDR and MASTER_PORT")
        if self.rank or self.place.hosted:
            try_port(self.place.address, self.place.port, patience)
        rank.timeout = patience
        self.store = rank.peers.store
        self.members = self._gather()

    def _gather(self) -> list[int]:
        self.say(f"here/{self.rank}", self.place.node)
        if self.rank == 0:
            end = time.monotonic() + self.patience
            while True:
                here = [rank for rank in range(self.place.world_size) if self.ask(f"here/{rank}")]
                if len(here) == self.place.world_size or time.monotonic() > end:
                    break
                time.sleep(0.05)
            self.say("members", json.dumps(here))
        self.store.wait([self._key("members")], timedelta(seconds=2 * self.patience + 30))
        members: list[int] = json.loads(self.ask("members"))
        if self.rank not in members:
            raise ConnectionError(f"it came after the others had waited for {self.patience:g} s")
        return members

    @property
    def nodes(self) -> dict[str, int]:
        """Node → first member on it."""
        first: dict[str, int] = {}
        for rank in self.members:
            first.setdefault(self.ask(f"here/{rank}"), rank)
        return first

    @staticmethod
    def _key(key: str) -> str:
        return f"doctor/{key}"

    def say(self, key: str, value: str) -> None:
        self.store.set(self._key(key), value)

    def ask(self, key: str) -> str:
        """The value of ``key``; empty if it has not been set yet."""
        return self.store.get(self._key(key)).decode() if self.store.check([self._key(key)]) else ""

    def wait(self, name: str) -> None:
        """Wait for all members.

        Raises:
            TimeoutError: some did not call this in time; the message names them.
        """
        self.say(f"at/{name}/{self.rank}", "x")
        end = time.monotonic() + 2 * self.patience + 30
        while missing := [rank for rank in self.members if not self.ask(f"at/{name}/{rank}")]:
            if time.monotonic() > end:
                raise TimeoutError(f"ranks {', '.join(map(str, missing))} do not answer any more (at {name!r})")
            time.sleep(0.02)


def try_port(address: str, port: int, patience: float) -> None:
    """Try to connect to a port until it succeeds, for at most ``patience`` seconds.

    Raises:
        ConnectionError: no attempt succeeded; the message has the last error.
    """
    end = time.monotonic() + patience
    while True:
        try:
            socket.create_connection((address, port), timeout=_CONNECT).close()
            return
        except OSError as error:
            if time.monotonic() > end or isinstance(error, socket.gaierror):
                raise ConnectionError(f"{address}:{port}: {why(error)}") from None
            time.sleep(0.1)


def why(error: OSError) -> str:
    """What the error of a failed connection means."""
    if isinstance(error, socket.gaierror):
        return "the host name cannot be resolved"
    if isinstance(error, TimeoutError) or error.errno == errno.ETIMEDOUT:
        return "no answer, packets are dropped"
    if error.errno == errno.ECONNREFUSED:
        return "refused, nobody listens there"
    return str(error.strerror or error)


def look(meeting: Meeting) -> Iterator[Finding]:
    """Check the network between the members; the first member reports findings that concern all."""
    yield _missing(meeting)
    yield from ports(meeting)
    yield from clocks(meeting)


def _missing(meeting: Meeting) -> Finding:
    world, here = meeting.place.world_size, meeting.members
    interface = interface_to(meeting.place.address, meeting.place.port)
    if meeting.rank != here[0] or len(here) == world:
        text = f"reaches rank 0 at {meeting.place.address}:{meeting.place.port}{interface}"
        return Finding("network", "ok", text)
    lost = [rank for rank in range(world) if rank not in here]
    text = f"of {world} ranks {len(here)} came to {meeting.place.address}:{meeting.place.port}; not {_list(lost)}"
    return Finding("network", "fail", text, "see what these ranks say themselves; if nothing: " + ADVICE)


def _list(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:16])) + (", …" if len(ranks) > 16 else "")


def interface_to(address: str, port: int) -> str:
    """The interface used for packets to ``address``, as the end of a sentence."""
    try:
        with socket.create_connection((address, port), timeout=_CONNECT) as link:
            own = link.getsockname()[0]
    except OSError:
        return ""
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address == own for entry in addresses):
            return f" through {name} ({own})"
    return f" from {own}"


def ports(meeting: Meeting) -> Iterator[Finding]:
    """Let each node connect to a random port of the next nodes, because gloo and NCCL use any free port."""
    nodes = meeting.nodes
    names = list(nodes)
    mine = meeting.place.node
    if len(nodes) < 2 or nodes[mine] != meeting.rank:
        meeting.wait("listening")
        meeting.wait("connected")
        return
    with socket.create_server(("", 0)) as server:
        server.settimeout(0.2)
        over = threading.Event()
        threading.Thread(target=_accept, args=(server, over), daemon=True).start()
        meeting.say(f"port/{meeting.rank}", str(server.getsockname()[1]))
        meeting.wait("listening")
        place = names.index(mine)
        others = [names[(place + n) % len(names)] for n in range(1, min(len(names), _NEIGHBOURS + 1))]
        unreached = []
        for node in others:
            port = int(meeting.ask(f"port/{nodes[node]}"))
            try:
                socket.create_connection((node, port), timeout=_CONNECT).close()
            except OSError as error:
                unreached.append(f"{node}:{port} ({why(error)})")
        meeting.wait("connected")
        over.set()
    if unreached:
        yield Finding("ports between nodes", "fail", f"cannot reach {', '.join(unreached)}", ADVICE)
    else:
        yield Finding("ports between nodes", "ok", f"reaches {', '.join(others)} at any port")


def _accept(server: socket.socket, over: threading.Event) -> None:
    while not over.is_set():
        with suppress(OSError):
            server.accept()[0].close()


def clocks(meeting: Meeting) -> Iterator[Finding]:
    """Compare the clocks of all members, read immediately after a barrier."""
    meeting.wait("clocks")
    meeting.say(f"clock/{meeting.rank}", repr(time.time()))
    meeting.wait("clocks read")
    if meeting.rank != meeting.members[0]:
        return
    times = {rank: float(meeting.ask(f"clock/{rank}")) for rank in meeting.members}
    middle = statistics.median_low(times.values())
    nodes = {meeting.ask(f"here/{rank}"): times[rank] - middle for rank in meeting.members}
    off = {node: skew for node, skew in nodes.items() if abs(skew) > _SKEW}
    if not off:
        yield Finding("clocks", "ok", f"within {max(times.values()) - min(times.values()):.2f} s of each other")
    for node, skew in off.items():
        text = f"{abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} the other nodes"
        state = "fail" if abs(skew) > SKEW_FAIL else "warn"
        yield Finding(
            "clocks", "fail" if state == "fail" else "warn", text, "run chrony or ntpd there; until then exclude= it",
            {"skew": skew}, node=node,
        )  # fmt: skip


def all_reduce(rank: Rank, mebibytes: int) -> Iterator[Finding]:
    """Check and time a sum over all ranks; the bandwidth is 2 (n - 1) / n of the bytes per second, as in nccl-tests."""
    import torch

    gpus = rank.device.type == "cuda"
    with TemporaryDirectory() as folder:
        log = Path(folder) / "nccl"
        if gpus:
            os.environ |= {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_SUBSYS": "INIT,NET", "NCCL_DEBUG_FILE": str(log)}
        values = torch.full((mebibytes * 2**18,), float(rank.rank + 1), device=rank.device)
        total = rank.all_reduce(values)
        expected = rank.world_size * (rank.world_size + 1) / 2
        if not bool((total == expected).all()):
            yield Finding("all-reduce", "fail", f"the sum is {total[0].item()}, not {expected}", "exclude= this node")
            return
        begin = time.perf_counter()
        for _ in range(5):
            rank.all_reduce(values)
        if gpus:
            torch.cuda.synchronize()
        seconds = (time.perf_counter() - begin) / 5
        how = transport(log.read_text(errors="replace")) if log.exists() else ""
    if rank.rank:
        return
    speed = 2 * (rank.world_size - 1) / rank.world_size * mebibytes * 2**20 / seconds
    backend = "NCCL" if gpus else "gloo"
    text = (
        f"{backend}, {rank.world_size} ranks: {speed / 1e9:.2f} GB/s with {mebibytes} MiB{how and f', through {how}'}"
    )
    fast = Path("/sys/class/infiniband")
    if gpus and how.startswith("Socket") and fast.is_dir() and any(fast.iterdir()):
        advice = "InfiniBand is available, but NCCL uses sockets: install its network plugin, or check NCCL_IB_DISABLE"
        yield Finding("all-reduce", "warn", text, advice, {"bandwidth": speed})
    else:
        yield Finding("all-reduce", "ok", text, values={"bandwidth": speed})


def transport(log: str) -> str:
    """The network that NCCL used, from its log: ``IB mlx5_0``, ``Socket eth0``; empty if it used none."""
    found = re.search(r"NET/(\w+) ?: Using (?:\[\d+\]([^\s:]+))?", log)
    return f"{found[1]} {found[2] or ''}".strip() if found else ""
