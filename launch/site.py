"""Limits of a site: SLURM's partitions and accounts, disk space and quotas. All queries have timeouts."""

from __future__ import annotations

import getpass
import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from launch import slurm_commands as slurm
from launch.quantities import mebibytes, minutes
from pipeline.config.schema import ConfigError

SECONDS = 10.0  # timeout of a command


@dataclass(frozen=True)
class Limits:
    """A partition of SLURM; values are infinite if there is no limit.

    Attributes:
        most_minutes, default_minutes: maximum and default time limit of a job.
        most_nodes: maximum number of nodes of a job.
        cpus, gpus, memory: averages per node; memory in MiB.
    """

    partition: str
    up: bool = True
    nodes: int = 0
    most_nodes: float = float("inf")
    most_minutes: float = float("inf")
    default_minutes: float = float("inf")
    cpus: int = 0
    gpus: int = 0
    memory: float = 0.0


@dataclass(frozen=True)
class Account:
    """Limits of the user's association with an account; infinite if there is no limit."""

    name: str
    partition: str = ""
    most_minutes: float = float("inf")
    most_submitted: float = float("inf")


@dataclass(frozen=True)
class Room:
    """Bytes and files that may still be stored; infinite if unknown. ``of`` names the limit, for messages."""

    of: str
    bytes: float = float("inf")
    inodes: float = float("inf")


@dataclass(frozen=True)
class Site:
    """The known limits of a site; ``problems`` lists queries that failed."""

    partitions: tuple[Limits, ...] = ()
    default: str = ""
    accounts: tuple[Account, ...] = ()
    most_elements: int = 0
    """Maximum number of elements of an array; 0: unknown."""
    problems: list[str] = field(default_factory=list)

    def limits(self, names: str) -> list[Limits]:
        """Limits of the partitions ``a,b``, or of the default partition if ``names`` is empty."""
        wanted = [name.strip() for name in (names or self.default).split(",")]
        return [limits for limits in self.partitions if limits.partition in wanted]


def look() -> Site:
    """Query SLURM's controller, and its database if there is one."""

    problems: list[str] = []

    def ask(*command: str) -> str:
        try:
            with slurm.outer_job_forgotten():
                return slurm.ask(*command, seconds=SECONDS)
        except (ConfigError, OSError) as error:
            problems.append(f"{' '.join(command[:3])}: {error}")
            return ""

    partitions, default = parse_partitions(ask("scontrol", "show", "partition", "--oneliner"))
    config = ask("scontrol", "show", "config")
    accounts: tuple[Account, ...] = ()
    if re.search(r"^AccountingStorageType\s*=\s*accounting_storage/slurmdbd", config, re.MULTILINE):
        accounts = parse_associations(
            ask(
                *("sacctmgr", "--noheader", "--parsable2", "show", "associations", f"user={getpass.getuser()}"),
                "format=account,partition,maxsubmitjobs,maxwall",
            )
        )
    elements = re.search(r"^MaxArraySize\s*=\s*(\d+)", config, re.MULTILINE)
    return Site(partitions, default, accounts, int(elements[1]) if elements else 0, problems)


def parse_partitions(text: str) -> tuple[tuple[Limits, ...], str]:
    """Parse the output of ``scontrol show partition --oneliner``; also returns the name of the default partition."""
    found, default = [], ""
    for line in text.splitlines():
        said = dict(word.split("=", 1) for word in line.split() if "=" in word)
        if "PartitionName" not in said:
            continue
        nodes = _whole(said.get("TotalNodes", ""))
        tres = dict(part.split("=", 1) for part in said.get("TRES", "").split(",") if "=" in part)
        each = max(1, nodes)
        found.append(
            Limits(
                said["PartitionName"],
                said.get("State", "UP") == "UP",
                nodes,
                _limit(said.get("MaxNodes", "")),
                _minutes(said.get("MaxTime", "")),
                _minutes(said.get("DefaultTime", ""))
                if said.get("DefaultTime") != "NONE"
                else _minutes(said["MaxTime"]),
                _whole(said.get("TotalCPUs", "")) // each,
                _whole(tres.get("gres/gpu", "")) // each,
                mebibytes(tres.get("mem", "")) / each,
            )
        )
        if said.get("Default") == "YES":
            default = said["PartitionName"]
    return tuple(found), default


def parse_associations(text: str) -> tuple[Account, ...]:
    """Parse ``sacctmgr --parsable2 show associations format=account,partition,maxsubmitjobs,maxwall``."""
    rows = [line.split("|") for line in dict.fromkeys(text.splitlines())]
    return tuple(Account(row[0], row[1], _minutes(row[3]), _limit(row[2])) for row in rows if len(row) == 4 and row[0])


def _whole(text: str) -> int:
    return int(text) if text.isdigit() else 0


def _limit(text: str) -> float:
    return float(text) if text.isdigit() else float("inf")


def _minutes(text: str) -> float:
    try:
        return minutes(text) or float("inf")
    except ConfigError:
        return float("inf")


# ---- disks


def room(place: Path) -> list[Room]:
    """Free space below ``place``: of its file system, and of quotas that ``lfs`` or ``quota`` report."""
    there = next((path for path in (place, *place.parents) if path.exists()), Path("/"))
    rooms = []
    try:
        disk = os.statvfs(there)
        inodes = float(disk.f_favail) if disk.f_files else float("inf")  # file systems without a fixed number report 0
        rooms.append(Room(f"the file system of {there}", disk.f_bavail * disk.f_frsize, inodes))
    except OSError:
        pass
    user = getpass.getuser()
    if shutil.which("lfs"):
        rooms += parse_quota(_said("lfs", "quota", "-q", "-u", user, str(there)), "your quota (lfs quota)")
    if shutil.which("quota"):
        rooms += parse_quota(_said("quota", "-w", "-p", "-f", str(there)), "your quota (quota)")
    return rooms


def _said(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout  # the exit code of quota is 1 if a limit is reached


def parse_quota(text: str, of: str) -> list[Room]:
    """Parse the output of lfs and quota: ``<file system> blocks quota limit grace files quota limit grace``.

    Blocks have 1 KiB.
    """
    for line in text.splitlines():
        words = [word.rstrip("*") for word in line.split()]
        numbers = [int(word) for word in words[1:] if word.isdigit()]
        if len(words) < 9 or not words[1].isdigit() or len(numbers) < 6:
            continue
        used, soft, hard, files, soft_files, hard_files = (int(words[n]) for n in (1, 2, 3, 5, 6, 7))
        return [Room(of, _left(used, hard or soft) * 1024, _left(files, hard_files or soft_files))]
    return []


def _left(used: int, limit: int) -> float:
    return float(max(0, limit - used)) if limit else float("inf")
