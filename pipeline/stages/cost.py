"""stage=cost: estimate the cost of training with a recipe."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any

from pipeline.config import cli
from pipeline.config.cli import config_for, errors_as_one_line
from pipeline.config.schema import ConfigError, CostConfig, TrainConfig
from pipeline.registry import stages

if TYPE_CHECKING:
    from pipeline.models.dit import DiT

PEAKS = {"a100": 312e12, "h100": 989e12, "h200": 989e12, "b200": 2250e12}
"""Peak dense bfloat16 throughput in FLOP/s, from the vendors' data sheets."""
_STATE_BYTES = 20  # per parameter: float32 weight, gradient, both AdamW moments, moving average
_ACTIVATION_BYTES = 2


@dataclass(frozen=True)
class Cost:
    """Estimated cost of one training phase.

    Attributes:
        tokens: tokens per image that pass through the backbone.
        flops: FLOPs per image of a training step: a forward pass, and a backward pass at twice its cost.
        memory: bytes on each GPU, without allocator overhead.
        speed: images per second and GPU.
        hours: GPU hours in total.
    """

    phase: str
    steps: int
    batch: int
    resolution: int
    tokens: int
    parameters: int
    flops: float
    memory: float
    speed: float
    gpus: int
    price: float

    @property
    def images(self) -> int:
        return self.steps * self.batch

    @property
    def hours(self) -> float:
        return self.images / self.speed / 3600

    @property
    def money(self) -> float:
        return self.hours * self.price


@stages.register("cost", CostConfig)
def main(config: CostConfig) -> None:
    with errors_as_one_line():
        print(table(list(costs(config)), config))


def costs(config: CostConfig) -> Iterator[Cost]:
    """Yield the cost of each phase, in order.

    Raises:
        ConfigError: the recipe or phase is unknown, or the settings do not suit it.
    """
    every = cli.phases_of(config.recipe) or [""]
    if config.phase and config.phase not in every:
        raise ConfigError(f"phase={config.phase}: {cli.nearest(config.phase, every)}")
    phases = [config.phase] if config.phase else every
    measured = config.images_per_second
    if measured and len(measured) != len(phases):
        raise ConfigError(f"images_per_second={list(measured)}: expected {len(phases)} numbers, one for each phase")
    for number, phase in enumerate(phases):
        settings = cli.load("train", [f"recipe={config.recipe}", f"phase={phase}"])
        yield cost_of(phase, settings, config, measured[number] if measured else 0.0)


def cost_of(phase: str, settings: TrainConfig, config: CostConfig, measured: float) -> Cost:
    """Cost of one phase; ``measured``: images per second on one GPU, 0 if unknown."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from pipeline.models.dit import DiT, dit_config, kept_tokens

    if len(config.caption_shape) != 2:
        raise ConfigError(f"caption_shape={list(config.caption_shape)}: expected [length,width]")
    edge = settings.resolution // config.downsample
    length, width = config.caption_shape
    shape = dit_config(settings.model, (config.channels, edge, edge), (length, width))
    kept = kept_tokens(shape.tokens, settings.mask_ratio)
    with torch.device("meta"):
        model = DiT(shape)
    with FakeTensorMode(
        allow_non_fake_inputs=True
    ):  # as on a CPU, where attention, like the GPU kernels, saves no weights for the backward pass
        model.to_empty(device="cpu")
        operations, saved = _measure(model, kept if kept < shape.tokens else 0)
    parameters = sum(p.numel() for p in model.parameters())
    per_gpu = ceil(settings.batch_size / config.gpus)
    micro = min(settings.micro_batch or per_gpu, per_gpu)
    state = _STATE_BYTES * parameters / (config.gpus if settings.parallel == "fsdp" else 1)
    return Cost(
        phase=phase,
        steps=settings.steps,
        batch=settings.batch_size,
        resolution=settings.resolution,
        tokens=kept,
        parameters=parameters,
        flops=3 * operations,
        memory=state + micro * saved * _ACTIVATION_BYTES,
        speed=measured or config.mfu * PEAKS[config.gpu] / (3 * operations),
        gpus=config.gpus,
        price=config.gpu_hour_price,
    )


def _measure(model: DiT, kept: int) -> tuple[int, int]:
    """FLOPs of a forward pass on one image, and the number of elements it saves for the backward pass."""
    import torch

    from pipeline.training.loggers import flop_counter

    shape = model.config
    given: dict[str, Any] = {
        "x": torch.empty(1, shape.channels, shape.height, shape.width),
        "t": torch.empty(1),
        "text": torch.empty(1, shape.text_length, shape.text_width),
    }
    if kept:
        given["keep"] = torch.empty(1, kept, dtype=torch.int64)
    weights = {id(p) for p in model.parameters()} | {id(p) for p in model.buffers()}
    saved: dict[int, int] = {}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        base = tensor if tensor._base is None else tensor._base  # views share storage with their base
        if id(base) not in weights:
            saved[id(base)] = base.numel()
            alive.append(base)
        return tensor

    alive: list[torch.Tensor] = []  # keeps tensors alive, so that no id is reused
    with (
        flop_counter() as counter,
        torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor),
    ):
        model(**given)
    return counter.get_total_flops(), sum(saved.values())


def table(phases: list[Cost], config: CostConfig) -> str:
    """Format the costs as a text table."""
    how = "as measured" if config.images_per_second else f"at {config.mfu:.0%} of the peak"
    lines = [
        f"{config.recipe} on {config.gpus} x {config.gpu}, {how}: {phases[0].parameters / 1e9:.2f} billion parameters",
        "",
        f"{'phase':<12} {'steps':>8} {'batch':>6} {'px':>4} {'tokens':>6} {'images':>8} {'GFLOP/image':>11} "
        f"{'GB/GPU':>7} {'images/s':>8} {'GPU hours':>9} {'days':>6} {'cost':>8}",
    ]
    lines += [
        f"{c.phase or '-':<12} {c.steps:>8,} {c.batch:>6,} {c.resolution:>4} {c.tokens:>6} {c.images / 1e6:>7.1f}M "
        f"{c.flops / 1e9:>11,.0f} {c.memory / 1e9:>7.1f} {c.speed * c.gpus:>8,.0f} {c.hours:>9,.1f} "
        f"{c.hours / c.gpus / 24:>6.2f} {c.money:>8,.0f}"
        for c in phases
    ]
    hours, money = sum(c.hours for c in phases), sum(c.money for c in phases)
    images = sum(c.images for c in phases)
    tokens = sum(c.images * c.tokens for c in phases)
    total = f"{'all':<12} {sum(c.steps for c in phases):>8,} {'':>6} {'':>4} {'':>6} {images / 1e6:>7.1f}M {'':>11} "
    lines += [f"{total}{'':>7} {'':>8} {hours:>9,.1f} {hours / config.gpus / 24:>6.2f} {money:>8,.0f}"]
    lines += [
        "",
        f"{tokens / 1e9:,.0f} billion tokens through the backbone. GB/GPU: state and activations, without overhead.",
    ]
    if published := cli.published_of(config.recipe):
        lines += [f"published: {published}"]
    return "\n".join(lines)


if __name__ == "__main__":
    main(config_for("cost"))
