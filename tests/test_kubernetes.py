"""The manifests of docs/kubernetes: rendered, checked against Kubernetes' schema, and run as their pods would run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from string import Template
from typing import Any

import kubernetes_validate
import pytest
import yaml

from pipeline.config.schema import MAIN_LINE, traits_of
from pipeline.distributed import find_place
from pipeline.distributed.signals import EXIT_STOPPED
from pipeline.partitions.dataset import Dataset

FOLDER = Path(__file__).parents[1] / "docs/kubernetes"
COMMON = {"CPUS": "8", "MEMORY": "16Gi", "IMAGE": "registry/latentmill", "CLAIM": "data"}
STAGE = COMMON | {
    "STAGE": "filter",
    "RANKS": "3",
    "PARALLEL": "2",
    "GPUS": "0",
    "ARGUMENTS": "dataset=mine data_dir=/data",
}
TRAIN = COMMON | {"NODES": "2", "GPUS": "8", "ARGUMENTS": "task=diffuse dataset=mine data_dir=/data"}
VERSIONS = ["1.31", "1.37"]


def rendered(name: str, values: dict[str, str]) -> list[dict[str, Any]]:
    """As envsubst does it: of variables in braces those that are exported, and nothing else."""
    text = (FOLDER / name).read_text()
    wanted = set(re.findall(r"\$\{(\w+)\}", text))
    assert wanted == values.keys(), "the head of the file names what it takes"
    for variable in wanted:
        assert re.search(rf"^#   export .*\b{variable}=", text, re.MULTILINE), variable
    return list(yaml.safe_load_all(Template(text).safe_substitute(values)))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("name", "values"), [("stage.yaml", STAGE), ("train.yaml", TRAIN)])
def test_manifests_are_what_kubernetes_takes(name: str, values: dict[str, str], version: str) -> None:
    for document in rendered(name, values):
        kubernetes_validate.validate(document, version, strict=True)


@pytest.mark.parametrize("stage", [stage for stage in MAIN_LINE if not traits_of(stage).lockstep])
def test_each_stage_makes_a_job_of_its_own_name(stage: str) -> None:
    (job,) = rendered("stage.yaml", STAGE | {"STAGE": stage})
    assert job["metadata"]["name"] == f"latentmill-{stage}"
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["command"][-1] == f"exec python -m pipeline.stages.{stage} {STAGE['ARGUMENTS']}"


def test_a_stopped_rank_is_started_again_and_a_wrong_setting_is_not() -> None:
    for name, values in (("stage.yaml", STAGE), ("train.yaml", TRAIN)):
        job = rendered(name, values)[-1]
        rules = job["spec"]["podFailurePolicy"]["rules"]
        fail = next(rule for rule in rules if rule["action"] == "FailJob")
        assert fail["onExitCodes"]["values"] == [2] and EXIT_STOPPED not in fail["onExitCodes"]["values"]
        assert job["spec"]["template"]["spec"]["restartPolicy"] == "Never"  # a policy for failures asks for it


def test_training_meets_at_the_first_pod() -> None:
    service, job = rendered("train.yaml", TRAIN)
    pod = job["spec"]["template"]
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    assert pod["spec"]["subdomain"] == service["metadata"]["name"]
    command = pod["spec"]["containers"][0]["command"][-1]
    # an indexed Job calls its pods <job>-<index>, below the name of the service
    assert f"--master-addr={job['metadata']['name']}-0.{service['metadata']['name']} " in command
    assert "--nnodes=2 --nproc-per-node=8" in command and '--node-rank="$JOB_COMPLETION_INDEX"' in command


def test_the_pods_of_a_stage_share_its_work(tmp_path: Path) -> None:
    """Each command of a pod with what Kubernetes and the manifest set, one after the other."""
    arguments = f"source=shapes count=30 partition_size=5 output={tmp_path}/raw"
    (job,) = rendered("stage.yaml", STAGE | {"STAGE": "download", "ARGUMENTS": arguments})
    (container,) = job["spec"]["template"]["spec"]["containers"]
    own = {entry["name"]: entry["value"] for entry in container["env"]} | {"HF_HOME": str(tmp_path)}
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    python = f"{Path(sys.executable).parent}:{kept['PATH']}"
    seen = []
    for index in range(job["spec"]["completions"]):
        environment = kept | own | {"JOB_COMPLETION_INDEX": str(index), "PATH": python}
        place = find_place(environment)
        seen.append((place.rank, place.world_size))
        subprocess.run(container["command"], env=environment, cwd=FOLDER.parents[1], check=True, timeout=120)
    assert seen == [(0, 3), (1, 3), (2, 3)]
    assert Dataset.open(tmp_path / "raw").require_success()["counts"]["kept"] == 30
