"""Text to image: diffusion on latents."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.config.schema import ConfigError, TrainConfig
from pipeline.encoders.base import autoencoder, to_pixels
from pipeline.loading import Batches, order
from pipeline.models.constants import channels
from pipeline.models.diffusion_process import Process, process_of
from pipeline.models.dit import DiT, DiTConfig, dit_config, kept_tokens, patchify, take
from pipeline.models.sampling import sample
from pipeline.randomness import generator, keyed_seed, normals
from pipeline.training.tasks.base import Batch, Keys, Task

_MEASURED = 1024  # samples that the normalisation is measured on
EVALUATED = 256  # samples that the loss is measured on, where no validation set is kept out
_QUARTERS = 4
_EDGE = 0.005  # what is left out of the distribution of levels at both ends, where a metric is taken
_CACHED_TOKENS = 2048  # fewer make small matrix products, more fall out of the caches
_GOLDEN = (5**0.5 - 1) / 2  # multiples of it, modulo 1, are evenly spread


@dataclass(frozen=True)
class LatentInfo:
    """Where latents come from: what it takes to make new ones of prompts and pictures of them.

    ``data``: content digest of the dataset that they were read from. ``moments``: what is stored are means and
    deviations, (2c, h, w); ``image_shape`` is that of a sample.
    """

    autoencoder: str
    text_encoder: str
    resolution: int
    image_shape: tuple[int, int, int]
    caption_shape: tuple[int, int]
    data: str = ""
    moments: bool = False


@dataclass(frozen=True)
class Normalisation:
    """Brings stored latents to zero mean per channel and unit mean square over all of them, and back.

    One scale for all channels: how loud they are relative to each other is the autoencoder's choice.
    """

    mean: tuple[float, ...]
    scale: float

    @classmethod
    def measure(cls, latents: Tensor) -> Normalisation:
        """Of (n, c, h, w)."""
        exact = latents.double()
        mean = exact.mean((0, 2, 3))
        scale = (exact - mean[None, :, None, None]).square().mean().sqrt()
        return cls(tuple(round(m, 6) for m in mean.tolist()), round(max(float(scale), 1e-6), 6))

    def apply(self, latents: Tensor) -> Tensor:
        return (latents - self._means(latents)) / self.scale

    def invert(self, x: Tensor) -> Tensor:
        return x * self.scale + self._means(x)

    def _means(self, like: Tensor) -> Tensor:
        return channels(self.mean, like.dtype, like.device)


class Diffuse(Task):
    """A :class:`DiT` that learns to take the noise from pictures' latents, given text states."""

    name = "diffuse"
    model: DiT

    def __init__(self, config: TrainConfig, data: Batches, info: LatentInfo) -> None:
        self.info = info
        self.drop = config.caption_drop
        self.process = process_of(
            {"name": config.process, "mean": config.noise_mean, "std": config.noise_std}
            | ({"sigma_data": config.sigma_data} if config.process == "edm" else {})
        )
        torch.manual_seed(keyed_seed(config.seed, "weights"))
        self.model = DiT(dit_config(config.model, info.image_shape, info.caption_shape))
        self.tokens = self.model.config.tokens
        self.kept = kept_tokens(self.tokens, config.mask_ratio)
        if config.start_from:
            self.normalisation = start_from(config.start_from, self.model, self.process)
        else:
            latents = _first(data, config.seed, _MEASURED)["image_latents"]
            self.normalisation = Normalisation.measure(latents.chunk(2, 1)[0] if info.moments else latents)
        self._shown = _first(data, config.seed, config.show) if config.show else {}

    def prepare(self, batch: Batch, keys: Keys) -> Batch:
        """``x``: normalised latents (b, c, h, w); of stored moments a sample, which is another one at every step.
        ``text``, and all that is drawn at random: ``levels``, ``noise``, ``drop``, with a mask ``keep``; see
        :class:`Drawn`. In an evaluation levels are spread as in training, noise is fixed, and nothing is hidden;
        ``quarter`` (b,) is that of the levels, 0 (clean) to 3."""
        latents = batch["image_latents"]
        x = self.normalisation.apply(posterior_sample(latents, keys) if self.info.moments else latents)
        shape = tuple(x.shape[1:])
        prepared = {"x": x, "text": batch["caption_latents"]}
        if keys.step >= 0:
            drawn = draw(keys, shape, self.drop, self.process, self.tokens, self.kept)
            return prepared | drawn.to_dict()
        drawn = draw(keys, shape, 0.0, self.process)
        place = torch.from_numpy((keys.slots * _GOLDEN + 0.5) % 1).clamp(_EDGE, 1 - _EDGE)
        levels = self.process.levels(torch.special.ndtri(place).float())
        drawn = replace(drawn, levels=levels, drop=torch.zeros_like(drawn.drop))
        return prepared | drawn.to_dict() | {"quarter": (place * _QUARTERS).long()}

    def losses(self, network: nn.Module, batch: Batch, keys: Keys) -> Tensor:
        """Mean squared error of the prediction, (b,), at a random level, some captions dropped, some tokens masked."""
        drawn = Drawn(batch["levels"], batch["noise"], batch["drop"], batch.get("keep"))
        return diffusion_losses(network, self.process, batch["x"], batch["text"], drawn, self.model.config.patch)

    def measure(self, network: nn.Module, batch: Batch, keys: Keys) -> dict[str, tuple[Tensor, Tensor]]:
        """``valid_loss``, and ``loss_t1`` ... ``loss_t4``, that of each quarter of the levels, clean to noisy."""
        losses = self.losses(network, batch, keys)
        parts = {f"loss_t{q + 1}": (losses, (batch["quarter"] == q).float()) for q in range(_QUARTERS)}
        return {"valid_loss": (losses, torch.ones_like(losses)), **parts}

    def pictures(self, network: nn.Module | None) -> np.ndarray | None:
        """The first ``show`` samples of the first epoch: as they are stored, or drawn from their texts."""
        if not self._shown:
            return None
        latents = self._shown["image_latents"]
        latents = latents.chunk(2, 1)[0] if self.info.moments else latents
        device = next(self.model.parameters()).device
        vae = autoencoder(self.info.autoencoder, device)
        if network is not None:
            noise = np.stack([normals(self.info.image_shape, 0, "shown", number) for number in range(len(latents))])
            text = self._shown["caption_latents"].to(device)
            drawn = sample(network, torch.from_numpy(noise).to(device), text, guidance=1.5, process=self.process)
            latents = self.normalisation.invert(drawn.float())
        return to_pixels(vae.decode(latents.to(device).float()))

    def cached(self) -> int:
        return max(1, _CACHED_TOKENS // self.kept)

    def example(self) -> tuple[Any, ...]:
        model = self.model.config
        image, text = torch.zeros(1, *self.info.image_shape), torch.zeros(1, *self.info.caption_shape)
        keep = torch.arange(self.kept)[None] if self.kept < model.tokens else None
        return image, torch.zeros(1), text, None, keep

    def facts(self) -> dict[str, Any]:
        return {
            "model": self.model.config.to_dict(),
            "process": self.process.to_dict(),
            "normalisation": asdict(self.normalisation),
            "latents": asdict(self.info),
        }


@dataclass(frozen=True)
class Drawn:
    """What is random in the loss of a batch.

    ``levels``: (b,) of noise; ``noise``: (b, c, h, w); ``drop``: (b,) bool, captions that are hidden; ``keep``:
    (b, m) int64, tokens that are not masked, or None for all.
    """

    levels: Tensor
    noise: Tensor
    drop: Tensor
    keep: Tensor | None = None

    def to_dict(self) -> Batch:
        """Without ``keep`` where there is no mask."""
        values = {"levels": self.levels, "noise": self.noise, "drop": self.drop}
        return values if self.keep is None else {**values, "keep": self.keep}


def diffusion_losses(
    network: nn.Module, process: Process, x: Tensor, text: Tensor, drawn: Drawn, patch: int = 2
) -> Tensor:
    """Squared error of what the network predicts for noisy ``x`` (b, c, h, w), mean over elements kept: (b,)."""
    inner, time = process.input(process.noisy(x, drawn.noise, drawn.levels), drawn.levels)
    target = process.target(x, drawn.noise, drawn.levels)
    if drawn.keep is None:
        predicted = network(inner, time, text, drawn.drop)
    else:
        predicted = network(inner, time, text, drawn.drop, drawn.keep)
        target = take(patchify(target, patch), drawn.keep)
    return (predicted - target).square().flatten(1).mean(1)


def posterior_sample(moments: Tensor, keys: Keys) -> Tensor:
    """Means and deviations (b, 2c, h, w) → a sample (b, c, h, w), each from its own key."""
    mean, deviation = moments.chunk(2, 1)
    shape = tuple(mean.shape[1:])
    noise = np.stack([normals(shape, keys.seed, "moments", keys.step, int(slot)) for slot in keys.slots])
    return mean + deviation * torch.from_numpy(noise).to(mean)


def start_from(place: str, model: DiT, process: Process) -> Normalisation:
    """Give ``model`` the averaged weights of a run or checkpoint; its normalisation. Resolutions may differ.

    Raises:
        ConfigError: the checkpoint does not fit.
    """
    from pipeline.training.checkpoint import finished_run, require_same_network

    found = finished_run(place, "diffuse")
    ours = {name: v for name, v in model.config.to_dict().items() if name not in ("height", "width")}
    require_same_network(place, ours, DiTConfig(**found.facts["model"]).to_dict())
    if found.facts.get("process", {"name": "flow"})["name"] != process.to_dict()["name"]:
        raise ConfigError(f"start_from={place}: it was trained with another process=")
    model.load_state_dict(found.tensors["ema"])
    return Normalisation(tuple(found.facts["normalisation"]["mean"]), found.facts["normalisation"]["scale"])


def _first(data: Batches, seed: int, most: int) -> dict[str, Tensor]:
    """The first samples of the first epoch: a fixed random choice."""
    count = min(most, len(data))
    return data.batch(order(seed, 0, len(data))[np.arange(count)])


def draw(keys: Keys, shape: tuple[int, ...], drop: float, process: Process, tokens: int = 0, kept: int = 0) -> Drawn:
    """Draw for each sample from its own key; ``kept`` of ``tokens`` tokens, in order, unless it is all of them."""
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
