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
    """Make pyarrow believe, in this process, that there is no pandas, unless that is loaded.

    For the first array that it makes of a list, it would import pandas to see if the list is a Series: a second of CPU
    in each process of a stage, which never has any. pandas itself can be imported as ever.
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
