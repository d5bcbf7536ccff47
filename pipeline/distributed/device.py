"""The device of a rank: its GPU, or the CPU if it has none or with ``device=cpu``.

A rank that was allocated GPUs but cannot use them must not fall back to the CPU: it would take days instead of minutes,
with settings such as ``model_dtype=bfloat16`` that are meant for GPUs.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config.schema import ConfigError

if TYPE_CHECKING:
    import torch

_NONE = ("", "-1", "none", "void", "nodevfiles")  # values of CUDA_VISIBLE_DEVICES that hide every GPU
_CONTAINERS = {"APPTAINER_CONTAINER": "apptainer", "SINGULARITY_CONTAINER": "singularity"}


def choose_device(wanted: str, local_rank: int, node: str, environment: Mapping[str, str] = os.environ) -> torch.device:
    """The device of the rank with number ``local_rank`` on its node.

    Args:
        wanted: ``auto``, ``cpu`` or ``cuda``: the value of the option ``device=``.
        node: name of the node, for the error message.
        environment: environment variables of the launcher.

    Raises:
        ConfigError: GPUs were allocated or requested, but torch sees none.
    """
    import torch

    if wanted == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count:
        return torch.device("cuda", local_rank % count)  # with `srun --gpus-per-task=1`, each task sees only one GPU
    given = "device=cuda needs a GPU" if wanted == "cuda" else gpus_given(environment)
    if given:
        raise ConfigError(
            f"{given}, but torch sees none on {node}: {why_no_gpu(environment)}; device=cpu computes on the CPU"
        )
    return torch.device("cpu")


def isolation_cost(visible: int, local_world_size: int) -> str:
    """A warning if each rank of a node sees only one GPU, which makes NCCL slower; otherwise empty.

    Args:
        visible: GPUs that this rank sees.
        local_world_size: ranks on this node.
    """
    if visible != 1 or local_world_size == 1:
        return ""
    return (
        f"each of the {local_world_size} ranks of a node sees a single GPU (srun --gpus-per-task, --gpu-bind): NCCL "
        "cannot copy over NVLink between them then; ask for GPUs by node (gpus_per_node=)"
    )


def gpus_given(environment: Mapping[str, str]) -> str:
    """What allocated GPUs to this process, as the beginning of a sentence; empty if it has none."""
    count = environment.get("SLURM_GPUS_ON_NODE", "")
    if count not in ("", "0"):
        return f"SLURM gave this job {count} GPU{'s' * (count != '1')}"
    for name in ("SLURM_STEP_GPUS", "SLURM_JOB_GPUS"):
        if environment.get(name):
            return f"SLURM gave this job GPUs ({name}={environment[name]})"
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    return "" if visible.strip().lower() in _NONE else f"CUDA_VISIBLE_DEVICES={visible} names GPUs"


def why_no_gpu(environment: Mapping[str, str]) -> str:
    """The likely reason why torch sees no GPU, and what to do."""
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built without CUDA: install a build with it"
    if "CUDA_VISIBLE_DEVICES" in environment and environment["CUDA_VISIBLE_DEVICES"].strip().lower() in _NONE:
        return f"CUDA_VISIBLE_DEVICES={environment['CUDA_VISIBLE_DEVICES']!r} hides all of them"
    if not Path("/dev/nvidiactl").exists() and not Path("/dev/kfd").exists():
        runtime = next((name for variable, name in _CONTAINERS.items() if variable in environment), "")
        if runtime:
            return f"{runtime} runs without --nv (container_args=--nv)"
        return "there is no /dev/nvidiactl: no driver is loaded, or the container was started without its GPUs"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).partition("\n")[0].rstrip(".")
    return "run nvidia-smi there"
