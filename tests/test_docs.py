"""Every command and every snippet in README and docs is one that exists: settings are known, names can be imported."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from launch import doctor
from launch.request import read
from launch.submit import jobs_of
from pipeline.config import cli
from pipeline.config.schema import STAGES, StatusConfig

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_FENCE = re.compile(r"^(?P<fence>`{3,})(?P<language>\w*)\n(?P<text>.*?)^(?P=fence)", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"(?:^ {4}.*\n)+", re.MULTILINE)
_PROGRAMS = ("python", "accelerate", "sbatch", "make", "latentmill", "torchrun", "srun")
_STAND_INS = {"/path/to/mine.yaml": str(cli.CONF / "dataset/image_folder.yaml"), "cluster=mysite": "cluster=slurm"}


def commands(page: Path) -> Iterator[str]:
    """The command lines on a page, continued lines joined, comments and output left out."""
    text = page.read_text()
    blocks = [match["text"] for match in _FENCE.finditer(text) if match["language"] in ("bash", "console", "shell")]
    blocks += [match[0] for match in _INDENTED.finditer(_FENCE.sub("", text))]
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        words = shlex.split(re.sub(r"(^|\s)#.*", "", line.strip().removeprefix("$ ")))
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words.pop(0)
        if words and (words[0] in _PROGRAMS or words[0].startswith("slurm/")):
            yield shlex.join(words)


def snippets(page: Path) -> Iterator[str]:
    return (match["text"] for match in _FENCE.finditer(page.read_text()) if match["language"] == "python")


def _cases(parts) -> list:
    return [
        pytest.param(part, id=f"{page.relative_to(ROOT)}-{number}")
        for page in PAGES
        for number, part in enumerate(parts(page), 1)
    ]


@pytest.mark.parametrize("command", _cases(commands))
def test_a_command_in_the_documentation_is_one_that_can_be_given(command):
    for word, instead in _STAND_INS.items():
        command = command.replace(word, instead)
    words = shlex.split(command)
    if "precompute.py" in words:
        cli.load("precompute", _renamed(words[words.index("precompute.py") + 1 :]))
    elif words[:2] == ["python", "launch/submit.py"]:
        if "--help" not in words:
            launch = read(words[2:])
            assert jobs_of(launch.config, launch.settings, launch.requests)
    elif words[:2] == ["python", "launch/status.py"]:
        cli.build(StatusConfig, {"path": "", **cli.parse([word for word in words[2:] if "=" in word])})
    elif words[:2] == ["python", "launch/doctor.py"]:
        doctor.read(words[2:])
    elif words[:2] == ["python", "-m"] and words[2].startswith("pipeline.stages."):
        stage = words[2].rpartition(".")[2]
        assert stage in STAGES
        if "--help" not in words:
            cli.load(stage, words[3:])
    elif words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in words[1:] if "=" not in word and not word.startswith("-")} <= set(targets)
    else:
        scripts = [word for word in words if word.endswith((".py", ".sbatch", ".sh"))]
        assert all((ROOT / script).is_file() for script in scripts)


def _renamed(words: list[str]) -> list[str]:
    return [{"--datadir": "--input", "--savedir": "--output"}.get(word, word) for word in words]


@pytest.mark.parametrize("snippet", _cases(snippets))
def test_a_snippet_imports_only_what_exists(snippet):
    for node in ast.walk(ast.parse(snippet)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("pipeline", "launch"):
            module = import_module(node.module)
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []
