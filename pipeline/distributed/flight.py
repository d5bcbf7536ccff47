"""Writes torch's recording of a rank's collectives when the rank fails: which rank waited for which, and where.

torch's flight recorder keeps the last collectives of a process. NCCL writes its recording itself when a collective
times out; this module writes it for gloo, and when something else ends the rank. The files are named after torch's
variable ``TORCH_FR_DUMP_TEMP_FILE``, which slurm/job.sh and launch/local.py set, and the rank;
``launch/monitor/flight_report.py`` reads them.
"""

from __future__ import annotations

import os
import sys
import threading
from contextlib import suppress
from pathlib import Path

_PATIENCE = 5.0  # seconds; the recorder's lock may be held by a thread that hangs


def write_recording() -> None:
    """Write this rank's recording if it has one and the variable is set. Never fails; takes at most a few seconds."""
    if os.environ.get("TORCH_FR_DUMP_TEMP_FILE") and "torch.distributed" in sys.modules:
        thread = threading.Thread(target=_write, name="latentmill-flight", daemon=True)
        thread.start()
        thread.join(_PATIENCE)


def _write() -> None:
    import torch
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        return
    from torch._C import _distributed_c10d as c10d

    dumps = {f"gloo-{dist.get_rank()}": "_dump_fr_trace"}
    if torch.cuda.is_initialized():
        dumps[f"{dist.get_rank()}"] = "_dump_nccl_trace"
    for name, dump in dumps.items():
        path = Path(os.environ["TORCH_FR_DUMP_TEMP_FILE"] + name)
        if hasattr(c10d, dump) and not path.exists():  # NCCL may have written its own earlier, at the timeout
            with suppress(OSError, RuntimeError, TypeError):  # the recording is not essential
                # torch takes seconds to collect stacks, which the log contains anyway
                path.write_bytes(
                    getattr(c10d, dump)(includeCollectives=True, includeStackTraces=False, onlyActive=False)
                )
