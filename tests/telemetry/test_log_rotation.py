"""Logs that have grown large go on in a new file, and what is older than the one before is dropped."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config.schema import ConfigError
from pipeline.telemetry.log_rotation import LIMIT, limit

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import os, sys, time
from pipeline.telemetry.log_rotation import rotate
mine, other = sys.argv[1:]
for number in range(400):
    for name, stream in (("out", sys.stdout), ("err", sys.stderr)):
        stream.write(f"{name} {mine} {number} {'.' * 50}\\n")  # in one piece
        stream.flush()
    if other and number % 20 == 0:
        open(f"{mine}.{number}", "w").close()
        while not os.path.exists(f"{other}.{number}"):
            time.sleep(0.001)
    if number % 10 == 0:
        rotate(8000)
"""


def run(log: Path, *names: str) -> None:
    """Processes that share this log, as ranks of a torchrun do."""
    with log.open("ab") as file:
        running = [
            subprocess.Popen(
                [sys.executable, "-c", PROGRAM, name, next((other for other in names if other != name), "")],
                stdout=file,
                stderr=file,
                cwd=log.parent,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )
            for name in names
        ]
    assert [process.wait(60) for process in running] == [0] * len(names), log.read_text()


def test_the_newest_lines_stay_in_two_files(tmp_path: Path) -> None:
    log = tmp_path / "rank0.log"
    run(log, "a")
    older = tmp_path / "rank0.log.1"
    assert {path.name for path in tmp_path.glob("*.log*")} == {log.name, older.name}
    assert log.stat().st_size < 12_000 and 8000 < older.stat().st_size < 12_000
    assert log.read_text().startswith(f"(earlier lines: {older}; what was older is not kept)\n")
    lines = [line for line in (older.read_text() + log.read_text()).splitlines() if not line.startswith("(")]
    told = [(line.split()[0], int(line.split()[2])) for line in lines]
    first = told[0][1]
    assert first < 350
    assert told == [(stream, number) for number in range(first, 400) for stream in ("out", "err")]


def test_processes_that_share_a_log_go_on_in_the_same_new_one(tmp_path: Path) -> None:
    log = tmp_path / "node1.log"
    run(log, "a", "b")
    assert {path.name for path in tmp_path.glob("*.log*")} == {log.name, f"{log.name}.1"}
    text = (tmp_path / f"{log.name}.1").read_text() + log.read_text()  # the second may have renamed it for the first
    assert "out a 399" in text and "err a 399" in text and "out b 399" in text and "err b 399" in text
    assert log.stat().st_size < 16_000


def test_what_is_no_log_is_left_alone(tmp_path: Path) -> None:
    other = tmp_path / "mine.txt"
    run(other, "a")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    assert len(other.read_text().splitlines()) == 800


@pytest.mark.parametrize(("text", "expected"), [("64", 64_000_000), ("0.5", 500_000), ("0", 0), ("", 0)])
def test_the_limit_is_that_of_the_environment(monkeypatch: pytest.MonkeyPatch, text: str, expected: int) -> None:
    monkeypatch.setenv(LIMIT, text)
    assert limit() == expected


@pytest.mark.parametrize("text", ["many", "-1", "inf", "nan"])
def test_a_limit_that_is_none_is_an_error(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(LIMIT, text)
    with pytest.raises(ConfigError, match=f"{LIMIT}={text} is not a number of megabytes"):
        limit()
