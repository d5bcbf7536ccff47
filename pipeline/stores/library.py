"""Loads the client library so that it also works in processes forked from one that has used it.

Its requests run in threads of a runtime that is part of the loaded library. Threads do not survive a fork, so that a
request in the child would wait for them forever. The child therefore loads the library a second time, from a copy of
the file: under the same name, the system would return the library that is already loaded.
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
import threading
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from types import ModuleType
from typing import Any

_NATIVE = "obstore._obstore"
_lock = threading.Lock()
_forked = False
_left: list[ModuleType] = []  # modules loaded before the fork: destroying them could wait for their threads


def _after_fork() -> None:
    global _lock, _forked
    _lock = threading.Lock()  # another thread may have held it
    _forked = _NATIVE in sys.modules


os.register_at_fork(after_in_child=_after_fork)


def obstore() -> Any:
    """The ``obstore`` package, with a runtime that belongs to this process."""
    global _forked
    with _lock:
        if _forked:
            _load_copy()
            _forked = False
        return importlib.import_module("obstore")


def _load_copy() -> None:
    names = [name for name in sys.modules if name.partition(".")[0] == "obstore"]
    origin = str(sys.modules[_NATIVE].__file__)
    _left.extend(sys.modules.pop(name) for name in names)
    with tempfile.TemporaryDirectory(prefix="latentmill-") as folder:
        path = f"{folder}/{os.getpid()}.so"
        with open(origin, "rb") as library, open(path, "wb") as copy:
            while os.sendfile(copy.fileno(), library.fileno(), None, 1 << 30):
                pass
        loader = ExtensionFileLoader(_NATIVE, path)
        spec = spec_from_file_location(_NATIVE, path, loader=loader)
        assert spec is not None
        sys.modules[_NATIVE] = module_from_spec(spec)
        loader.exec_module(sys.modules[_NATIVE])
        # the library stays in memory when the copy is removed; a later fork copies the original again
        sys.modules[_NATIVE].__file__ = origin
