"""What a job script is told of a process that fails before it is a rank: while modules are imported.

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
    """
    if not os.environ.get("LATENTMILL_LIFE"):
        return
    previous = sys.excepthook

    def end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        previous(kind, error, trace)
        if isinstance(error, ImportError):
            from pipeline.config.life import Life

            Life().ended(_EXIT_ENVIRONMENT, missing(error))
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(_EXIT_ENVIRONMENT)

    sys.excepthook = end


def missing(error: ImportError) -> str:
    """``No module named 'torch' (/venv/bin/python)``."""
    return f"{error} ({sys.executable})"
