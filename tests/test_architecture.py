"""Imports run one way (the contracts of ``.importlinter`` hold), and modules have names of their own."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONVENTIONAL = {"__init__", "__main__", "base"}
"""Names whose meaning is the same in every package."""
SUBJECTS = (
    {
        "pipeline/config",
        "pipeline/stages",
        "pipeline/partitions",
        "pipeline/training/tasks",
        ".",
    },  # a stage, its options
    {"pipeline/formats", "pipeline/sources", "pipeline/sources/archives"},  # a file format, written and read
)
"""Folders in which modules of the same name are about the same subject."""
FACADES = {"feidegger": {"pipeline", "pipeline/stages"}}
"""Public modules that are named after what they belong to."""


def test_rooms_import_only_rooms_below_them() -> None:
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr


def test_the_rooms_are_few() -> None:
    rooms = {
        path.stem
        for path in (ROOT / "pipeline").iterdir()
        if not path.name.startswith(("_", ".")) and path.suffix in ("", ".py")
    }
    assert len(rooms) <= 25, sorted(rooms)


def test_no_two_modules_of_the_same_name_have_different_jobs() -> None:
    folders: defaultdict[str, set[str]] = defaultdict(set)
    for path in (*ROOT.glob("*.py"), *(ROOT / "pipeline").rglob("*.py"), *(ROOT / "launch").rglob("*.py")):
        folders[path.stem].add(str(path.parent.relative_to(ROOT)))
    assert {"filter", "parquet", "base"} <= {name for name, found in folders.items() if len(found) > 1}
    twice = {
        name: sorted(found)
        for name, found in folders.items()
        if len(found) > 1
        and name not in CONVENTIONAL
        and not any(found <= subject for subject in SUBJECTS)
        and found != FACADES.get(name)
    }
    assert not twice, f"rename these modules: {twice}"


def test_every_module_that_is_imported_exists() -> None:
    """Also where the import is inside of a function, which a type checker that ignores missing modules lets pass."""
    missing = []
    for folder in ("pipeline", "launch", "tests", "benchmarks", "examples"):
        for path in (ROOT / folder).rglob("*.py"):
            for name in set(re.findall(r"^\s*(?:from|import) ((?:pipeline|launch)(?:\.\w+)*)", path.read_text(), re.M)):
                place = ROOT / name.replace(".", "/")
                if not (place.is_dir() or place.with_suffix(".py").is_file()):
                    missing.append(f"{path.relative_to(ROOT)}: {name}")
    assert not missing
