"""Imports run one way, from the launcher down to the configuration: the contracts of ``.importlinter`` hold."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_rooms_import_only_rooms_below_them() -> None:
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr


def test_the_rooms_are_few() -> None:
    rooms = {path.stem for path in (ROOT / "pipeline").iterdir() if not path.name.startswith(("_", "."))}
    assert len(rooms) <= 24, sorted(rooms)
