"""The package of ``tests/plugin``, installed for processes that a test starts, and a line of stages that needs it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STAGES = ["download", "filter", "mirror", "shard", "precompute", "train"]
DATASET = """
source: gradients
gradients: 45
gradient_edge: 48
filter: {min_image_size: 16}
mirror: {upside_down: true}
shard: {format: jsonl, partition_size: 15}
precompute: {text_encoder: ["letters#length=16"], image_resolutions: [48]}
train: {task: compress, bottleneck: 3, steps: 30, batch_size: 8, valid_fraction: 0.2, lr: 0.01}
"""


def install(folder: Path) -> Path:
    """Install the package into ``folder``, without a network; ``PYTHONPATH`` leads to it."""
    source = folder / "source"  # building leaves files next to the source
    shutil.copytree(ROOT / "tests/plugin", source)
    command = [
        "uv",
        "pip",
        "install",
        "--offline",
        "--no-deps",
        "--no-build-isolation",
        "--target",
        folder / "installed",
    ]
    tools = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "VIRTUAL_ENV": str(tools.parent)}
    subprocess.run([*command, source], env=environment, check=True, capture_output=True, text=True)
    return folder / "installed"


def python_path(installed: Path) -> dict[str, str]:
    """The environment in which Python finds the package and Latentmill."""
    return {"PYTHONPATH": f"{installed}{os.pathsep}{ROOT}"}


def settings(folder: Path) -> list[str]:
    """Arguments of the launcher for the whole line, in ``folder``."""
    dataset = folder / "gradients.yaml"
    dataset.write_text(DATASET)
    return [f"stage={','.join(STAGES)}", f"dataset={dataset}", f"data_dir={folder / 'data'}"]


def place(folder: Path, stage: str) -> Path:
    """Where a stage of the line lies."""
    return folder / "data/gradients/train" / stage
