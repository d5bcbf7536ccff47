"""Commands find the environment that make setup made, or say what to type."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pipeline.config import interpreter


class Executed(Exception):
    """The process would have been replaced."""


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    calls: list[list[str]] = []

    def execute(path: str, arguments: list[str], environment: dict[str, str]) -> None:
        assert environment[interpreter._MARK] == "1"
        calls.append([path, *arguments[1:]])
        raise Executed

    monkeypatch.setattr(interpreter.os, "execve", execute)
    monkeypatch.delenv("LATENTMILL_LIFE", raising=False)
    monkeypatch.setattr(sys, "orig_argv", ["python3", "launch/submit.py", "stage=all"])
    return calls


def test_nothing_happens_where_all_is_there(executed: list[list[str]], tmp_path: Path) -> None:
    interpreter.ensure(str(tmp_path))
    assert executed == []


def test_the_environment_of_make_setup_is_used_where_packages_are_missing(
    executed: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interpreter, "NEEDED", ("a_module_that_nobody_has",))
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.touch()
    with pytest.raises(Executed):
        interpreter.ensure(str(tmp_path))
    assert executed == [[str(python), "launch/submit.py", "stage=all"]]
    monkeypatch.setenv("LATENTMILL_LIFE", "1")
    interpreter.ensure(str(tmp_path))  # a job's environment is what its script says
    assert len(executed) == 1


def test_without_it_one_line_says_what_to_type(
    executed: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(interpreter, "NEEDED", ("a_module_that_nobody_has",))
    with pytest.raises(SystemExit) as end:
        interpreter.ensure(str(tmp_path))
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1
    assert "it lacks a_module_that_nobody_has" in said and f"run 'make setup' in {tmp_path}" in said
