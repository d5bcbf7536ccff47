"""Every command in README and docs can be given: its settings are known, its files are there.

Some are run on small data, as all Python is, by test_docs_run.py.
"""

from __future__ import annotations

import configparser
import re
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from launch import doctor
from launch.monitor import metrics, ranks
from launch.request import read
from launch.submit import jobs_of
from pipeline.config import cli
from pipeline.config.schema import STAGES, StatusConfig
from pipeline.distributed import signals

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_FENCE = re.compile(
    r"(?:^<!-- not run: (?P<reason>.*?) -->\n+)?"
    r"^(?P<fence>`{3,})(?P<language>\{?\w*\}?)[^\n]*\n(?P<text>.*?)^(?P=fence)$",
    re.MULTILINE | re.DOTALL,
)
_LIST = re.compile(r"(?:[-*]|\d+\.) ")
_LANGUAGES = {"bash", "console", "ini", "python", "text", "toml", "yaml"}
_PROGRAMS = ("python", "accelerate", "sbatch", "make", "latentmill", "torchrun", "srun")
_STAND_INS = {"/path/to/mine.yaml": str(cli.CONF / "dataset/image_folder.yaml"), "cluster=mysite": "cluster=slurm"}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    text: str
    reason: str
    """Why it is not run: from the comment ``<!-- not run: ... -->`` before it."""


def blocks(page: Path, *languages: str) -> list[Block]:
    found = (
        Block(match["language"], match["text"], match["reason"] or "") for match in _FENCE.finditer(page.read_text())
    )
    return [block for block in found if not languages or block.language in languages]


def lines_of(block: Block) -> Iterator[list[str]]:
    """The words of each command of a block: continued lines joined, comments left out."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(re.sub(r"(^|\s)#.*", "", line.strip().removeprefix("$ ")))
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words.pop(0)
        if words:
            yield words


def commands(page: Path) -> Iterator[str]:
    """The commands on a page, but for those of blocks that say why they are not run."""
    for block in blocks(page, "bash", "console"):
        yield from map(shlex.join, () if block.reason else lines_of(block))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_says_what_it_is_and_each_that_is_not_run_says_why(page: Path) -> None:
    for block in blocks(page):
        assert block.language in _LANGUAGES or block.language.startswith("{"), block.text
        assert not block.reason or len(block.reason.split()) > 3
    rest = _FENCE.sub("", page.read_text())
    in_list = False
    for paragraph in re.split(r"\n{2,}", rest):
        assert in_list or not paragraph.startswith("    "), f"fence this block and name its language: {paragraph}"
        in_list = in_list if paragraph.startswith(" ") else bool(_LIST.match(paragraph))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_settings_files_can_be_read(page: Path) -> None:
    for block in blocks(page, "toml"):
        assert tomllib.loads(block.text)
    for block in blocks(page, "ini"):
        assert _ini(block.text)
    for block in blocks(page, "yaml"):
        assert yaml.safe_load(block.text)


def _ini(text: str) -> list[str]:
    parser = configparser.ConfigParser()
    parser.read_string(text)
    return parser.sections()


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
    if words == ["source", ".venv/bin/activate"] or (words[0] == "export" and all("=" in word for word in words[1:])):
        return
    assert words[0] in _PROGRAMS or words[0].startswith("slurm/"), "a block with other programs says: not run, and why"
    if words[:2] == ["srun", "python"]:
        words = words[1:]
    if words[0] == "latentmill":
        words = as_python(words[1:])
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
        assert scripts or words[:2] == ["latentmill", "slurm-templates"] or words[1:3] == ["-m", "pytest"], command
        assert all((ROOT / script).is_file() for script in scripts)
        if scripts and scripts[0].endswith(".sbatch") and Path(scripts[0]).stem in STAGES:
            given = words[words.index(scripts[0]) + 1 :]
            assert cli.build(STAGES[Path(scripts[0]).stem], cli.parse(given))


def as_python(words: list[str]) -> list[str]:
    """What ``latentmill`` with these arguments is without it."""
    name, rest = words[0], words[1:]
    if name in ("run", "status", "doctor"):
        return ["python", f"launch/{'submit' if name == 'run' else name}.py", *rest]
    if name == "trace":
        return ["python", "-m", "pipeline.stages.verify", f"trace={rest[0]}", *rest[1:]]
    return ["latentmill", *words] if name == "slurm-templates" else ["python", "-m", f"pipeline.stages.{name}", *rest]


def test_every_link_of_the_readme_leads_to_a_page():
    links = re.findall(r"\]\(([^)#:]+)\)", (ROOT / "README.md").read_text())
    assert len(links) > 20
    assert [link for link in links if not (ROOT / link).is_file()] == []


def test_every_link_of_the_readme_to_a_section_leads_there():
    links = re.findall(r"\]\(([^)#:]+)#([^)]+)\)", (ROOT / "README.md").read_text())
    assert links
    for page, anchor in links:
        titles = re.findall(r"^#+ (.*)$", (ROOT / page).read_text(), re.MULTILINE)
        assert anchor in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles], (page, anchor)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def _renamed(words: list[str]) -> list[str]:
    return [{"--datadir": "--input", "--savedir": "--output"}.get(word, word) for word in words]


def _first_column(page: str) -> set[str]:
    rows = re.findall(r"^\| ([^|]*) \|", (ROOT / "docs" / page).read_text(), re.MULTILINE)
    return {name.strip("` ") for row in rows for name in row.split(", ")}


def test_all_exit_codes_are_explained():
    codes = {value for name, value in vars(signals).items() if name.startswith("EXIT_")}
    assert {str(code) for code in codes | {0, 1, 2, 130}} <= _first_column("reference/exit_codes.md")


def test_all_metrics_are_explained_and_no_others():
    stage = {f"latentmill_stage_{name}" for name, *_ in metrics._STAGE} | {
        "latentmill_stage_bad_samples",
        "latentmill_stage_ranks",
    }
    page = (ROOT / "docs/reference/metrics.md").read_text()
    assert {
        name for name in _first_column("reference/metrics.md") if re.fullmatch(r"latentmill_\w+", name)
    } == stage | {f"latentmill_rank_{name}" for name, *_ in metrics._RANK}
    for _, kind, help_, _ in (*metrics._STAGE, *metrics._RANK):
        assert kind == "gauge" and f" {help_} |" in page


def test_all_states_of_ranks_are_explained():
    assert {*ranks.LIVE, *ranks.BAD, *ranks._ENDED.values()} - {"running"} <= _first_column("howto/watch.md")


def test_what_the_documentation_includes_is_linked_too() -> None:
    """GitHub shows an include as nothing but its path: the link next to it leads to the file."""
    found = [
        (path, match)
        for path in sorted((ROOT / "docs").rglob("*.md"))
        for match in re.finditer(r"(\[[^\]]*\]\((\S+)\):\n\n)?```\{literalinclude\} (\S+)", path.read_text())
    ]
    assert len(found) >= 7
    for path, match in found:
        assert match[2] == match[3] and (path.parent / match[3]).is_file(), f"{path}: {match[3]}"
