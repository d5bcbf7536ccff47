"""The rank and world size of this process, from the environment variables of its launcher."""

from __future__ import annotations

import itertools
import random
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Literal

from pipeline.config.schema import ConfigError

Launcher = Literal["torchrun", "slurm", "kubernetes", "array", "single"]

_BATCH_STEP = ("batch", str(2**32 - 5))  # what SLURM calls the step in which a batch script itself runs
_PORTS = range(12_000, 28_000)  # below the ports that Linux assigns to outgoing connections


def _hostname() -> str:
    return socket.gethostname().partition(".")[0]


def free_port() -> int:
    """A free port of this machine, for ranks that are about to be started here.

    It is chosen from a range that Linux does not use for outgoing connections, one of which could otherwise take the
    port before rank 0 listens on it.

    Raises:
        OSError: no port in that range is free.
    """
    for port in random.SystemRandom().sample(_PORTS, len(_PORTS)):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError(f"ports {_PORTS[0]} to {_PORTS[-1]} are all in use")


@dataclass(frozen=True)
class Place:
    """Rank and world size of one process, and how it reaches the others. Without arguments: a single process."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Rank among the processes on this node."""
    local_world_size: int = 1
    node: str = field(default_factory=_hostname)
    launcher: Launcher = "single"
    address: str = ""
    """Host where rank 0 (or the launcher, if ``hosted``) listens; empty: these processes cannot communicate."""
    port: int = 0
    life: str = ""
    """Distinguishes this run from an earlier one of the same job, whose processes may still run unnoticed."""
    hosted: bool = False
    """Whether the launcher listens at ``address``, as long as any rank lives."""


def find_place(
    environment: Mapping[str, str], *, expect_world_size: int = 0, rank_offset: int = 0, world_size: int = 0
) -> Place:
    """Find the rank and world size of this process.

    The variables of torchrun (and accelerate) are used first, then those of a SLURM step, then those of an indexed Job
    of Kubernetes; without any of them, this is a single process.

    Args:
        expect_world_size: required number of processes started together (by one element of an array); 0: any.
        rank_offset: for elements of an array: added to the rank.
        world_size: for elements of an array: the number of ranks of all elements together.

    Raises:
        ConfigError: the environment contradicts itself or ``expect_world_size``, or an element exceeds its array.
    """
    place = _from_torchrun(environment) or _from_slurm(environment) or _from_kubernetes(environment) or Place()
    if not 0 <= place.rank < place.world_size:
        raise ConfigError(f"{place.launcher} says that this is rank {place.rank} of {place.world_size}")
    if expect_world_size not in (0, place.world_size):
        advice = _advice(place, environment, expect_world_size)
        raise ConfigError(f"expect_world_size={expect_world_size}, but {place.world_size} started: {advice}")
    if not rank_offset and world_size in (0, place.world_size):
        return place
    if rank_offset < 0 or rank_offset + place.world_size > world_size:
        last = rank_offset + place.world_size - 1
        raise ConfigError(f"rank_offset={rank_offset} makes ranks {rank_offset} to {last}, but world_size={world_size}")
    # elements of an array start and end independently: they have no common rank 0 to connect to
    return replace(
        place, rank=place.rank + rank_offset, world_size=world_size, launcher="array", address="", port=0, hosted=False
    )


def _advice(place: Place, environment: Mapping[str, str], wanted: int) -> str:
    """How to tell the launcher to start ``wanted`` processes."""
    if place.launcher == "slurm" or (place.launcher == "single" and "SLURM_JOB_ID" in environment):
        return f"start it with srun --ntasks={wanted}"
    if place.launcher == "kubernetes":
        return f"set completions: {wanted} of the Job, and WORLD_SIZE to the same"
    accelerate = f"accelerate launch needs --multi_gpu (also on CPUs) --num_processes {wanted}"
    if any(name.startswith("ACCELERATE_") for name in environment):
        return accelerate  # without GPUs, it silently starts a single process unless this flag is set
    return f"{accelerate}; torchrun, --nproc-per-node and --nnodes whose product is {wanted}"


