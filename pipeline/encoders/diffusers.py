"""diffusers' autoencoders: AutoencoderKL (Stable Diffusion 1, 2, XL, 3, FLUX) and AutoencoderDC (SANA)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pipeline.config.cli import nearest
from pipeline.config.schema import ConfigError
from pipeline.encoders.base import Autoencoder, commit_of, repository, weights_digest
from pipeline.encoders.preprocessing import Preprocessing

if TYPE_CHECKING:
    from torch import Tensor

_FLOORS = {4: 20.0, 16: 26.0}  # by channels of 8x autoencoders; smooth pictures keep 30 and 37 dB
_FLOOR = 16.0


class DiffusersAutoencoder(Autoencoder):
    """An autoencoder with its ``scaling_factor`` and ``shift_factor`` applied: latents have about unit deviation.

    One whose config has ``latents_mean`` and ``latents_std`` (Playground 2.5) gets those in place of the shift, by
    diffusers' formula: (latent - mean) * scaling_factor / std, for each channel.

    Args:
        name: a repository (``owner/name[@revision]``) or a local folder; of the autoencoder itself or of a pipeline
            with ``vae/``. Weights must be safetensors.
        dtype: precision of the network. Pictures come in and latents go out as float32. A model whose config says
            ``force_upcast`` (SDXL's) overflows in float16: it then runs in float32.

    Raises:
        ConfigError: there is no such repository, folder, or safetensors file.
    """

    def __init__(self, name: str, model: Any, device: str | torch.device, dtype: str, downsample: int) -> None:
        config = model.config
        self.name = name
        self.device = torch.device(device)
        self.dtype = getattr(torch, "float32" if dtype == "float16" and config.get("force_upcast") else dtype)
        self.preprocessing = Preprocessing()
        self._weights = weights_digest(model)
        layout = torch.channels_last if self.device.type == "cuda" else torch.contiguous_format
        self._model = model.to(self.device, self.dtype, memory_format=layout).eval().requires_grad_(False)
        self.channels = int(config.latent_channels)
        self.downsample = downsample
        self.widest = int((config.get("block_out_channels") or config.encoder_block_out_channels)[0])
        self.scaling = float(config.scaling_factor)
        self.shift = float(config.get("shift_factor") or 0.0)
        self._mean, self._deviation = self._statistics()
        self.floor = _FLOORS.get(self.channels, _FLOOR) if downsample <= 8 else _FLOOR

    def _statistics(self) -> tuple[Tensor | float, Tensor | float]:
        """(1, c, 1, 1) each: what diffusers' pipelines take off the latents, and divide them by, before they scale."""
        known = [self._model.config.get(f"latents_{name}") for name in ("mean", "std")]
        self._has_statistics = None not in known
        if not self._has_statistics:
            return self.shift, 1.0
        mean, deviation = (torch.tensor(values).view(1, -1, 1, 1).to(self.device) for values in known)
        return mean, deviation

    def compile(self) -> None:
        self._model.encoder.compile(dynamic=False)  # a graph for each resolution

    def _input(self, x: Tensor) -> Tensor:
        x = x.to(self.device, self.dtype)
        return x.contiguous(memory_format=torch.channels_last) if self.device.type == "cuda" else x

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """float (b, c, h, w) → float32 (b, 3, dh, dw), clipped to [-1, 1]."""
        latents = z.to(self.device, torch.float32) * self._deviation / self.scaling + self._mean
        decoded: Tensor = self._model.decode(latents.to(self.dtype)).sample
        return decoded.float().clamp(-1.0, 1.0)

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            **commit_of(*repository(self.name)),
            "class": type(self._model).__name__,
            "channels": self.channels,
            "downsample": self.downsample,
            "scaling": self.scaling,
            "shift": self.shift,
            **{name: self._model.config[name] for name in ("latents_mean", "latents_std") if self._has_statistics},
            "dtype": str(self.dtype).removeprefix("torch."),
            "floor": self.floor,
            "preprocessing": self.preprocessing.describe(),
            "weights_xxh3": self._weights,
        }


class KlAutoencoder(DiffusersAutoencoder):
    """AutoencoderKL: its encoder gives a normal distribution of latents."""

    def __init__(self, name: str, model: Any, device: str | torch.device, dtype: str) -> None:
        super().__init__(name, model, device, dtype, 2 ** (len(model.config.block_out_channels) - 1))

    @torch.no_grad()
    def moments(self, x: Tensor) -> Tensor:
        """float (b, 3, h, w) in [-1, 1] → float32 (b, 2c, h/d, w/d): mean, and deviation, both scaled."""
        posterior = self._model.encode(self._input(x)).latent_dist
        mean = (posterior.mean.float() - self._mean) * self.scaling / self._deviation
        return torch.cat([mean, posterior.std.float() * self.scaling / self._deviation], 1)


class DcAutoencoder(DiffusersAutoencoder):
    """AutoencoderDC (Chen et al. 2024): 32x or 64x, deterministic."""

    def __init__(self, name: str, model: Any, device: str | torch.device, dtype: str) -> None:
        super().__init__(name, model, device, dtype, 2 ** (len(model.config.encoder_block_out_channels) - 1))

    @torch.no_grad()
    def moments(self, x: Tensor) -> Tensor:
        """float (b, 3, h, w) in [-1, 1] → float32 (b, 2c, h/d, w/d), its second half zero."""
        latents = self._model.encode(self._input(x)).latent.float()
        latents = (latents - self._mean) * self.scaling / self._deviation
        return torch.cat([latents, torch.zeros_like(latents)], 1)


_CLASSES: dict[str, Callable[[str, Any, str | torch.device, str], DiffusersAutoencoder]] = {
    "AutoencoderKL": KlAutoencoder,
    "AutoencoderDC": DcAutoencoder,
}


def diffusers_autoencoder(name: str, device: str | torch.device = "cpu", dtype: str = "float32") -> Autoencoder:
    """The autoencoder at ``name``, of the kind that its config says."""
    kind, model = _load(name)
    return _CLASSES[kind](name, model, device, dtype)


def _load(name: str) -> tuple[str, Any]:
    """Class and model, in float32 on the CPU, so that the digest of the weights depends on neither device nor dtype."""
    import diffusers

    place, revision = repository(name)
    subfolders = [None, "vae"]
    if (Path(place) / "vae").is_dir():
        subfolders.reverse()
    logging.getLogger("diffusers").setLevel(logging.ERROR)  # that one place has no such file is no news
    reason = ""
    for subfolder in subfolders:
        where = {"subfolder": subfolder, "revision": revision}
        try:
            kind = diffusers.AutoencoderKL.load_config(place, **where)["_class_name"]
            if kind not in _CLASSES:
                reason = f"it is of class {kind}; {nearest(kind, _CLASSES)}"
                continue
            load = getattr(diffusers, kind).from_pretrained
            return kind, load(place, torch_dtype=torch.float32, use_safetensors=True, **where)
        except (OSError, ValueError, KeyError) as error:
            reason = reason or " ".join(str(error).split())[:300]
    raise ConfigError(f"vae={name}: no autoencoder can be loaded from there: {reason}")
