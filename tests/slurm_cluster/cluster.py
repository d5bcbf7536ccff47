"""A real multi-node SLURM for tests: start it, run commands in it, break it, stop it. See README.md next to this."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
COMMANDS = ("slurmctld", "slurmd", "srun", "sbatch", "squeue", "scontrol", "munged", "ip", "nft", "nsenter", "unshare")
SEARCH_PATH = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
CLUSTERS = Path(tempfile.gettempdir()) / f"latentmill-slurm-{os.getuid()}"  # short: it holds sockets
MAX_CLUSTERS = 200


def why_not() -> str:
    """What keeps a cluster from starting on this machine; empty if nothing does."""
    missing = [name for name in COMMANDS if shutil.which(name, path=SEARCH_PATH) is None]
    if missing:
        return f"SLURM cannot start here: no {', '.join(missing)} (see `make slurm`)"
    if os.getuid() != 0:
        return "SLURM cannot start here: its test cluster needs root (namespaces, device nodes)"
    return ""


@dataclass(frozen=True)
class Cluster:
    """A running cluster. Its nodes are ``node1`` … ``node4`` and see the file system of this machine."""

    root: Path
    number: int

    @property
    def environment(self) -> dict[str, str]:
        """The environment of this process without what a surrounding job set, and with this cluster's settings."""
        foreign = ("SLURM_", "SBATCH_", "SRUN_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        return kept | {"PATH": SEARCH_PATH, "SLURM_CONF": str(self.root / "etc/slurm.conf")}

    def run(
        self, *command: str | Path, check: bool = True, timeout: float = 120, environment: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command (srun, sbatch, python launch/submit.py, …) as a user on the login node would."""
        finished = subprocess.run(
            [str(part) for part in command],
            env=self.environment | (environment or {}),
            capture_output=True,
            text=True,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
        )
        if check and finished.returncode != 0:
            raise AssertionError(f"{command[0]} ended with {finished.returncode}\n{finished.stdout}\n{finished.stderr}")
        return finished

    def node(self, action: str, node: str, *paths: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        """``start``, ``stop``, ``crash``, ``cut``, ``heal``, ``orphan``, ``revive`` a node; ``hide`` a path from it,
        ``mount`` it there, make it ``readonly``, ``open`` it to all users, or ``show`` it again: see node.sh."""
        return self.run(HERE / "node.sh", self.root, action, node, *paths, check=check)

    def controller(self, action: str) -> None:
        """``kill`` SLURM's controller, as if its machine had failed, or ``start`` it with the state that it saved."""
        pid_file = self.root / "pids/slurmctld.pid"
        if action == "kill":
            os.kill(int(pid_file.read_text()), signal.SIGKILL)
            return
        with open(self.root / "log/slurmctld.out", "ab") as log:
            daemon = subprocess.Popen(
                ["slurmctld", "-D", "-i"],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        pid_file.write_text(str(daemon.pid))

    def await_idle(self, seconds: float = 60) -> None:
        """Wait until all nodes are there and have nothing to do."""
        end = time.monotonic() + seconds
        while True:
            states = self.run(
                "sinfo", "--noheader", "--Node", "--partition=main", "--format=%T", check=False
            ).stdout.split()
            if len(states) == 4 and set(states) == {"idle"}:
                return
            if time.monotonic() > end:
                raise AssertionError(f"nodes are {states}\n{self.run('sinfo', '-R').stdout}")
            time.sleep(0.2)

    def stop(self) -> None:
        subprocess.run([str(HERE / "stop.sh"), str(self.root)], stdin=subprocess.DEVNULL, timeout=120)
        shutil.rmtree(self.root, ignore_errors=True)
        (CLUSTERS / str(self.number)).unlink(missing_ok=True)


def start(accounting: str = "none") -> Cluster:
    """Start a cluster next to any that other test runs use; ``accounting`` is none, or dbd for one with sacct.

    Each has a number, of which its ports, network and names are made; the file ``<number>`` in :data:`CLUSTERS` takes
    it and says which process it belongs to, so that :func:`clean_up` can say what a killed test run left behind.
    """
    CLUSTERS.mkdir(mode=0o755, exist_ok=True)
    with open(CLUSTERS / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another test run may be doing the same
        clean_up()
        number = _take_number()
    cluster = Cluster(CLUSTERS / f"c{number}", number)
    started = subprocess.run(
        [str(HERE / "start.sh"), str(cluster.root)],
        env=cluster.environment | {"ID": str(number), "NETNS": "1", "ACCT": accounting},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    if started.returncode != 0:
        cluster.stop()
        raise RuntimeError(f"the SLURM test cluster did not start:\n{started.stdout}")
    return cluster


def clean_up() -> None:
    """Stop the clusters of test runs that ended without doing so themselves. Hold the lock meanwhile."""
    for owner in sorted(CLUSTERS.glob("[0-9]*")):
        identity = owner.read_text()
        if not identity or identity != _identity(int(identity.split()[0])):
            Cluster(CLUSTERS / f"c{owner.name}", int(owner.name)).stop()


def _take_number() -> int:
    for number in range(1, MAX_CLUSTERS + 1):
        try:
            with open(CLUSTERS / str(number), "x") as file:
                file.write(_identity(os.getpid()))
            return number
        except FileExistsError:
            continue
    raise RuntimeError(f"{MAX_CLUSTERS} SLURM test clusters are running already; see {CLUSTERS}")


def _identity(pid: int) -> str:
    """A process id with the time its process started, as ids are given out again; empty if there is no such process."""
    try:
        return f"{pid} {Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[19]}"
    except OSError:
        return ""
