"""Reports of a rank to its job script (slurm/job.sh), by which the script decides whether to requeue the job.

Exit codes are not sufficient: srun kills the other ranks when one fails, and torchrun has its own exit code. A rank
therefore writes small files to the folder that the script created for this life and named in ``LATENTMILL_LIFE``:

    <rank>.alive    rewritten regularly: SLURM step, node, and the seconds for which it is valid. Its age is measured by
                    the file server's clock, which sets the modification time, because the clocks of nodes differ
    saved           permanent progress was made (a commit, a checkpoint)
    <rank>.<code>   how the rank ended, one item per line: node, steps and seconds of work, reason, output folder

Nothing is written without the variable or if the disk rejects the files; the work does not depend on them.
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path

LONGEST = 600
"""Maximum characters of a reason."""


class Life:
    """The current life of the job, for rank ``rank`` (default: from the launcher's environment)."""

    def __init__(self, rank: int | None = None) -> None:
        folder = os.environ.get("LATENTMILL_LIFE", "")
        self._folder = Path(folder) if folder else None
        number = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
        self._rank = number if rank is None else str(rank)
        self._node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        self._saved = False
        self.work = ""
        """The output folder of the rank, once it is known."""

    def alive(self, seconds: float) -> None:
        """Report that the rank is alive; the report is valid for ``seconds``."""
        step = ".".join(os.environ.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
        if self._folder is not None:
            with suppress(OSError):
                path = self._folder / f"{self._rank}.alive"
                if not path.exists():
                    path.write_text(f"{step} {self._node} {seconds:g}\n")
                os.utime(path)  # without a time: that of the file server

    def saved(self) -> None:
        """Report permanent progress."""
        self._saved = self._saved or self._leave("saved")

    def ended(self, code: int, reason: str = "", steps: int = 0, seconds: float = 0.0) -> None:
        """Report exit code ``code``, after ``steps`` steps and ``seconds`` of work without waiting."""
        why = " ".join(reason.split())[:LONGEST]
        self._leave(f"{self._rank}.{code}", f"{self._node}\n{steps} {seconds:.1f}\n{why}\n{self.work}\n")
        if self._folder is not None:
            with suppress(OSError):
                (self._folder / f"{self._rank}.alive").unlink(missing_ok=True)

    def _leave(self, name: str, text: str = "") -> bool:
        """Write a file and return whether that succeeded."""
        if self._folder is None:
            return True
        try:
            (self._folder / name).write_text(text)
        except OSError:
            return False
        return True
