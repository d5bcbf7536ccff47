"""Reports to the job script of processes that fail while modules are imported, before they are ranks.

Needs nothing but the standard library, as anything else may be what is missing.
"""

from __future__ import annotations

import os
import sys
from types import TracebackType

_EXIT_ENVIRONMENT = 78  # pipeline.distributed.EXIT_ENVIRONMENT


def report_missing_modules() -> None:
    """An ImportError that nobody catches ends this process with a code of its own, and its reason in the job's log.

    The job script (slurm/job.sh) then tries other nodes, if any have what is missing on this one, and otherwise none.
    Outside of a job, a last line says which extra of Latentmill to install.
    """
    previous = sys.excepthook
    in_job = bool(os.environ.get("LATENTMILL_LIFE"))

    def end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        previous(kind, error, trace)
        if isinstance(error, ImportError) and not in_job and extra_for(error.name or ""):
            print(f"error: {missing(error)}", file=sys.stderr)
        elif isinstance(error, ImportError) and in_job:
            from pipeline.config.life import Life

            Life().ended(_EXIT_ENVIRONMENT, missing(error))
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(_EXIT_ENVIRONMENT)

    sys.excepthook = end


_DISTRIBUTIONS = {"open_clip": "open-clip-torch", "sklearn": "scikit-learn", "streaming": "mosaicml-streaming"}
"""Packages that are not called what their modules are."""


def missing(error: ImportError) -> str:
    """``No module named 'torch' (/venv/bin/python)``, and what to install if an extra of Latentmill has it."""
    hint = extra_for(error.name or "")
    return f"{error} ({sys.executable})" + (f"; install it with: {hint}" if hint else "")


def extra_for(module: str) -> str:
    """The command that installs the extra with ``module``; empty if no extra has it."""
    import re
    from importlib.metadata import PackageNotFoundError, requires

    top = module.partition(".")[0]
    package = _DISTRIBUTIONS.get(top, top.replace("_", "-"))
    try:
        lines = requires("latentmill") or []
    except PackageNotFoundError:
        return ""
    for line in lines:
        found = re.fullmatch(r"([\w.-]+).*;\s*extra == ['\"]([\w-]+)['\"]", line)
        if found and found[1].lower() == package:
            return f"pip install 'latentmill[{found[2]}]'"
    return ""
