"""Autoencoders of the diffusers library (AutoencoderKL: Stable Diffusion 1, 2, XL, 3, FLUX)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pipeline.config import ConfigError
from pipeline.encoders.base import fit, to_unit_range, weights_digest

if TYPE_CHECKING:
    from torch import Tensor


class DiffusersAutoencoder:
    """An AutoencoderKL with its ``scaling_factor`` and ``shift_factor`` applied: latents have about unit deviation.

    Args:
        name: a repository (``owner/name``) or a local folder; of the autoencoder itself or of a pipeline with ``vae/``.
            Weights must be safetensors.
        dtype: precision of the network. Pictures come in and latents go out as float32.

    Raises:
        ConfigError: there is no such repository, folder, or safetensors file.
    """

    def __init__(self, name: str, device: str | torch.device = "cpu", dtype: str = "float32") -> None:
        self.name = name
        self.device = torch.device(device)
        self.dtype = getattr(torch, dtype)
        model = _load(name)
        self._weights = weights_digest(model)
        self._model = model.to(self.device, self.dtype).eval().requires_grad_(False)
        config = model.config
        self.channels = int(config.latent_channels)
        self.downsample = 2 ** (len(config.block_out_channels) - 1)
        self.scaling = float(config.scaling_factor)
        self.shift = float(config.get("shift_factor") or 0.0)

    def preprocess(self, images: Sequence[np.ndarray], resolution: int) -> Tensor:
        """uint8 (h, w, 3) each → float32 (b, 3, resolution, resolution) in [-1, 1]."""
        return to_unit_range(np.stack([fit(image, resolution) for image in images]), self.device)

    @torch.no_grad()
    def encode(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """float (b, 3, h, w) in [-1, 1] → float32 (b, c, h/d, w/d): the posterior's mean + deviation * ``noise``."""
        posterior = self._model.encode(x.to(self.device, self.dtype)).latent_dist
        latents = posterior.mean.float()
        if noise is not None:
            latents = latents + posterior.std.float() * noise.to(self.device, torch.float32)
        return (latents - self.shift) * self.scaling

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """float (b, c, h, w) → float32 (b, 3, dh, dw), clipped to [-1, 1]."""
        latents = z.to(self.device, torch.float32) / self.scaling + self.shift
        decoded: Tensor = self._model.decode(latents.to(self.dtype)).sample
        return decoded.float().clamp(-1.0, 1.0)

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "channels": self.channels,
            "downsample": self.downsample,
            "scaling": self.scaling,
            "shift": self.shift,
            "dtype": str(self.dtype).removeprefix("torch."),
            "weights_xxh3": self._weights,
        }


def _load(name: str) -> Any:
    """In float32 on the CPU, so that the digest of the weights depends on neither device nor dtype."""
    from diffusers import AutoencoderKL

    places = [{}, {"subfolder": "vae"}]
    if Path(name).is_dir() and (Path(name) / "vae").is_dir():
        places.reverse()
    logging.getLogger("diffusers").setLevel(logging.ERROR)  # that one place has no such file is no news
    reason = ""
    for place in places:
        try:
            return AutoencoderKL.from_pretrained(name, torch_dtype=torch.float32, use_safetensors=True, **place)
        except (OSError, ValueError) as error:
            reason = reason or " ".join(str(error).split())[:300]
    raise ConfigError(f"vae={name}: no AutoencoderKL can be loaded from there: {reason}")
