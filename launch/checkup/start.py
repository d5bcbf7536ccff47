"""Starts the checks of pipeline/doctor: as a single process or ranks on this machine, or as tasks of a SLURM job."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO

from launch.request import Launch, Request
from launch.script import HOME, Script
from pipeline.config import cli
from pipeline.config.schema import ConfigError, DoctorConfig
from pipeline.distributed.environment import free_port
from pipeline.doctor.finding import MARK, Finding, read

_LIMIT = 900  # seconds that the checks may take once they run
_KEPT_LINES = 50
# The container's options are completed here, because pyxis reads them from srun; $1 is the number of srun's options
_SRUN = """source "$LATENTMILL_HOME/slurm/container.sh"; export CONTAINER
exec srun "${@:2:$1}" $SRUN_ARGS bash -c "$DOCTOR" doctor "${@:$1+2}" """
_SBATCH_ONLY = ("comment", "array", "chdir", "output", "open-mode", "requeue", "signal", "job-name", "time")


@dataclass
class Heard:
    """Output of the ranks."""

    ranks: int
    """Requested number of ranks; 0: a single process that is not a rank."""
    findings: list[Finding] = field(default_factory=list)
    other: list[str] = field(default_factory=list)
    """The last lines that are not findings."""
    code: int = 0


def here(config: DoctorConfig, launch: Launch) -> Heard:
    """Check this machine with one process, or with ``ranks=`` processes."""
    count = launch.config.ranks
    port = str(free_port())
    command = [sys.executable, "-u", "-m", "pipeline.doctor", *_arguments(config, launch)]
    heard = Heard(count if count > 1 else 0)
    collector = _Collector(heard)
    processes = []
    for rank in range(count):
        world = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": count}
        place = {name: str(value) for name, value in world.items()} | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        processes.append(collector.start(command, place if count > 1 else {}))
    collector.wait(processes, _LIMIT)
    return heard


def on_slurm(config: DoctorConfig, launch: Launch, tell: Callable[[str], None]) -> Heard:
    """Check the nodes of a small job that requests the same resources as a job of ``stage=``.

    It is a single ``srun`` whose tasks report over the network, so that a node does not need a shared file system to
    report what is wrong with it.
    """
    request = launch.requests[config.stage]
    script = _script(config, request)
    words = _srun_options(script, config)
    heard = Heard(script.nodes * script.tasks_per_node)
    collector = _Collector(heard, tell)
    environment = {**script.settings, "DOCTOR": (HOME / "slurm/doctor.sh").read_text(), "DOCTOR_LIMIT": str(_LIMIT)}
    environment |= {"DOCTOR_SETUP": _setup(request)}
    environment |= {
        "SLURM_GPUS_ON_NODE": str(request.config.gpus_per_node)
    }  # for slurm/container.sh; srun sets its own
    for name in os.environ:
        if name.startswith(("SLURM_CPU_BIND", "SLURM_MEM_BIND")):
            environment[name] = ""  # set by a surrounding job, they would bind our tasks to its CPUs
    command = ["bash", "-c", _SRUN, "doctor", str(len(words)), *words, *_arguments(config, launch)]
    collector.wait([collector.start(command, environment)], config.queue + _LIMIT + 60)
    return heard


def script_of(config: DoctorConfig, launch: Launch) -> Script:
    """A job script of ``stage=``, to find out whether SLURM would accept such a job."""
    return _script(config, launch.requests[config.stage])


def _script(config: DoctorConfig, request: Request) -> Script:
    places = (f"data_dir={config.data_dir}",) if config.data_dir else ()
    logs = Path(config.data_dir or ".").absolute()
    return Script(config.stage, "latentmill-doctor", "", places, logs, replace(request))


def _srun_options(script: Script, config: DoctorConfig) -> list[str]:
    options = {name: value for name, value in script.options().items() if name not in _SBATCH_ONLY}
    options |= {"job-name": script.name, "time": str(_LIMIT // 60 + 5), "immediate": str(int(config.queue))}
    options |= {"kill-on-bad-exit": "0", "wait": "0", "export": "ALL"}
    return [f"--{name}" if value == "true" else f"--{name}={value}" for name, value in options.items()] + [
        "--unbuffered"
    ]


def _setup(request: Request) -> str:
    """Set-up lines of our job scripts, so that the checks run in the same environment as a job."""
    own = [] if (Path(sys.prefix) / "bin/activate").exists() else [
        f"PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH"
    ]  # fmt: skip
    return "\n".join([*own, request.config.setup]).strip()


def _arguments(config: DoctorConfig, launch: Launch) -> list[str]:
    request = launch.requests[config.stage].config if launch.kind == "slurm" else launch.config
    slurm = launch.kind == "slurm"
    config = replace(
        config,
        run_id=config.run_id or uuid.uuid4().hex[:12],
        gpus=config.gpus or (request.gpus_per_node if slurm else 0),
        cpus=config.cpus or (request.cpus_per_task if slurm else 0),
        json=False,
    )
    return cli.arguments_of(config)


class _Collector:
    """Reads the output of processes while they run."""

    def __init__(self, heard: Heard, tell: Callable[[str], None] = lambda line: None) -> None:
        self._heard, self._tell = heard, tell
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []

    def start(self, command: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
        path = os.pathsep.join(filter(None, [str(HOME), os.environ.get("PYTHONPATH")]))
        try:
            process = subprocess.Popen(
                command,
                env={**os.environ, "PYTHONPATH": path, **environment},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
            )
        except OSError as error:
            raise ConfigError(f"{command[0]} cannot be started: {error.strerror}") from None
        for stream in (process.stdout, process.stderr):
            assert stream is not None
            thread = threading.Thread(target=self._listen, args=(stream,), daemon=True)
            thread.start()
            self._threads.append(thread)
        return process

    def _listen(self, stream: IO[str]) -> None:
        for line in stream:
            with self._lock:
                if MARK in line:
                    self._heard.findings += read([line])
                elif line.strip():
                    self._heard.other = [*self._heard.other, line.rstrip()][-_KEPT_LINES:]
                    if "queued and waiting" in line or "has been allocated" in line:
                        self._tell(line.strip())

    def wait(self, processes: list[subprocess.Popen[str]], seconds: float) -> None:
        end = time.monotonic() + seconds
        try:
            for process in processes:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, end - time.monotonic()))
        finally:
            for process in processes:
                if process.poll() is None:
                    process.terminate()  # srun cancels its tasks
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(10)
                process.kill()
        for thread in self._threads:
            thread.join(5)
        self._heard.code = next((code for process in processes if (code := process.returncode)), 0)
