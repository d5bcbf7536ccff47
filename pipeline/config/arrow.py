"""Settings of pyarrow for all programs."""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from typing import Any


class _Without(MetaPathFinder):
    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        if fullname == "pandas":
            raise ModuleNotFoundError("not looked for", name=fullname)


def without_pandas() -> None:
    """Make pyarrow behave as if pandas were not installed, unless it is already imported.

    When pyarrow converts the first list to an array, it imports pandas to check whether the list is a Series. This
    takes a second of CPU time in every process of a stage, which never uses a Series. pandas itself can still be
    imported.
    """
    if "pyarrow" not in sys.modules or "pandas" in sys.modules:
        return
    import pyarrow as pa

    finder = _Without()
    sys.meta_path.insert(0, finder)
    try:
        pa.array([0])
    finally:
        sys.meta_path.remove(finder)
