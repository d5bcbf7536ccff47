"""Restarts a command in the Python environment of ``make setup`` if the current one lacks packages.

Imported before all other modules of Latentmill; it needs only the standard library of any Python 3.
"""

from __future__ import annotations

import importlib.util
import os
import sys

NEEDED = ("pyarrow", "xxhash", "yaml")
_MARK = "LATENTMILL_REEXECUTED"


def ensure(root: str) -> None:
    """If packages are missing, restart the command with ``<root>/.venv/bin/python``, or explain what to do."""
    if os.environ.get("LATENTMILL_LIFE"):
        return  # the job script chose the environment and reports what is missing
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if not missing and sys.version_info >= (3, 11):
        return
    python = os.path.join(root, ".venv", "bin", "python")
    if os.path.exists(python) and not os.environ.get(_MARK):
        sys.stdout.flush()
        os.execve(python, [python, *getattr(sys, "orig_argv", ["", *sys.argv])[1:]], {**os.environ, _MARK: "1"})
    why = f"it lacks {missing[0]}" if missing else "its Python is older than 3.11"
    print(
        f"error: {sys.executable} cannot run Latentmill: {why}; run 'make setup' in {root}, then "
        f"'. {os.path.join(root, '.venv')}/bin/activate', and this command again",
        file=sys.stderr,
    )
    raise SystemExit(2)
