"""The command ``latentmill``: the launcher, the stages and the tools under one name.

latentmill run stage=all dataset=shapes data_dir=/data ranks=2     # python launch/submit.py
latentmill status /data                                            # python launch/status.py
latentmill filter input=/data/raw output=/data/filtered            # python -m pipeline.stages.filter
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from launch.script import HOME
from pipeline import __version__
from pipeline.config.cli import config_for, errors_as_one_line
from pipeline.config.options import nearest
from pipeline.config.schema import MAIN_LINE, STAGES
from pipeline.registry import stages

_HELP = """usage: latentmill <command> key=value ...

Run a pipeline:
  run                    run stages on this machine or submit them to SLURM: latentmill run stage=all dataset=shapes
  status FOLDER          show progress, speed, time left and problems
  doctor                 check whether this machine or a cluster is ready for a job
  slurm-templates FOLDER copy the job scripts to FOLDER/slurm, so that you can adapt them and submit them with sbatch

Run one stage in this process, or as one rank of torchrun, accelerate or srun:
  {main}

Tools:
  {tools}
  trace KEY              show the path of one sample through all stages: latentmill trace cat/17-png data_dir=/data

latentmill <command> --help lists the settings of a command. latentmill --version prints the version."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: that of this process) and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        tools = [name for name in STAGES if name not in MAIN_LINE]
        with errors_as_one_line():
            print(_HELP.format(main=", ".join(MAIN_LINE), tools=", ".join(tools)))
        return 0
    if words[0] == "--version":
        print(f"latentmill {__version__}")
        return 0
    name, rest = words[0], words[1:]
    if name in _PROGRAMS:
        return _PROGRAMS[name](rest)
    if name in STAGES:
        return _stage(name, rest)
    print(f"error: {name!r} is not a command; {nearest(name, [*_PROGRAMS, *STAGES])}", file=sys.stderr)
    return 2


def _launcher(module: str) -> Callable[[list[str]], int]:
    return lambda rest: int(import_module(f"launch.{module}").main(rest) or 0)


def _stage(name: str, rest: list[str]) -> int:
    """Run a stage as ``python -m pipeline.stages.<name>`` does."""
    try:
        code = import_module(stages.module(name)).main(config_for(name, rest))
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        code = end.code
    return int(code or 0)


def _trace(rest: list[str]) -> int:
    usage = "usage: latentmill trace KEY data_dir=FOLDER [dataset=NAME] [show=FILE.png] [json=true]"
    if rest and rest[0] in ("-h", "--help"):
        print(
            f"{usage}\n\nPrints what each stage did with a sample. KEY: its key in the ledger, or the path of its file"
        )
        return 0
    if rest and "=" not in rest[0] and not rest[0].startswith("-"):
        rest = [f"trace={rest[0]}", *rest[1:]]
    if not any(word.startswith(("trace=", "--trace")) for word in rest):
        print(f"error: the key of a sample is missing\n{usage}", file=sys.stderr)
        return 2
    return _stage("verify", rest)


def _slurm_templates(rest: list[str]) -> int:
    """Copy the job scripts of ``slurm/`` out of the installation; nothing that exists is overwritten."""
    if len(rest) != 1 or rest[0].startswith("-"):
        print("usage: latentmill slurm-templates FOLDER    copies the job scripts to FOLDER/slurm")
        return 0 if rest and rest[0] in ("-h", "--help") else 2
    target = Path(rest[0]).absolute() / "slurm"
    try:
        shutil.copytree(HOME / "slurm", target, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        environment = target / "env.sh"
        if (Path(sys.prefix) / "bin/activate").exists():
            default = "LATENTMILL_VENV=$LATENTMILL_HOME/.venv"
            environment.write_text(environment.read_text().replace(default, f"LATENTMILL_VENV={sys.prefix}"))
    except FileExistsError:
        print(f"error: {target} already exists; choose another folder", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {target} cannot be written: {error}", file=sys.stderr)
        return 2
    print(f"copied to {target}; adapt env.sh to your cluster, then submit from {target.parent}:")
    print("  DATASET=image_folder DATA_DIR=/data sbatch slurm/filter.sbatch")
    return 0


_PROGRAMS: dict[str, Callable[[list[str]], int]] = {
    "run": _launcher("submit"),
    "status": _launcher("status"),
    "doctor": _launcher("doctor"),
    "slurm-templates": _slurm_templates,
    "trace": _trace,
}

if __name__ == "__main__":
    sys.exit(main())
