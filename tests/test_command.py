"""``latentmill``: the launcher, the stages and the tools under one name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import pipeline
from launch import command
from pipeline.config.schema import STAGES
from pipeline.config.startup import extra_for, missing

ROOT = Path(__file__).parents[1]


def test_help_names_every_command(capsys):
    assert command.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert [
        name for name in [*STAGES, "run", "status", "doctor", "slurm-templates", "trace"] if name not in shown
    ] == []


def test_the_version_is_that_of_the_package(capsys):
    assert command.main(["--version"]) == 0
    assert capsys.readouterr().out == f"latentmill {pipeline.__version__}\n"


@pytest.mark.parametrize("words", [[], ["status"], ["doctor"], ["run"], ["shard"]], ids=lambda words: " ".join(words))
def test_a_reader_that_leaves_early_is_no_error(words):
    reading, writing = os.pipe()
    os.close(reading)  # as head -1 does, when it has its line
    try:
        command = [sys.executable, "-m", "launch.command", *words, "--help"]
        done = subprocess.run(command, cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_unknown_command_is_an_error_with_the_nearest_name(capsys):
    assert command.main(["filtre"]) == 2
    assert capsys.readouterr().err == "error: 'filtre' is not a command; did you mean filter?\n"


@pytest.mark.parametrize("name", ["run", "status", "doctor", "filter", "trace"])
def test_help_of_a_command_uses_its_name(name, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/venv/bin/latentmill", name])
    assert command.main([name, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: latentmill {name}")


def test_a_wrong_setting_ends_a_stage_with_2(capsys):
    assert command.main(["filter", "min_image_sise=3"]) == 2
    assert "did you mean min_image_size" in capsys.readouterr().err


def test_trace_takes_the_key_of_a_sample_without_a_name(tmp_path, capsys):
    assert command.main(["trace", "cat/17-png", f"data_dir={tmp_path}", "nonsense=1"]) == 2
    assert "nonsense" in capsys.readouterr().err
    assert command.main(["trace"]) == 2
    assert "the key of a sample is missing\nusage: latentmill trace KEY" in capsys.readouterr().err
    assert command.main(["trace", "cat/17-png", f"data_dir={tmp_path}"]) == 2
    assert "trace=cat/17-png is not" not in (said := capsys.readouterr().err) and str(tmp_path) in said


def test_the_job_scripts_are_copied_with_this_environment_and_never_overwritten(tmp_path, capsys):
    assert command.main(["slurm-templates", str(tmp_path)]) == 0
    copied = {path.name for path in (tmp_path / "slurm").rglob("*") if path.is_file()}
    assert copied == {path.name for path in (ROOT / "slurm").rglob("*") if path.is_file()}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LATENTMILL")}
    script = f"source {tmp_path}/slurm/env.sh; echo $LATENTMILL_HOME; python -c 'import sys; print(sys.prefix)'"
    said = subprocess.run(["bash", "-euc", script], env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.split() == [str(tmp_path), sys.prefix]
    (tmp_path / "slurm/env.sh").write_text("mine")
    assert command.main(["slurm-templates", str(tmp_path)]) == 2
    assert "already exists" in capsys.readouterr().err
    assert (tmp_path / "slurm/env.sh").read_text() == "mine"


@pytest.mark.parametrize(
    ("module", "extra"),
    [("diffusers", "latents"), ("open_clip.model", "latents"), ("torch", "latents"), ("sklearn", "train"),
     ("streaming", "train"), ("pycocoevalcap", "captions")],
)  # fmt: skip
def test_a_missing_module_names_the_extra_that_has_it(module, extra):
    assert extra_for(module) == f"pip install 'latentmill[{extra}]'"
    assert extra_for(module) in missing(ModuleNotFoundError(f"No module named {module!r}", name=module))


def test_a_module_that_is_in_no_extra_has_no_hint():
    assert extra_for("pyarrow") == ""
    assert extra_for("no_such_module") == ""
