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
    found = {requirement.name: requirement for text in texts for requirement in requirements(text)}
    return [requirement for name, requirement in found.items() if name != "latentmill"]  # the extra that has all others


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
    lines = [Requirement(line) for line in pip if "==" in line]
    pinned = {canonicalize_name(line.name): str(line.specifier).removeprefix("==") for line in lines}
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


@pytest.mark.parametrize("contained", [False, True])
def test_an_interpreter_that_cannot_be_run_is_named(contained: bool, tmp_path: Path) -> None:
    """That of a virtual environment is a link, to where another user may not be able to look."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/activate").touch()
    (tmp_path / "bin/python").symlink_to(tmp_path / "somebody/python3.11")
    environment = {"PATH": os.environ["PATH"], "LATENTMILL_VENV": str(tmp_path), "SLURM_JOB_ID": "7"}
    environment |= {"CONTAINER": "apptainer exec image.sif"} if contained else {}
    script = f'set -euo pipefail; source {ROOT}/slurm/env.sh; echo "$LATENTMILL_BROKEN"'
    said = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=True).stdout
    assert said.startswith("" if contained else f"the Python of {tmp_path} cannot be run by user ") and len(said) > 0
    assert (said == "\n") is contained


@pytest.mark.parametrize(
    ("stagger", "rank", "world", "expected"),
    [("20", 999, 1000, ["19"]), ("20", 0, 1000, ["0"]), ("20", 500, 1000, ["10"]), ("0", 500, 1000, [])],
)
def test_ranks_of_a_large_job_start_one_after_another(
    tmp_path: Path, stagger: str, rank: int, world: int, expected: list[str]
) -> None:
    (tmp_path / "sleep").write_text(f'#!/bin/sh\necho "$1" >> {tmp_path}/slept\n')
    (tmp_path / "sleep").chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "x", "SLURM_NNODES": "1", "SLURM_NTASKS": "1"}
    job |= {"SLURM_JOB_NODELIST": "a", "LOGS": str(tmp_path / "logs"), "LATENTMILL_HOME": str(ROOT)}
    job |= {"LM_STAGGER": stagger, "LM_WORLD": str(world), "LM_FIRST": "0", "LM_EACH": "1", "LM_PYTHON": ""}
    job |= {"SLURM_PROCID": str(rank), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    script = f'source {ROOT}/slurm/job.sh > /dev/null; lm_last=1; exec bash -c "$lm_task" task echo started'
    said = subprocess.run(["bash", "-c", script], env=job, capture_output=True, text=True, check=True).stdout
    slept = tmp_path / "slept"
    assert said == "started\n"
    assert (slept.read_text().split() if slept.exists() else []) == expected
