"""Autoencoders of diffusers, normalised as in the pipelines that use them.

AutoencoderKL (Stable Diffusion 1, 2, XL, 3, FLUX.1), AutoencoderKLFlux2 (FLUX.2), AutoencoderKLHunyuanImage,
AutoencoderKLQwenImage and AutoencoderKLWan (an image is a video of one frame), AutoencoderDC (SANA).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pipeline.config.cli import nearest
from pipeline.config.schema import ConfigError
from pipeline.encoders.base import Autoencoder, commit_of, repository, weights_digest
from pipeline.encoders.failures import UNLOADABLE, not_loaded
from pipeline.encoders.from_hub import expect_model
from pipeline.encoders.preprocessing import Preprocessing
from pipeline.encoders.spec import ModelSpec
from pipeline.registry import autoencoders

if TYPE_CHECKING:
    from torch import Tensor

_FLOORS = {4: 20.0, 16: 26.0, 32: 26.0}  # by channels of 8x autoencoders; smooth images keep 30, 37 and more dB
_FLOOR = 16.0


@autoencoders.register("diffusers")
class DiffusersAutoencoder(Autoencoder):
    """An autoencoder whose latents are normalised to about unit deviation: ``(latent - shift) * scaling / deviation``.

    ``scaling`` and ``shift`` are the config's ``scaling_factor`` and ``shift_factor``. If the config has
    ``latents_mean`` and ``latents_std`` (Playground 2.5, Qwen-Image, Wan), these are the shift and the deviation of
    each channel, as in diffusers' pipelines.

    Args:
        name: a repository (``owner/name[@revision]``) or a local folder, of the autoencoder itself or of a pipeline
            with ``vae/``. Weights must be safetensors.
        dtype: precision of the network. Images and latents are float32. A model whose config has ``force_upcast``
            (SDXL's) overflows in float16, and runs in float32 instead.

    Raises:
        ConfigError: there is no such repository, folder, or safetensors file.
    """

    @classmethod
    def from_spec(cls, spec: ModelSpec, device: str | torch.device, dtype: str) -> DiffusersAutoencoder:
        """Create the autoencoder at ``spec.place``, of the class named in its config."""
        kind, model = _load(spec.place)
        return _CLASSES[kind](spec.place, model, device, dtype)

    def __init__(self, name: str, model: Any, device: str | torch.device, dtype: str) -> None:
        config = model.config
        self.name = name
        self.device = torch.device(device)
        self.dtype = getattr(torch, "float32" if dtype == "float16" and config.get("force_upcast") else dtype)
        self.preprocessing = Preprocessing()
        self._weights = weights_digest(model)
        flat = not any(isinstance(module, torch.nn.Conv3d) for module in model.modules())
        self._layout = torch.channels_last if self.device.type == "cuda" and flat else torch.contiguous_format
        self._model = model.to(self.device, self.dtype, memory_format=self._layout).eval().requires_grad_(False)
        self.channels, self.downsample, self.widest = self._sizes(config)
        self.scaling = float(config.get("scaling_factor") or 1.0)
        self.shift = float(config.get("shift_factor") or 0.0)
        self._mean, self._deviation = self._statistics()
        self.floor = _FLOORS.get(self.channels, _FLOOR) if self.downsample <= 8 else _FLOOR

    def _sizes(self, config: Any) -> tuple[int, int, int]:
        """Channels of the latents, pixels per latent along an edge, channels of the largest activations."""
        widths = config.block_out_channels
        return int(config.latent_channels), 2 ** (len(widths) - 1), int(widths[0])

    def _statistics(self) -> tuple[Tensor | float, Tensor | float]:
        """Shift and deviation, each a float or float32 (1, c, 1, 1)."""
        known = [self._model.config.get(f"latents_{name}") for name in ("mean", "std")]
        self._has_statistics = None not in known
        if not self._has_statistics:
            return self.shift, 1.0
        mean, deviation = (torch.tensor(values).view(1, -1, 1, 1).to(self.device) for values in known)
        return mean, deviation

    def compile(self) -> None:
        self._model.encoder.compile(dynamic=False)  # a graph for each resolution

    def _posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation (b, c, h, w) of the raw latents of images x (b, 3, h, w) in the network's dtype."""
        posterior = self._model.encode(x).latent_dist
        return posterior.mean.float(), posterior.std.float()

    def _decode(self, latents: Tensor) -> Tensor:
        """Raw latents (b, c, h, w) in the network's dtype → images (b, 3, h, w)."""
        decoded: Tensor = self._model.decode(latents).sample
        return decoded

    @torch.no_grad()
    def moments(self, x: Tensor) -> Tensor:
        """float (b, 3, h, w) in [-1, 1] → float32 (b, 2c, h/d, w/d): mean, and deviation, both normalised."""
        mean, deviation = self._posterior(x.to(self.device, self.dtype).contiguous(memory_format=self._layout))
        mean = (mean - self._mean) * self.scaling / self._deviation
        return torch.cat([mean, deviation * self.scaling / self._deviation], 1)

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """float (b, c, h, w) → float32 (b, 3, dh, dw), clipped to [-1, 1]."""
        latents = z.to(self.device, torch.float32) * self._deviation / self.scaling + self._mean
        return self._decode(latents.to(self.dtype)).float().clamp(-1.0, 1.0)

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


class HunyuanImageAutoencoder(DiffusersAutoencoder):
    """AutoencoderKLHunyuanImage: 32x."""

    def _sizes(self, config: Any) -> tuple[int, int, int]:
        return int(config.latent_channels), int(config.spatial_compression_ratio), int(config.block_out_channels[0])


class Flux2Autoencoder(DiffusersAutoencoder):
    """AutoencoderKLFlux2: 2 x 2 neighbouring latents are stacked into channels, which are normalised with the running
    statistics of a batch norm: (b, 4c, h/16, w/16), the input of FLUX.2's transformer."""

    def _sizes(self, config: Any) -> tuple[int, int, int]:
        channels, downsample, widest = super()._sizes(config)
        return 4 * channels, 2 * downsample, widest

    def _statistics(self) -> tuple[Tensor | float, Tensor | float]:
        self._has_statistics = False
        norm, epsilon = self._model.bn, float(self._model.config.batch_norm_eps)
        mean, deviation = norm.running_mean.float(), (norm.running_var.float() + epsilon).sqrt()
        return mean.view(1, -1, 1, 1), deviation.view(1, -1, 1, 1)

    def _posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, deviation = (torch.nn.functional.pixel_unshuffle(part, 2) for part in super()._posterior(x))
        return mean, deviation

    def _decode(self, latents: Tensor) -> Tensor:
        return super()._decode(torch.nn.functional.pixel_shuffle(latents, 2))


class VideoAutoencoder(DiffusersAutoencoder):
    """AutoencoderKLQwenImage and AutoencoderKLWan: an image is a video of one frame."""

    def _sizes(self, config: Any) -> tuple[int, int, int]:
        patch = int(config.get("patch_size") or 1)
        return int(config.z_dim), patch * 2 ** (len(config.dim_mult) - 1), int(config.base_dim)

    def _posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, deviation = super()._posterior(x[:, :, None])
        return mean[:, :, 0], deviation[:, :, 0]

    def _decode(self, latents: Tensor) -> Tensor:
        return super()._decode(latents[:, :, None])[:, :, 0]


class DcAutoencoder(DiffusersAutoencoder):
    """AutoencoderDC (Chen et al. 2024): 32x or 64x, deterministic, so that the deviation is zero."""

    def _sizes(self, config: Any) -> tuple[int, int, int]:
        widths = config.encoder_block_out_channels
        return int(config.latent_channels), 2 ** (len(widths) - 1), int(widths[0])

    def _posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        latents = self._model.encode(x).latent.float()
        return latents, torch.zeros_like(latents)


_CLASSES: dict[str, Callable[[str, Any, str | torch.device, str], DiffusersAutoencoder]] = {
    "AutoencoderKL": DiffusersAutoencoder,
    "AutoencoderKLFlux2": Flux2Autoencoder,
    "AutoencoderKLHunyuanImage": HunyuanImageAutoencoder,
    "AutoencoderKLQwenImage": VideoAutoencoder,
    "AutoencoderKLWan": VideoAutoencoder,
    "AutoencoderDC": DcAutoencoder,
}


def _load(name: str) -> tuple[str, Any]:
    """Class and model, in float32 on the CPU, so that the digest of the weights depends on neither device nor dtype."""
    import diffusers

    expect_model(f"vae={name}", name)
    place, revision = repository(name)
    subfolders = [None, "vae"]
    if (Path(place) / "vae").is_dir():
        subfolders.reverse()
    logging.getLogger("diffusers").setLevel(logging.ERROR)  # a missing file is expected in one of the two places
    reason, failed, within = "", None, ""
    for subfolder in subfolders:
        where = {"subfolder": subfolder, "revision": revision}
        try:
            kind = diffusers.AutoencoderKL.load_config(place, **where)["_class_name"]
            if kind not in _CLASSES:
                reason = f"it is of class {kind}; {nearest(kind, _CLASSES)}"
                continue
            load = getattr(diffusers, kind).from_pretrained
            return kind, load(place, torch_dtype=torch.float32, use_safetensors=True, **where)
        except UNLOADABLE as error:
            if failed is None:
                failed, within = error, f"{subfolder}/" if subfolder else ""
    if reason or failed is None:
        raise ConfigError(f"vae={name}: no autoencoder can be loaded from there: {reason}")
    weights = f"{within}diffusion_pytorch_model.safetensors"
    raise not_loaded(f"vae={name}", name, failed, f"{within}config.json", f"{weights}|{weights}.index.json")
