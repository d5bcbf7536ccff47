"""What an installed package adds runs on a real SLURM as it does on one machine."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

from example_plugin import ROOT, STAGES, install, place, python_path, settings
from slurm_cluster.cluster import Cluster

from pipeline.partitions.dataset import Dataset


def test_the_line_of_a_package_gives_the_same_bytes_on_slurm_and_here(slurm_cluster: Cluster, tmp_path: Path) -> None:
    environment = python_path(install(tmp_path))
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
    submit = [sys.executable, ROOT / "launch/submit.py"]
    sizes = ["cluster=slurm", "nodes=2", "tasks_per_node=2", "mem=2G", "train.nodes=1", "train.tasks_per_node=1"]
    said = slurm_cluster.run(*submit, *settings(there), *sizes, environment=environment, timeout=300).stdout
    jobs = re.findall(r"submitted: (\d+)", said)
    assert len(jobs) == len(STAGES), said
    local = {**os.environ, **environment}
    done = subprocess.run([*submit, *settings(here)], env=local, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    end = time.monotonic() + 500
    while slurm_cluster.run("squeue", "--noheader", f"--jobs={','.join(jobs)}", check=False).stdout.strip():
        assert time.monotonic() < end, slurm_cluster.run("squeue").stdout
        time.sleep(0.5)
    logs = "\n".join(path.read_text() for path in there.rglob("*.out"))
    for stage in ("download", "filter", "mirror", "shard-jsonl", "precompute-embedded"):
        one, other = (Dataset.open(place(folder, stage)).require_success() for folder in (here, there))
        assert one["content_digest"] == other["content_digest"], stage
    assert (there / "data/gradients/runs/compress/export/model.safetensors").is_file(), logs
