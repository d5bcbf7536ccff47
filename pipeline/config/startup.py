"""Reports to the job script from processes that fail while importing modules, before they become ranks.

Needs only the standard library, because other packages may be missing.
"""

from __future__ import annotations

import os
import sys
from types import TracebackType

_EXIT_ENVIRONMENT = 78  # pipeline.distributed.EXIT_ENVIRONMENT


def report_missing_modules() -> None:
    """Let an uncaught ImportError end this process with a specific exit code and its reason in the job's log.

    The job script (slurm/job.sh) then tries other nodes that have the missing module, if there are any. Outside a job,
    a last line names the extra of Latentmill to install.
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
"""Packages whose names differ from those of their modules."""


def missing(error: ImportError) -> str:
    """The message ``No module named 'torch' (/venv/bin/python)``, with the extra of Latentmill to install, if any."""
    hint = extra_for(error.name or "")
    return f"{error} ({sys.executable})" + (f"; install it with: {hint}" if hint else "")


def extra_for(module: str) -> str:
    """The command that installs the extra that contains ``module``; empty if there is none."""
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