def _from_torchrun(environment: Mapping[str, str]) -> Place | None:
    if "RANK" not in environment:
        return None
    if "WORLD_SIZE" not in environment:
        raise ConfigError("RANK is set in the environment but WORLD_SIZE is not: set both (as torchrun does) or none")
    return Place(
        rank=_number(environment, "RANK"),
        world_size=_number(environment, "WORLD_SIZE"),
        local_rank=_number(environment, "LOCAL_RANK", 0),
        local_world_size=_number(environment, "LOCAL_WORLD_SIZE", 1),
        launcher="torchrun",
        address=environment.get("MASTER_ADDR", ""),
        port=_number(environment, "MASTER_PORT", 0),
        life=environment.get("TORCHELASTIC_RESTART_COUNT", ""),
        hosted=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def _from_slurm(environment: Mapping[str, str]) -> Place | None:
    # a batch script has SLURM_PROCID=0 and the job's SLURM_NTASKS but is a single process: only srun starts a step
    if not {"SLURM_PROCID", "SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS"} <= environment.keys():
        return None
    if environment["SLURM_STEP_ID"] in _BATCH_STEP:
        return None
    job, step = _number(environment, "SLURM_JOB_ID", 0), _number(environment, "SLURM_STEP_ID")
    life = _number(environment, "SLURM_RESTART_COUNT", 0)
    return Place(
        rank=_number(environment, "SLURM_PROCID"),
        world_size=_number(environment, "SLURM_STEP_NUM_TASKS"),
        local_rank=_number(environment, "SLURM_LOCALID", 0),
        local_world_size=tasks_on_node(environment),
        node=environment.get("SLURMD_NODENAME") or _hostname(),
        launcher="slurm",
        address=environment.get("MASTER_ADDR") or _first_node(environment),
        # a requeued job uses another port than processes left from its earlier life, perhaps on the same node
        port=_number(environment, "MASTER_PORT", _PORTS[(7 * job + 101 * step + 1009 * life) % len(_PORTS)]),
        life=f"{job}.{step}.{life}",
    )


def _from_kubernetes(environment: Mapping[str, str]) -> Place | None:
    """A pod of an indexed Job (docs/kubernetes/stage.yaml). Kubernetes sets its index, but not the number of pods."""
    if "JOB_COMPLETION_INDEX" not in environment:
        return None
    if not environment.get("WORLD_SIZE"):
        raise ConfigError(
            f"JOB_COMPLETION_INDEX={environment['JOB_COMPLETION_INDEX']}, but WORLD_SIZE is not set: "
            "set it to the Job's completions"
        )
    return Place(
        rank=_number(environment, "JOB_COMPLETION_INDEX"),
        world_size=_number(environment, "WORLD_SIZE"),
        launcher="kubernetes",
        address=environment.get("MASTER_ADDR", ""),
        port=_number(environment, "MASTER_PORT", 0),
    )


def _first_node(environment: Mapping[str, str]) -> str:
    for name in ("SLURM_STEP_NODELIST", "SLURM_NODELIST", "SLURM_JOB_NODELIST"):
        if environment.get(name):
            return expand_nodes(environment[name])[0]
    return ""


def tasks_on_node(environment: Mapping[str, str]) -> int:
    """Tasks on this node, from ``SLURM_STEP_TASKS_PER_NODE``: a list like ``2(x3),1`` in the order of the nodes."""
    text = environment.get("SLURM_STEP_TASKS_PER_NODE", "1")
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise ConfigError(f"SLURM_STEP_TASKS_PER_NODE={text!r} in the environment: not understood at {part!r}")
        counts += [int(match[1])] * int(match[2] or 1)
    node = _number(environment, "SLURM_NODEID", 0)
    if node >= len(counts):
        raise ConfigError(f"SLURM_NODEID={node}, but SLURM_STEP_TASKS_PER_NODE={text!r} lists {len(counts)} nodes")
    return counts[node]


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name, "")
    if not text and default is not None:
        return default
    if not re.fullmatch(r"[0-9]+", text):
        raise ConfigError(f"{name}={text!r} in the environment is not a number")
    return int(text)


def expand_nodes(text: str) -> list[str]:
    """Expand a SLURM node list: ``a[01-03,7]-x,b`` is ``a01-x a02-x a03-x a7-x b``.

    Raises:
        ConfigError: brackets do not match, or a range is invalid.
    """
    names: list[str] = []
    for part in re.findall(r"(?:\[[^\]]*\]|[^,])+", text):
        pieces = re.split(r"\[([^\]]*)\]", part)  # text, range, text, range, …, text
        if any("[" in piece or "]" in piece for piece in pieces):
            raise ConfigError(f"node list {text!r}: brackets do not match")
        choices = [list(_expand_range(piece, text)) if i % 2 else [piece] for i, piece in enumerate(pieces)]
        names += ["".join(choice) for choice in itertools.product(*choices)]
    if not names:
        raise ConfigError(f"node list {text!r} names no node")
    return names


def _expand_range(piece: str, text: str) -> Iterator[str]:
    for span in piece.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", span)
        if match is None:
            raise ConfigError(f"node list {text!r}: {span!r} is not a range of numbers")
        first, last = match[1], match[2] or match[1]
        for number in range(int(first), int(last) + 1):
            yield str(number).zfill(len(first))
