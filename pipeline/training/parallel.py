"""Distribution of a model over devices: precision, replication or sharding, and compiled or checkpointed blocks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from pipeline.config.schema import ConfigError, TrainConfig
from pipeline.distributed import Rank
from pipeline.encoders.base import allow_graphs

PRECISIONS = ("float32", "tf32", "bfloat16")


def check_parallel(config: TrainConfig, rank: Rank) -> None:
    """Check that the settings of this module fit together.

    Raises:
        ConfigError: names the settings that do not.
    """
    if config.parallel == "hsdp" and rank.world_size % rank.local_world_size:
        raise ConfigError(
            f"parallel=hsdp: {rank.world_size} ranks do not divide into nodes of {rank.local_world_size}: start as "
            "many on each node"
        )
    if config.precision == "tf32" and rank.device.type != "cuda":
        raise ConfigError("precision=tf32: needs a GPU; leave it out, or give float32")


# ---- precision


def precision_of(wanted: str, device: torch.device, before: str = "") -> str:
    """Resolve ``precision=wanted`` to a name in :data:`PRECISIONS`: "auto" is the precision that the run was started
    with (``before``), else bfloat16 on a GPU that supports it, else tf32, and float32 on a CPU."""
    if wanted != "auto":
        return wanted
    if before:
        return before
    if device.type != "cuda":
        return "float32"
    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "tf32"


def set_matmul_precision(precision: str, device: torch.device) -> None:
    """On a GPU, use TF32 for float32 matrix products, unless ``precision`` is float32."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("highest" if precision == "float32" else "high")


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """A context for mixed precision: parameters stay float32; with bfloat16, suitable operations use it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


# ---- blocks


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks of a model: members of all module lists named ``blocks``, also in submodules."""
    lists = [part for name, part in model.named_modules() if name.rpartition(".")[2] == "blocks"]
    return [block for part in lists if isinstance(part, nn.ModuleList) for block in part]


def checkpoint_activations(model: nn.Module) -> None:
    """Recompute the activations of each block in the backward pass instead of storing them.

    Raises:
        ConfigError: the model has no blocks.
    """
    for block in _required(blocks_of(model), "checkpoint_activations"):
        block.forward = _checkpointed(block.forward)


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def again(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return again


def compile_blocks(model: nn.Module, **options: Any) -> None:
    """Compile each block separately with torch.compile: equal blocks share a graph, which takes a fraction of the time
    for the whole model. A model without blocks is compiled as a whole. Wrappers such as FSDP are not compiled.

    Args:
        options: of torch.compile.
    """
    blocks = blocks_of(model)
    allow_graphs(4 * len(blocks) + 8)  # all blocks share one code object
    for part in blocks or [model]:
        part.forward = torch.compile(part.forward, **options)


def _required(blocks: list[nn.Module], name: str) -> list[nn.Module]:
    if not blocks:
        raise ConfigError(f"{name}=true: this model has no blocks")
    return blocks


# ---- ranks


def shard(model: nn.Module, config: TrainConfig, rank: Rank, precision: str) -> None:
    """FSDP2: shard parameters, gradients and optimizer state over the ranks, block by block; with parallel=hsdp over
    the ranks of a node, and replicated across nodes.

    On a GPU with bfloat16, parameters are gathered in bfloat16 and gradients reduced in float32. Scans keep their
    parameters in float32, as rounding would change the decay rates.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = _mesh(config, rank)
    exact = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    policy = exact
    if precision == "bfloat16" and rank.device.type == "cuda":
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    options: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": config.reshard_after_forward}
    for scan in _scans(model):
        fully_shard(scan, mp_policy=exact, **options)
    for block in blocks_of(model):
        fully_shard(block, mp_policy=policy, **options)
    fully_shard(model, mp_policy=policy, **options)


def _scans(model: nn.Module) -> list[nn.Module]:
    from pipeline.models.ssm import Mixer

    return [part for part in model.modules() if isinstance(part, Mixer)]


def _mesh(config: TrainConfig, rank: Rank) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    rank.process_group()
    if config.parallel == "fsdp":
        return init_device_mesh(rank.device.type, (rank.world_size,))
    nodes = rank.world_size // rank.local_world_size
    return init_device_mesh(rank.device.type, (nodes, rank.local_world_size), mesh_dim_names=("replicate", "shard"))


def wrapped(model: nn.Module, config: TrainConfig, rank: Rank) -> nn.Module:
    """Wrap the model to average gradients over the ranks, unless it is sharded."""
    if rank.world_size == 1 or config.parallel != "ddp":
        return model
    rank.process_group()
    device_ids = [rank.device] if rank.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=device_ids, broadcast_buffers=False)


def communicating(network: nn.Module, model: nn.Module, last: bool) -> AbstractContextManager[None]:
    """A context that synchronizes gradients between ranks only for the last part of a step's batch."""
    if isinstance(network, DistributedDataParallel) and not last:
        return network.no_sync()
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(last)  # type: ignore[operator]
    return nullcontext()
