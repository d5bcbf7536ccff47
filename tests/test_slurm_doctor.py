"""launch/doctor.py on a real SLURM: nothing to say of sound nodes, and each planted fault named with its node."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from slurm_cluster.cluster import Cluster

ROOT = Path(__file__).resolve().parents[1]
# a clock that is an hour behind, for Python alone: SLURM's own daemons would not stand it
SKEW = "import time\nnow = time.time\ntime.time = lambda: now() - 3600\n"


def firewall(ports: str, but: int = 0) -> dict[str, str]:
    """What drops new connections to these ports of a node, and what ends it."""
    rules = [f"tcp dport {but} accept"] * bool(but)
    rules.append(f"tcp dport {ports} tcp flags & (syn | ack) == syn drop")
    table = "table inet doctor { chain input { type filter hook input priority 0; " + "; ".join(rules) + "; }\n}\n"
    return {"line": f"nft '{table}'", "undo": "nft delete table inet doctor"}


def doctor(cluster: Cluster, *arguments: str) -> tuple[int, list[dict[str, Any]], str]:
    """Exit code, findings, and what was said besides."""
    command = [sys.executable, str(ROOT / "launch/doctor.py"), "cluster=slurm", "json=true", "seconds=0.05", *arguments]
    ended = cluster.run(*command, check=False, timeout=400)
    assert ended.returncode in (0, 1), ended.stderr
    return ended.returncode, json.loads(ended.stdout)["findings"], ended.stdout + ended.stderr


def told(findings: list[dict[str, Any]], check: str, node: str = "", state: str = "fail") -> str:
    """What was said of that check on that node."""
    return "\n".join(
        f"{finding['text']} → {finding['advice']}"
        for finding in findings
        if finding["check"] == check and finding["state"] == state and finding["node"] == (node or finding["node"])
    )


class Node:
    """One node's own mounts and network, to break."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        parent = (cluster.root / f"pids/slurmd-{name}.pid").read_text().strip()
        self.process = subprocess.run(
            ["pgrep", "-P", parent], capture_output=True, text=True, check=True
        ).stdout.strip()
        self.undo: list[str] = []

    def do(self, line: str, undo: str) -> None:
        self._run(line)
        self.undo.insert(0, undo)

    def _run(self, line: str) -> None:
        command = ["nsenter", "--target", self.process, "--net", "--mount", "bash", "-c", f"PATH=$PATH:/sbin; {line}"]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        assert not ended.returncode, ended.stderr

    def mend(self) -> None:
        for line in self.undo:
            self._run(line)


@pytest.fixture
def nodes(slurm_cluster: Cluster) -> Iterator[dict[str, Node]]:
    made = {name: Node(slurm_cluster, name) for name in ("node1", "node2", "node3", "node4")}
    yield made
    slurm_cluster.run("scancel", "--me", "--quiet", check=False)
    for node in made.values():
        node.mend()


def test_sound_nodes_pass(slurm_cluster: Cluster, nodes: dict[str, Node], tmp_path: Path) -> None:
    code, findings, said = doctor(slurm_cluster, f"data_dir={tmp_path}", "nodes=2", "mebibytes=1", "cpus_per_task=2")
    assert not [f for f in findings if f["state"] == "fail"], said
    assert code == 0
    for check in ("network", "ports between nodes", "clocks", "same data_dir", "exclusive rename", "locks"):
        assert told(findings, check, state="ok"), (check, said)
    assert "gloo, 2 ranks" in told(findings, "all-reduce", state="ok")
    assert "through eth0" in told(findings, "network", "node2", state="ok")
    assert {f["node"] for f in findings if f["check"] == "decoding"} == {"node1", "node2"}
    assert list(tmp_path.iterdir()) == []  # nothing is left behind


def test_planted_faults_are_named_with_their_node(
    slurm_cluster: Cluster, nodes: dict[str, Node], tmp_path: Path
) -> None:
    data, skew = tmp_path / "data", tmp_path / "skew"
    data.mkdir()
    skew.mkdir()
    (skew / "sitecustomize.py").write_text(SKEW)
    nodes["node2"].do(f"mount -t tmpfs none {data}", undo=f"umount {data}")
    nodes["node3"].do(f"mount --bind {data} {data}; mount -o remount,bind,ro {data}", undo=f"umount {data}")
    nodes["node3"].do(**firewall("30000-65000"))
    nodes["node4"].do(f"mount -t tmpfs none {sys.prefix}/bin", undo=f"umount {sys.prefix}/bin")
    late = f'[ "$SLURMD_NODENAME" != node3 ] || export PYTHONPATH={skew}:$PYTHONPATH'
    code, findings, said = doctor(
        slurm_cluster, f"data_dir={data}", "nodes=4", "gpus_per_node=1", "patience=12", f"setup={late}"
    )
    assert code == 1
    fault = told(findings, "environment", "node4")
    assert f"LATENTMILL_VENV={sys.prefix} on node4" in fault and "make setup" in fault, said
    assert "read-only" in told(findings, "data_dir", "node3"), said
    assert "without the files of ranks" in told(findings, "same data_dir", "node2"), said
    assert "cannot reach node3" in told(findings, "ports between nodes"), said
    assert "3600 s behind the other nodes" in told(findings, "clocks", "node3"), said
    assert "1 GPUs were requested on each node, but torch sees none" in told(findings, "gpus", "node1"), said
    assert "of 4 ranks 3 came" in told(findings, "network", "node1"), said


def test_a_blocked_port_of_rank_0_is_named(slurm_cluster: Cluster, nodes: dict[str, Node]) -> None:
    nodes["node1"].do(**firewall("12000-28000", but=15000 + 60 * slurm_cluster.number + 3))  # not slurmd's
    code, findings, said = doctor(slurm_cluster, "nodes=2", "patience=6")
    assert code == 1
    assert "no answer, packets are dropped → a firewall" in told(findings, "network", "node2"), said


def test_a_job_that_slurm_refuses_is_told_at_once(slurm_cluster: Cluster) -> None:
    code, findings, _ = doctor(slurm_cluster, "nodes=99")
    assert code == 1 and told(findings, "SLURM").startswith("refuses such a job: ")
