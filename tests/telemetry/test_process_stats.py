"""What a rank reports about itself: memory, CPU, bytes, waiting, progress, its GPU."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.distributed import Rank, progress
from pipeline.distributed.progress import Progress
from pipeline.telemetry import process_stats as vitals
from pipeline.telemetry.process_stats import Vitals


def test_a_process_tells_what_it_uses() -> None:
    rank = Rank()
    said = Vitals(rank).read()
    assert 10**6 < said["rss"] <= said["peak"]
    assert said["cpu"] > 0 and said["waited"] == 0
    assert "gpu" not in said
    with rank.waiting():
        pass
    assert rank.waited > 0


def test_the_memory_of_workers_counts() -> None:
    body = "hold = bytearray(200_000_000); print(flush=True); input()"
    before = Vitals(Rank()).read()["rss"]
    worker = subprocess.Popen([sys.executable, "-c", body], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert worker.stdout is not None
    worker.stdout.readline()
    during = Vitals(Rank()).read()["rss"]
    worker.communicate(b"\n")
    assert during - before > 150_000_000


def test_stillness_ends_with_a_step_or_a_mebibyte(monkeypatch: pytest.MonkeyPatch) -> None:
    now, moved = [100.0], [0]
    monkeypatch.setattr(vitals, "time", SimpleNamespace(monotonic=lambda: now[0]))
    for module in (progress, vitals):
        monkeypatch.setattr(module, "bytes_moved", lambda: (moved[0], 0))
    rank = Rank()
    one, still = Vitals(rank), []
    for change in ("", "step", "", "beat", "megabyte", ""):
        now[0] += 5
        rank.steps += change == "step"
        moved[0] += {"beat": 500, "megabyte": 1 << 20}.get(change, 0)
        still.append(one.read()["still"])
    assert still == [5, 0, 5, 10, 0, 5]
    assert not Progress(rank).made()


def test_a_gpu_is_told_of_once_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    rank = Rank()
    calls: dict[str, Any] = {"is_initialized": lambda: True, "utilization": lambda device: 87}
    calls["memory_reserved"] = lambda device: 5 << 30
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=SimpleNamespace(**calls)))
    assert "gpu" not in Vitals(rank).read()  # which one is not decided yet
    vars(rank)["device"] = SimpleNamespace(type="cuda")
    vitals = Vitals(rank)
    assert vitals.read()["gpu"] == {"use": 0.87, "memory": 5 << 30, "mean": 0.87}
    monkeypatch.setattr(sys.modules["torch"].cuda, "utilization", lambda device: 13)
    assert vitals.read()["gpu"] == {"use": 0.13, "memory": 5 << 30, "mean": 0.5}

    def refuse(device: object) -> int:
        raise RuntimeError("driver")

    monkeypatch.setattr(sys.modules["torch"].cuda, "utilization", refuse)
    assert "gpu" not in Vitals(rank).read()
