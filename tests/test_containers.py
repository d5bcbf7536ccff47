"""Jobs in containers: what apptainer, singularity and pyxis are asked for, by stand-ins for them and for srun."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launch.request import read
from launch.script import Script
from pipeline.config.schema import ConfigError

ROOT = Path(__file__).parents[1]
# as srun does: its own options first, then the command; %x and %j of --output are not expanded
SRUN = """#!/usr/bin/env bash
echo "srun $*" >> "$SEEN"
while [[ $1 = --* ]]; do shift; done
exec "$@"
"""
# as apptainer does: exec, options (--bind has a value), the image, the command
RUNTIME = """#!/usr/bin/env bash
echo "${0##*/} $*" >> "$SEEN"
[ "$1" = exec ] || exit 64
shift
while [[ $1 = --* ]]; do [ "$1" != --bind ] || shift; shift; done
[ "$1" = image.sif ] || exit 65
shift
exec "$@"
"""
TASK = """#!/usr/bin/env bash
echo "task $* gpus=${NVIDIA_VISIBLE_DEVICES:-none} flight=$TORCH_FR_DUMP_TEMP_FILE" >> "$SEEN"
: > "$LATENTMILL_LIFE/0.0"
"""


def run_job(folder: Path, before: str, **environment: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """A job script of one task in ``folder``; how it ended, and what srun, the runtime and the task saw."""
    (folder / "bin").mkdir()
    for name, text in (("srun", SRUN), ("apptainer", RUNTIME), ("singularity", RUNTIME), ("task", TASK)):
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    script = f"set -euo pipefail\n{before}\nsource {ROOT}/slurm/env.sh\nsource {ROOT}/slurm/job.sh\nrun task x=1\n"
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "filter", "SLURM_NTASKS": "1", "SLURM_NNODES": "1"}
    job |= {"SLURM_JOB_NODELIST": "a", "LOGS": str(folder / "logs"), "SEEN": str(folder / "seen"), "LOOK": "0.1"}
    job |= {"PATH": f"{folder}/bin:{os.environ['PATH']}", "LATENTMILL_VENV": sys.prefix}
    ended = subprocess.run(
        ["bash", "-c", script], env=job | environment, cwd=folder, capture_output=True, text=True, check=False
    )
    return ended, (folder / "seen").read_text().splitlines() if (folder / "seen").exists() else []


@pytest.mark.parametrize("runtime", ["apptainer", "singularity"])
@pytest.mark.parametrize(
    ("gpus", "options", "expected"),
    [
        ({"SLURM_GPUS_ON_NODE": "4"}, "", "exec --nv --bind {binds} image.sif"),
        ({"SLURM_GPUS_ON_NODE": "4"}, "--nv ", "exec --bind {binds} --nv image.sif"),
        ({"SLURM_GPUS_ON_NODE": "4"}, "--rocm ", "exec --bind {binds} --rocm image.sif"),
        ({"SLURM_GPUS_ON_NODE": "0"}, "", "exec --bind {binds} image.sif"),
        ({}, "", "exec --bind {binds} image.sif"),
    ],
)
def test_a_container_sees_the_gpus_the_checkout_the_logs_and_the_data(
    tmp_path: Path, runtime: str, gpus: dict[str, str], options: str, expected: str
) -> None:
    ended, seen = run_job(tmp_path, "", CONTAINER=f"{runtime} exec {options}image.sif", BINDS="/data,/more", **gpus)
    assert ended.returncode == 0, ended.stderr
    binds = f"{ROOT},{tmp_path}/logs,/data,/more"
    assert seen[1] == f"{runtime} {expected.format(binds=binds)} task x=1"
    assert seen[2] == f"task x=1 gpus=none flight={tmp_path}/logs/.filter-7/0.0/flight-"


@pytest.mark.parametrize("gpus", ["2", "0"])
def test_pyxis_is_told_mounts_and_enroot_the_gpus(tmp_path: Path, gpus: str) -> None:
    environment = {"SRUN_ARGS": "--mpi=none --container-image=a.sqsh", "SLURM_GPUS_ON_NODE": gpus, "BINDS": "/data"}
    ended, seen = run_job(tmp_path, "", **environment)
    assert ended.returncode == 0, ended.stderr
    assert f"--mpi=none --container-image=a.sqsh --container-mounts={ROOT},{tmp_path}/logs,/data task x=1" in seen[0]
    assert f"gpus={'none' if gpus == '0' else 'all'}" in seen[1]


def test_without_a_container_nothing_changes(tmp_path: Path) -> None:
    ended, seen = run_job(tmp_path, "", SLURM_GPUS_ON_NODE="2")
    assert ended.returncode == 0, ended.stderr
    assert " ".join(seen).endswith(f" task task x=1 task x=1 gpus=none flight={tmp_path}/logs/.filter-7/0.0/flight-")


def test_a_container_command_that_is_none_is_refused(tmp_path: Path) -> None:
    ended, seen = run_job(tmp_path, "", CONTAINER="apptainer image.sif")
    assert (ended.returncode, seen) == (2, [])
    assert "CONTAINER=apptainer image.sif: expected '… exec [options] image'" in ended.stderr


def test_a_site_with_containers_only_needs_no_python_outside(tmp_path: Path) -> None:
    tools = ("awk", "bash", "cat", "date", "dirname", "find", "grep", "hostname", "kill", "mkdir", "mktemp", "readlink")
    for name in (*tools, "realpath", "rm", "sleep", "sort", "stat", "tail", "tee", "tr", "wc"):
        path = next(Path(folder, name) for folder in ("/usr/bin", "/bin") if Path(folder, name).exists())
        (tmp_path / "tools").mkdir(exist_ok=True)
        (tmp_path / "tools" / name).symlink_to(path)
    path = f"PATH={tmp_path}/bin:{tmp_path}/tools"
    ended, seen = run_job(tmp_path, path, CONTAINER="apptainer exec image.sif", LATENTMILL_VENV="/nowhere")
    assert ended.returncode == 0, ended.stderr
    assert seen[-1].startswith("task x=1")
    (tmp_path / "again").mkdir()
    ended, seen = run_job(tmp_path / "again", f"PATH={tmp_path}/again/bin:{tmp_path}/tools", LATENTMILL_VENV="/nowhere")
    assert (ended.returncode, seen) == (78, [])
    assert "no Python environment at LATENTMILL_VENV=/nowhere on" in ended.stdout


def test_collectives_are_recorded_and_torch_ends_ranks_as_it_sees_fit(tmp_path: Path) -> None:
    names = "TORCH_FR_BUFFER_SIZE TORCH_NCCL_DUMP_ON_TIMEOUT TORCH_NCCL_ASYNC_ERROR_HANDLING"
    show = f"source {ROOT}/slurm/env.sh; for name in {names}; do echo $name=${{!name:-}}; done; exit"
    expected = {
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "",
    }
    for number, own in enumerate(({}, {"TORCH_FR_BUFFER_SIZE": "9"})):
        (tmp_path / str(number)).mkdir()
        ended, _ = run_job(tmp_path / str(number), show, **own)
        assert dict(line.split("=") for line in ended.stdout.split()) == expected | own


# ---- what the launcher writes


def script(*arguments: str) -> Script:
    launch = read(["stage=shard", "cluster=slurm", *arguments])
    settings = tuple(f"{key}={value}" for key, value in launch.settings.items())
    return Script("shard", "shard-1", "", settings, Path("/logs"), launch.requests["shard"])


def test_the_folders_of_a_stage_are_bound(tmp_path: Path) -> None:
    (tmp_path / "data/in").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    places = [f"data_dir={tmp_path}/data", f"input={tmp_path}/data/in", f"output={tmp_path}/other"]
    text = script(*places, "container=/i/a.sif").text
    assert f"export BINDS={tmp_path}/data,{tmp_path}/other" in text.splitlines()
    assert "BINDS" not in script(*places).text
    assert "BINDS" not in script("input=https://example.org/a,b.tar", "output=/not/there", "container=a.sif").text


def test_a_folder_that_cannot_be_bound_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a,b").mkdir()
    with pytest.raises(ConfigError, match="container=a.sif: cannot bind .*a,b': rename this folder"):
        _ = script(f"data_dir={tmp_path}/a,b", "container=a.sif").text


# ---- recipes of images


def recipe_files(name: str) -> set[str]:
    """What a recipe copies from the checkout."""
    lines = (ROOT / "slurm/container" / name).read_text().splitlines()
    if name == "Dockerfile":
        return {word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]}
    begin = lines.index("%files") + 1
    return {line.split()[0] for line in lines[begin : lines.index("", begin)]}


def test_both_recipes_make_the_same_image() -> None:
    docker, apptainer = ((ROOT / "slurm/container" / name).read_text() for name in ("Dockerfile", "latentmill.def"))
    assert recipe_files("Dockerfile") == recipe_files("latentmill.def")
    for name in recipe_files("Dockerfile"):
        assert (ROOT / name).exists(), name
    base = re.search(r"^FROM (\S+)$", docker, re.MULTILINE)
    assert base is not None and f"From: {base[1]}\n" in apptainer
    assert "slurm/container/install.sh" in docker and "slurm/container/install.sh" in apptainer


def test_images_get_the_packages_of_make_setup() -> None:
    install = ROOT / "slurm/container/install.sh"
    subprocess.run(["bash", "-n", install], check=True)
    assert os.access(install, os.X_OK)
    version = re.search(r"^UV_VERSION \?= (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert version is not None and f"UV_VERSION:={version[1]}" in install.read_text()
    assert "-r constraints.txt" in install.read_text() and "--no-deps" in install.read_text()


def test_a_node_without_the_python_of_earlier_lives_does_not_take_another_one(tmp_path: Path) -> None:
    state = tmp_path / "logs/.filter-7"
    state.mkdir(parents=True)
    (state / "python").write_text("/shared/latentmill/.venv/bin/python\n")
    ended, seen = run_job(tmp_path, "", SLURM_RESTART_COUNT="1")
    assert (ended.returncode, seen) == (78, [])
    assert "there is no /shared/latentmill/.venv/bin/python, which earlier lives used, on " in ended.stdout
