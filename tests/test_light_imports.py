"""CPU stages and launchers start without the packages that only GPUs and plots need, on a thousand nodes at once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = (
    "accelerate", "datasets", "diffusers", "matplotlib", "open_clip", "pandas", "sklearn", "streaming", "torch",
    "torchvision", "transformers",
)  # fmt: skip
RUN = """
import json, runpy, sys
heavy, module, *arguments = sys.argv[1:]
sys.argv = [module, *arguments]
try:
    runpy.run_module(module, run_name="__main__", alter_sys=True)
finally:
    print(json.dumps([name for name in heavy.split(",") if name in sys.modules]))
"""


def imported(module: str, *arguments: str) -> list[str]:
    """Heavy packages that a process has imported when it has run ``module``."""
    command = [sys.executable, "-c", RUN, ",".join(HEAVY), module, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return [str(name) for name in json.loads(done.stdout.splitlines()[-1])]


def test_stages_without_a_network_run_without_heavy_packages(tmp_path: Path) -> None:
    common = ["dataset=shapes", f"data_dir={tmp_path}"]
    source = ["source=shapes", "count=12"]
    stages: dict[str, list[str]] = {
        "download": source,
        "filter": [],
        "shard": [],
        "dedup": [],
        "score": [],
        "verify": [],
    }
    for stage, settings in stages.items():
        where = common if stage != "verify" else [f"input={tmp_path}/shapes/train/shard-mds"]
        assert imported(f"pipeline.stages.{stage}", *where, *settings) == [], stage
    assert (tmp_path / "shapes/train/dedup/_SUCCESS").is_file()


@pytest.mark.parametrize("program", ["submit", "status", "doctor"])
def test_launchers_start_without_heavy_packages(program: str) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(ROOT / f"launch/{program}.py"), "--help"],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    names = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert {"launch", "pipeline"} & names and not names & set(HEAVY)


def opened(*words: str) -> list[str]:
    """The files that Python opens in a run of the program: modules, and whatever else it looks into."""
    program = (
        "import json, runpy, sys; paths = []\n"
        "sys.addaudithook(lambda event, found: paths.append(str(found[0])) if event == 'open' else None)\n"
        "sys.argv = sys.argv[1:]; runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)\n"
        "print(json.dumps(paths))"
    )
    command = [sys.executable, "-c", program, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return [str(path) for path in json.loads(done.stdout.splitlines()[-1])]


def test_a_rank_that_starts_asks_shared_storage_for_little(tmp_path: Path) -> None:
    """A thousand ranks start at once: what each opens, and looks for in vain, is asked of one file server."""
    common = ["dataset=shapes", f"data_dir={tmp_path}"]
    for stage, settings in {"download": ["count=4"], "filter": [], "shard": []}.items():
        paths = opened(f"pipeline.stages.{stage}", *common, *settings)
        assert not [path for path in paths if path.endswith("entry_points.txt")], "one in each installed package"
        modules = {path for path in paths if path.endswith((".py", ".pyc"))}
        assert 100 < len(modules) < 600, (stage, sorted(modules))
