"""Writes job scripts. They have the same form as the scripts in slurm/, and can be submitted without this launcher."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from launch.request import Request
from pipeline.config.schema import ConfigError, traits_of
from pipeline.registry import stages

HOME = Path(__file__).resolve().parent.parent
"""Root folder of the repository or the installation."""
_PLACES = ("data_dir", "input", "output", "checkpoint", "reference", "generated", "valid_input")
"""Settings that name files or folders that a container must see."""


def is_single(stage: str, arguments: Sequence[str]) -> bool:
    """Whether a stage runs as a single process, whatever number of ranks is requested."""
    traits = traits_of(stage)
    shared = traits.partitioned_with and any(a.startswith(f"{traits.partitioned_with}=") for a in arguments)
    return traits.single and not shared


@dataclass(frozen=True)
class Array:
    """One submission of array elements: ``size`` of ``total`` elements, from number ``offset`` on.

    ``parallel`` is the number of elements that may run at the same time; 0: no limit.
    """

    size: int
    offset: int = 0
    total: int = 0
    parallel: int = 0


@dataclass(frozen=True)
class Script:
    """One job script."""

    stage: str
    name: str
    comment: str
    arguments: tuple[str, ...]
    logs: Path
    request: Request
    array: Array | None = None
    workdir: Path = field(default_factory=Path.cwd)

    @property
    def single(self) -> bool:
        return is_single(self.stage, self.arguments)

    @property
    def tasks_per_node(self) -> int:
        config = self.request.config
        return 1 if self.single else config.tasks_per_node or config.gpus_per_node or 1

    @property
    def nodes(self) -> int:
        return 1 if self.single else self.request.config.nodes

    @property
    def ranks(self) -> int:
        return self.nodes * self.tasks_per_node * (self.array.total if self.array else 1)

    def options(self) -> dict[str, str]:
        """Options of sbatch by their long names; the value ``true`` stands for an option without a value."""
        config = self.request.config
        log = "%x-%A_%a.out" if self.array else "%x-%j.out"
        options = {
            "job-name": self.name,
            "comment": f"{self.comment} {config.comment}".strip(),
            "nodes": str(self.nodes),
            "ntasks-per-node": str(self.tasks_per_node),
            "cpus-per-task": str(config.cpus_per_task),
            "gpus-per-node": self.gpus,
            "mem": config.mem,
            "time": config.time,
            "partition": config.partition,
            "account": config.account,
            "qos": config.qos,
            "constraint": config.constraint,
            "reservation": config.reservation,
            "exclude": config.exclude,
            "gres": config.gres,
            "gpu-bind": config.gpu_bind if self.gpus else "",
            "licenses": config.licenses,
            "nice": str(config.nice or ""),
            "begin": config.begin,
            "mail-user": config.mail_user,
            "mail-type": config.mail_type or ("END,FAIL" if config.mail_user else ""),
            "array": self._array(),
            "chdir": str(self.workdir),
            "output": str(self.logs / log),
            "open-mode": "append",
            "requeue": "true",
            "signal": f"USR2@{config.signal_seconds}",
        }
        options |= {name.replace("_", "-"): value for name, value in self.request.options.items()}
        return {name: value for name, value in options.items() if value and value != "false"}

    @property
    def gpus(self) -> str:
        """GPUs per node in sbatch's notation; empty if there are none."""
        gpus = self.request.config.gpus_per_node
        if self.single:
            gpus = min(gpus, 1) if traits_of(self.stage).gpus else 0
        return ":".join(filter(None, [self.request.config.gpu_type, str(gpus)])) if gpus else ""

    def _array(self) -> str:
        if self.array is None:
            return ""
        throttle = f"%{self.array.parallel}" if self.array.parallel else ""
        return f"0-{self.array.size - 1}{throttle}"

    @property
    def text(self) -> str:
        """The text of the script.

        Raises:
            ConfigError: a value cannot be passed to sbatch.
        """
        lines = [
            "#!/usr/bin/env bash",
            f"# stage={self.stage}, written by launch/submit.py. `sbatch <this file>` submits it again.",
            *(_directive(name, value) for name, value in self.options().items()),
            "set -euo pipefail",
            "",
            "# ---- settings",
            *(f"export {name}={shlex.quote(value)}" for name, value in self.settings.items()),
            *([f"NOTIFY={shlex.quote(self.request.config.notify)}"] if self.request.config.notify else []),
            "",
            "# ---- the job",
            'source "$LATENTMILL_HOME/slurm/env.sh"',
            *([] if _in_venv() else _this_python()),
            *([self.request.config.setup.rstrip("\n")] if self.request.config.setup else []),
            'source "$LATENTMILL_HOME/slurm/job.sh"',
            "",
            *self._run(),
        ]
        return "\n".join(lines) + "\n"

    @property
    def settings(self) -> dict[str, str]:
        config = self.request.config
        settings = {"LATENTMILL_HOME": str(HOME)}
        settings |= {"LATENTMILL_VENV": sys.prefix} if _in_venv() else {}
        settings |= {"LOGS": str(self.logs), "LIVES": str(config.lives), "BAD_NODES": str(config.bad_nodes)}
        settings |= {"STAGGER": str(config.stagger)} if config.stagger >= 0 else {}
        if traits_of(self.stage).lockstep:
            settings |= {"WAIT": "1800"}  # one rank may have more work at the end
        arguments, srun = config.container_args, config.srun_args
        if config.container and config.container_runtime == "pyxis":
            srun = f"--container-image={config.container} {arguments} {srun}".strip()
        elif config.container:
            settings["CONTAINER"] = f"{config.container_runtime} exec {arguments} {config.container}".replace("  ", " ")
        settings |= {"BINDS": ",".join(self.binds)} if config.container and self.binds else {}
        binds = (("cpu-bind", config.cpu_bind), ("mem-bind", config.mem_bind))
        srun = " ".join([*(f"--{name}={value}" for name, value in binds if value), *([srun] if srun else [])])
        settings |= {"SRUN_ARGS": srun} if srun else {}
        if self.array:
            settings |= {"ARRAY_OFFSET": str(self.array.offset), "ARRAY_TOTAL": str(self.array.total)}
        return settings

    @property
    def binds(self) -> tuple[str, ...]:
        """Folders that the stage reads or writes, to bind into a container; without subfolders of others.

        Raises:
            ConfigError: the name of a folder cannot be bound.
        """
        given = [argument.partition("=") for argument in self.arguments]
        named = [value for key, _, value in given if key in _PLACES]
        paths = sorted({str(Path(name).absolute()) for name in named if name and "://" not in name}, key=len)
        paths = [path for path in paths if Path(path).exists()]
        kept = [path for path in paths if not any(Path(path).is_relative_to(other) for other in paths if other != path)]
        if unfit := [path for path in kept if set(path) & set(" ,:'\"")]:
            raise ConfigError(
                f"container={self.request.config.container}: cannot bind {unfit[0]!r}: rename this folder"
            )
        return tuple(kept)

    def _run(self) -> list[str]:
        start = "run_together" if traits_of(self.stage).lockstep else "run"
        words = [shlex.quote(argument) for argument in self.arguments] + (['"${ELEMENT[@]}"'] if self.array else [])
        return [" \\\n  ".join([f"{start} python -m {stages.module(self.stage)}", *words])]


def _in_venv() -> bool:
    return (Path(sys.prefix) / "bin/activate").exists()


def _this_python() -> list[str]:
    """Lines that make ``python`` the interpreter of this process; a node on which it is missing reports that."""
    folder = shlex.quote(str(Path(sys.executable).parent))
    return [
        f"PATH={folder}:$PATH",
        f'[ -x {folder}/python ] || LATENTMILL_BROKEN="no python in "{folder}" on $(hostname)"',
    ]


def _directive(name: str, value: str) -> str:
    if any(not character.isprintable() for character in name + value):
        raise ConfigError(f"slurm: {name}={value!r}: only printable characters, on one line")
    return f"#SBATCH --{name}" if value == "true" else f"#SBATCH --{name}={shlex.quote(value)}"
