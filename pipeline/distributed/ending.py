"""Ends a process quickly after an error, with all output flushed, whatever its threads are doing."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from typing import NoReturn

from pipeline.distributed.flight import write_recording


def hard_exit(code: int) -> NoReturn:
    """End this process at once, even if threads still run or communicators wait for dead peers."""
    if multiprocessing := sys.modules.get("multiprocessing"):
        for child in multiprocessing.active_children():
            child.kill()
    if code:
        write_recording()
    for handler in logging.getLogger("pipeline").handlers:
        with contextlib.suppress(OSError, ValueError):
            handler.flush()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(code)
