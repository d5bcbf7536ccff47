"""Text-to-image generation: diffusion on latents."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pipeline.config.schema import ConfigError, DiffuseOptions, TrainConfig
from pipeline.encoders.base import autoencoder, to_pixels
from pipeline.imaging.contact_sheet import on_one_canvas
from pipeline.loading import Batches
from pipeline.models.constants import channels
from pipeline.models.diffusion_process import Process, process_of
from pipeline.models.dit import DiT, DiTConfig, dit_config, kept_tokens, patchify, take
from pipeline.models.sampling import sample
from pipeline.partitions.dataset import Dataset
from pipeline.partitions.stage import input_folder, open_input
from pipeline.randomness import generator, keyed_seed, normals
from pipeline.registry import tasks
from pipeline.training.feed import Picked, shape_ranges, some, split
from pipeline.training.stored_latents import LatentInfo as LatentInfo
from pipeline.training.stored_latents import is_foreign, latents_of
from pipeline.training.tasks.base import Batch, Keys, Task

_MEASURED = 1024  # samples that the normalisation is computed from
_EVALUATED = 256  # samples that the loss is evaluated on, if there is no validation set
_QUARTERS = 4
_EDGE = 0.005  # fraction at both ends of the distribution of levels that is left out of metrics
_CACHED_TOKENS = 2048  # fewer make matrix products inefficiently small, more do not fit into the caches
_GOLDEN = (5**0.5 - 1) / 2  # its multiples modulo 1 are evenly distributed


@dataclass(frozen=True)
class Normalisation:
    """Normalises stored latents to zero mean per channel and unit mean square over all channels, and back.

    All channels share one scale, so that their relative magnitudes stay as the autoencoder makes them.
    """

    mean: tuple[float, ...]
    scale: float

    @classmethod
    def measure(cls, latents: Tensor) -> Normalisation:
        """Compute from latents (n, c, ...)."""
        exact = latents.double()
        mean = exact.transpose(0, 1).flatten(1).mean(1) if exact.dim() == 3 else exact.mean((0, 2, 3))
        scale = (exact - mean.view(1, -1, *[1] * (exact.dim() - 2))).square().mean().sqrt()
        return cls(tuple(round(m, 6) for m in mean.tolist()), round(max(float(scale), 1e-6), 6))

    def apply(self, latents: Tensor) -> Tensor:
        return (latents - self._means(latents)) / self.scale

    def invert(self, x: Tensor) -> Tensor:
        return x * self.scale + self._means(x)

    def _means(self, like: Tensor) -> Tensor:
        return channels(self.mean, like.dtype, like.device)


@tasks.register("diffuse", DiffuseOptions)
class Diffuse(Task):
    """A :class:`DiT` that learns to remove noise from image latents, given text states."""

    name = "diffuse"
    model: DiT

    @classmethod
    def input(cls, config: TrainConfig) -> Dataset | None:
        """Latents; None: an MDS folder that was not written by a stage."""
        return None if is_foreign(input_folder(config, "train")) else open_input(config, "train")

    @classmethod
    def from_config(
        cls, config: TrainConfig, dataset: Dataset | None, device: str | torch.device = "cpu"
    ) -> tuple[Task, Batches, Batches | None]:
        data, info = latents_of(config, dataset.root.path if dataset else input_folder(config, "train"))
        task = cls(config, data, info)
        if config.valid_fraction:
            return task, *split(data, config.valid_fraction, config.seed)
        if getattr(data, "stream", None):  # remote data: samples from few shards
            return task, data, Picked(data, np.arange(min(_EVALUATED, len(data))))
        return task, data, some(data, _EVALUATED, config.seed)

    def __init__(self, config: TrainConfig, data: Batches, info: LatentInfo) -> None:
        self.info = info
        self.drop = config.caption_drop
        self.process = process_of(
            {"name": config.process, "mean": config.noise_mean, "std": config.noise_std}
            | ({"sigma_data": config.sigma_data} if config.process == "edm" else {})
        )
        torch.manual_seed(keyed_seed(config.seed, "weights"))
        network = dit_config(config.model, info.image_shape, info.caption_shape)
        self.model = DiT(replace(network, size_condition=config.size_condition))
        self.mask_ratio = config.mask_ratio
        self.kept = kept_tokens(network.tokens, config.mask_ratio)
        self.size_condition, self.patch = config.size_condition, network.patch
        if config.start_from:
            self.normalisation = start_from(config.start_from, self.model, self.process)
        else:
            batches = [batch["image_latents"] for batch in _first(data, config.seed, _MEASURED)]
            latents = [batch.chunk(2, 1)[0] if info.moments else batch for batch in batches]
            self.normalisation = Normalisation.measure(latents[0] if len(latents) == 1 else _of_all_shapes(latents))
        self._shown = _first(data, config.seed, config.show) if config.show else []

    def prepare(self, batch: Batch, keys: Keys) -> Batch:
        """Normalise latents and draw the random part of a step, see :class:`Drawn`.

        ``x``: normalised latents (b, c, h, w); from stored moments, a new sample at every step. ``text``: as stored. In
        an evaluation, levels are spread as in training, noise is fixed, and nothing is dropped or masked; ``quarter``
        (b,) is the quarter of the level, 0 (clean) to 3.
        """
        latents = batch["image_latents"]
        x = self.normalisation.apply(posterior_sample(latents, keys) if self.info.moments else latents)
        shape = tuple(x.shape[1:])
        prepared = {"x": x, "text": batch["caption_latents"]}
        if self.size_condition:
            prepared["sizes"] = self._sizes(batch)
        if keys.step >= 0:
            tokens = shape[1] * shape[2] // self.patch**2
            kept = kept_tokens(tokens, self.mask_ratio)
            drawn = draw(keys, shape, self.drop, self.process, tokens, kept)
            return prepared | drawn.to_dict()
        drawn = draw(keys, shape, 0.0, self.process)
        place = torch.from_numpy((keys.slots * _GOLDEN + 0.5) % 1).clamp(_EDGE, 1 - _EDGE)
        levels = self.process.levels(torch.special.ndtri(place).float())
        drawn = replace(drawn, levels=levels, drop=torch.zeros_like(drawn.drop))
        return prepared | drawn.to_dict() | {"quarter": (place * _QUARTERS).long()}

    def _sizes(self, batch: Batch) -> Tensor:
        """Float32 (b, 6), see :class:`pipeline.models.dit.SizeCondition`; square latents are treated as uncropped."""
        if "size_conditions" in batch:
            return batch["size_conditions"]
        edge = float(self.info.resolution)
        return torch.tensor([edge, edge, 0.0, 0.0, edge, edge]).repeat(len(batch["image_latents"]), 1)

    def losses(self, network: nn.Module, batch: Batch, keys: Keys) -> Tensor:
        """Mean squared error of the prediction, (b,), at random levels, with dropped captions and masked tokens."""
        drawn = Drawn(batch["levels"], batch["noise"], batch["drop"], batch.get("keep"))
        text = batch["text"].float()  # converted on the device
        patch, sizes = self.model.config.patch, batch.get("sizes")
        return diffusion_losses(network, self.process, batch["x"], text, drawn, patch, sizes)

    def measure(self, network: nn.Module, batch: Batch, keys: Keys) -> dict[str, tuple[Tensor, Tensor]]:
        """``valid_loss``, and ``loss_t1`` to ``loss_t4`` for each quarter of the levels, clean to noisy."""
        losses = self.losses(network, batch, keys)
        parts = {f"loss_t{q + 1}": (losses, (batch["quarter"] == q).float()) for q in range(_QUARTERS)}
        return {"valid_loss": (losses, torch.ones_like(losses)), **parts}

    def pictures(self, network: nn.Module | None) -> npt.NDArray[Any] | None:
        """The first ``show`` samples of the first epoch: decoded as stored, or generated from their texts."""
        if not self._shown:
            return None
        images: list[npt.NDArray[Any]] = []
        for batch in self._shown:
            images += list(self._generated(network, batch, len(images)))
        return on_one_canvas(images)

    def _generated(self, network: nn.Module | None, batch: Batch, first: int) -> npt.NDArray[Any]:
        """Images of a batch, uint8 (b, h, w, 3); ``first``: index of its first image."""
        latents = batch["image_latents"]
        latents = latents.chunk(2, 1)[0] if self.info.moments else latents
        device = next(self.model.parameters()).device
        vae = autoencoder(self.info.autoencoder, device)
        if network is not None:
            shape = tuple(latents.shape[1:])
            noise = np.stack([normals(shape, 0, "shown", first + number) for number in range(len(latents))])
            text = batch["caption_latents"].to(device).float()
            sizes = self._sizes(batch).to(device) if self.size_condition else None
            start = torch.from_numpy(noise).to(device)
            drawn = sample(network, start, text, guidance=1.5, process=self.process, sizes=sizes)
            latents = self.normalisation.invert(drawn.float())
        return to_pixels(vae.decode(latents.to(device).float()))

    def cached(self) -> int:
        return max(1, _CACHED_TOKENS // self.kept)

    def example(self) -> tuple[Any, ...]:
        model = self.model.config
        image, text = torch.zeros(1, *self.info.image_shape), torch.zeros(1, *self.info.caption_shape)
        keep = torch.arange(self.kept)[None] if self.kept < model.tokens else None
        sizes = (torch.zeros(1, 6),) if self.size_condition else ()
        return image, torch.zeros(1), text, None, keep, *sizes

    def facts(self) -> dict[str, Any]:
        return {
            "model": self.model.config.to_dict(),
            "process": self.process.to_dict(),
            "normalisation": asdict(self.normalisation),
            "latents": asdict(self.info),
        }


@dataclass(frozen=True)
class Drawn:
    """The random part of a batch's loss.

    Attributes:
        levels: (b,) noise levels.
        noise: (b, c, h, w).
        drop: (b,) bool, captions that are dropped.
        keep: (b, m) int64, tokens that are not masked; None: all.
    """

    levels: Tensor
    noise: Tensor
    drop: Tensor
    keep: Tensor | None = None

    def to_dict(self) -> Batch:
        """The tensors by name; without ``keep`` if there is no mask."""
        values = {"levels": self.levels, "noise": self.noise, "drop": self.drop}
        return values if self.keep is None else {**values, "keep": self.keep}


def diffusion_losses(
    network: nn.Module,
    process: Process,
    x: Tensor,
    text: Tensor,
    drawn: Drawn,
    patch: int = 2,
    sizes: Tensor | None = None,
) -> Tensor:
    """Squared error of the network's prediction for noisy ``x`` (b, c, h, w), averaged over unmasked elements: (b,).
    ``sizes``: (b, 6), for a network with ``size_condition``."""
    more = {} if sizes is None else {"sizes": sizes}
    inner, time = process.input(process.noisy(x, drawn.noise, drawn.levels), drawn.levels)
    target = process.target(x, drawn.noise, drawn.levels)
    if drawn.keep is None:
        predicted = network(inner, time, text, drawn.drop, **more)
    else:
        predicted = network(inner, time, text, drawn.drop, drawn.keep, **more)
        target = take(patchify(target, patch), drawn.keep)
    found: Tensor = (predicted - target).square().flatten(1).mean(1)
    return found


def posterior_sample(moments: Tensor, keys: Keys) -> Tensor:
    """Sample moments (b, 2c, h, w) → (b, c, h, w), with a key for each sample."""
    mean, deviation = moments.chunk(2, 1)
    shape = tuple(mean.shape[1:])
    noise = np.stack([normals(shape, keys.seed, "moments", keys.step, int(slot)) for slot in keys.slots])
    return mean + deviation * torch.from_numpy(noise).to(mean)


def start_from(place: str, model: DiT, process: Process) -> Normalisation:
    """Load the EMA weights of a run or checkpoint into ``model``; returns its normalisation. Resolutions may differ.

    Raises:
        ConfigError: the checkpoint does not match.
    """
    from pipeline.training.checkpoint import finished_run, require_same_network

    found = finished_run(place, "diffuse")
    ours = {name: v for name, v in model.config.to_dict().items() if name not in ("height", "width")}
    require_same_network(place, ours, DiTConfig(**found.facts["model"]).to_dict())
    if found.facts.get("process", {"name": "flow"})["name"] != process.to_dict()["name"]:
        raise ConfigError(f"start_from={place}: it was trained with another process=")
    model.load_state_dict(found.tensors["ema"])
    return Normalisation(tuple(found.facts["normalisation"]["mean"]), found.facts["normalisation"]["scale"])


def _first(data: Batches, seed: int, most: int) -> list[Batch]:
    """A fixed random choice of samples, the first of the first epoch; with buckets, some of each in a batch."""
    chosen = some(data, most, seed)
    return [chosen.batch(np.array(samples)) for samples in shape_ranges(chosen)]


def _of_all_shapes(latents: list[Tensor]) -> Tensor:
    """Concatenate latents (n, c, h, w) of several shapes to (1, c, elements)."""
    return torch.cat([part.transpose(0, 1).flatten(1) for part in latents], 1)[None]


def draw(keys: Keys, shape: tuple[int, ...], drop: float, process: Process, tokens: int = 0, kept: int = 0) -> Drawn:
    """Draw random numbers with a key for each sample; ``kept`` of ``tokens`` tokens are kept, in order, or all."""
    count = len(keys.slots)
    noise = np.empty((count, *shape), np.float32)
    normal = np.empty(count, np.float32)
    dropped = np.empty(count, np.bool_)
    keep = np.empty((count, kept), np.int64)
    for i, slot in enumerate(keys.slots):
        random = generator(keys.seed, "diffuse", keys.step, int(slot))
        normal[i] = random.standard_normal()
        dropped[i] = random.random() < drop
        random.standard_normal(dtype=np.float32, out=noise[i])
        if kept < tokens:
            keep[i] = np.sort(random.permutation(tokens)[:kept])
    levels = process.levels(torch.from_numpy(normal))
    places = torch.from_numpy(keep) if kept < tokens else None
    return Drawn(levels, torch.from_numpy(noise), torch.from_numpy(dropped), places)
