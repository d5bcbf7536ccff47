"""What a rank tells the job script that started it (slurm/job.sh), which decides by it if the job shall live again.

Exit codes alone do not say enough: srun ends the other ranks when one fails, and torchrun has a code of its own. So a
rank leaves small files in the folder that the script made for this life and named in ``LATENTMILL_LIFE``:

    <rank>.alive    until its modification time, silence is nothing to worry about; holds the rank's SLURM step
    saved           something was done for good (a commit, a checkpoint): this life was not in vain
    <rank>.<code>   how the rank ended

Without the variable, or on a disk that refuses them, nothing is written: the work does not depend on it.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path


class Life:
    """This life of the job, as rank number ``rank`` sees it (default: what the launcher's environment says)."""

    def __init__(self, rank: int | None = None) -> None:
        folder = os.environ.get("LATENTMILL_LIFE", "")
        self._folder = Path(folder) if folder else None
        number = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
        self._rank = number if rank is None else str(rank)
        self._saved = False

    def alive(self, seconds: float) -> None:
        """Not to be worried about for the next ``seconds``."""
        step = ".".join(os.environ.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
        self._leave(f"{self._rank}.alive", f"{step}\n", time.time() + seconds)

    def saved(self) -> None:
        """Something was done for good."""
        if not self._saved:
            self._saved = True
            self._leave("saved")

    def ended(self, code: int) -> None:
        """The rank ends with exit code ``code``."""
        self._leave(f"{self._rank}.{code}")
        if self._folder is not None:
            with suppress(OSError):
                (self._folder / f"{self._rank}.alive").unlink(missing_ok=True)

    def _leave(self, name: str, text: str = "", time: float | None = None) -> None:
        if self._folder is None:
            return
        with suppress(OSError):
            path = self._folder / name
            if not path.exists():
                path.write_text(text)
            if time is not None:
                os.utime(path, (time, time))
