"""setup.cfg, constraints.txt and environment.yml speak of the same packages and versions."""

from __future__ import annotations

import configparser
import importlib.metadata
import os
import subprocess
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
UNPINNED_EXTRAS = {"mamba", "wandb"}  # compiled against the installed torch; a service's own client


def requirements(lines: str) -> list[Requirement]:
    return [Requirement(line) for line in lines.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


@pytest.fixture(scope="module")
def pins() -> dict[str, str]:
    """Names and versions in constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().split()
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


@pytest.fixture(scope="module")
def wanted(setup_cfg: configparser.ConfigParser) -> list[Requirement]:
    """All that setup.cfg asks for and constraints.txt must pin."""
    extras = setup_cfg["options.extras_require"]
    texts = [
        setup_cfg["options"]["install_requires"],
        *(extras[name] for name in extras if name not in UNPINNED_EXTRAS),
    ]
    return [requirement for text in texts for requirement in requirements(text)]


def test_every_requirement_is_pinned_to_a_version_that_it_allows(
    wanted: list[Requirement], pins: dict[str, str]
) -> None:
    assert len(wanted) > 20
    for requirement in wanted:
        version = pins.get(canonicalize_name(requirement.name))
        assert version is not None, f"constraints.txt does not pin {requirement.name}"
        assert requirement.specifier.contains(version), f"constraints.txt pins {version}, setup.cfg asks {requirement}"


def test_conda_gets_the_same_packages_in_the_same_versions(
    setup_cfg: configparser.ConfigParser, wanted: list[Requirement], pins: dict[str, str]
) -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    conda = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    [pip] = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert setup_cfg["options"]["python_requires"] == ">=" + conda[0].removeprefix("python=")
    assert pip[0] == "-c constraints.txt"
    pinned = {canonicalize_name(name): version for name, version in (line.split("==") for line in pip if "==" in line)}
    assert pinned.keys() == {canonicalize_name(requirement.name) for requirement in wanted}
    assert pinned == {name: pins[name] for name in pinned}


def test_what_is_installed_is_what_is_pinned(wanted: list[Requirement], pins: dict[str, str]) -> None:
    installed = {name: importlib.metadata.version(name) for name in (requirement.name for requirement in wanted)}
    # the build of torch (+cu130) is not part of its version
    assert {name: version.partition("+")[0] for name, version in installed.items()} == {
        name: pins[canonicalize_name(name)] for name in installed
    }


@pytest.mark.parametrize("options", ["-euo pipefail", "-e"])
def test_the_environment_of_jobs_can_be_sourced_in_strict_scripts(options: str, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/activate").write_text('export ACTIVATED="$NEVER_SET"yes\n')  # as some do
    script = f"set {options}; source {ROOT}/slurm/env.sh; source {ROOT}/slurm/env.sh; false || echo $- $ACTIVATED"
    environment = {"PATH": os.environ["PATH"], "LATENTMILL_VENV": str(tmp_path), "SLURM_CPUS_PER_TASK": "3"}
    said = subprocess.run(
        ["bash", "-c", f"{script} $OMP_NUM_THREADS $SRUN_CPUS_PER_TASK $LATENTMILL_HOME"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    flags, *words = said.stdout.split()
    assert ("u" in flags) == ("u" in options)
    assert words == ["yes", "3", "3", str(ROOT)]
    assert not said.stderr
