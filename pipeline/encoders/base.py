"""What an image autoencoder and a text encoder are, and how to get one by name.

Importing this module does not import torch: launchers and the engine may use it to check names.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from pipeline.cli import nearest
from pipeline.config import ConfigError
from pipeline.randomness import normals

if TYPE_CHECKING:
    import torch
    from torch import Tensor

AUTOENCODERS = ("embedded", "embedded16")
TEXT_ENCODERS = ("embedded", "openclip")
DTYPES = ("float32", "float16", "bfloat16")


class Autoencoder(Protocol):
    """Pictures to latents and back.

    ``scaling`` is what raw latents were multiplied with, so that they have about unit deviation.
    """

    name: str
    channels: int
    downsample: int
    scaling: float

    def preprocess(self, images: Sequence[np.ndarray], resolution: int) -> Tensor:
        """Pictures uint8 (h, w, 3) of any sizes → (b, 3, resolution, resolution) in [-1, 1], for :meth:`encode`."""
        ...

    def encode(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """(b, 3, h, w) in [-1, 1] → (b, channels, h / downsample, w / downsample), float32.

        ``noise``: standard normal of the result's shape makes it a sample of the posterior; None means its mode.
        An autoencoder without a posterior does not use it.
        """
        ...

    def decode(self, z: Tensor) -> Tensor:
        """(b, channels, h, w) → (b, 3, h * downsample, w * downsample), float32, in [-1, 1]."""
        ...

    def describe(self) -> dict[str, Any]:
        """What the manifest records: name, version, shapes, scaling, and hashes of weights if there are any."""
        ...


class TextEncoder(Protocol):
    """Captions to a sequence of states of a fixed length."""

    name: str
    length: int
    width: int

    def encode(self, captions: Sequence[str]) -> Tensor:
        """Captions → (b, length, width), float32. Longer captions are cut, shorter ones padded as the model does it."""
        ...

    def describe(self) -> dict[str, Any]:
        """What the manifest records: name, version, shapes, and hashes of weights if there are any."""
        ...


def autoencoder(name: str, device: str | torch.device = "cpu", dtype: str = "float32") -> Autoencoder:
    """The autoencoder called ``name``: ``embedded``, ``embedded16``, or a diffusers AutoencoderKL repo or folder.

    Raises:
        ConfigError: no such name or dtype, or the weights are not there.
    """
    _check_dtype(dtype)
    if name in AUTOENCODERS:
        from pipeline.encoders.embedded import EmbeddedAutoencoder

        return EmbeddedAutoencoder(name, device)
    if "/" in name or Path(name).is_dir():
        from pipeline.encoders.diffusers import DiffusersAutoencoder

        return DiffusersAutoencoder(name, device, dtype)
    raise ConfigError(
        f"vae={name}: {nearest(name, AUTOENCODERS)} (or give a diffusers repo as owner/name, or a folder)"
    )


def text_encoder(name: str, device: str | torch.device = "cpu", dtype: str = "float32") -> TextEncoder:
    """The text encoder called ``name``: ``embedded``, or ``openclip:<model>[:<pretrained>]``.

    Raises:
        ConfigError: no such name, model, weights or dtype.
    """
    _check_dtype(dtype)
    if name == "embedded":
        from pipeline.encoders.embedded import EmbeddedTextEncoder

        return EmbeddedTextEncoder(device)
    kind, _, rest = name.partition(":")
    if kind == "openclip":
        from pipeline.encoders.openclip import OpenClipTextEncoder

        return OpenClipTextEncoder(rest, device, dtype)
    raise ConfigError(f"text_encoder={name}: {nearest(kind, TEXT_ENCODERS)} (as openclip:<model>[:<pretrained>])")


def _check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise ConfigError(f"model_dtype={dtype}: {nearest(dtype, DTYPES)}")


def fit(image: np.ndarray, resolution: int) -> np.ndarray:
    """Bring the smaller edge to r = ``resolution`` (bicubic, antialiased) and cut out the centre: uint8 (r, r, 3).

    The same rounding as torchvision's ``Resize(resolution, BICUBIC)`` and ``CenterCrop`` on Pillow images.
    """
    from PIL import Image

    height, width = image.shape[:2]
    short, long = min(height, width), max(height, width)
    if short != resolution:
        longer = int(resolution * long / short)
        width, height = (resolution, longer) if width <= height else (longer, resolution)
        image = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
    top, left = round((height - resolution) / 2.0), round((width - resolution) / 2.0)
    return image[top : top + resolution, left : left + resolution]


def to_unit_range(images: np.ndarray, device: str | torch.device = "cpu") -> Tensor:
    """uint8 (b, h, w, 3) → float32 (b, 3, h, w) in [-1, 1]."""
    import torch

    pixels = torch.from_numpy(np.ascontiguousarray(images)).to(device).permute(0, 3, 1, 2)
    return pixels.to(torch.float32) / 127.5 - 1.0


def to_pixels(x: Tensor) -> np.ndarray:
    """(b, 3, h, w) in [-1, 1] → uint8 (b, h, w, 3); what lies outside is clipped."""
    import torch

    pixels = ((x.float().clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)
    images: np.ndarray = pixels.permute(0, 2, 3, 1).cpu().numpy()
    return images


def posterior_noise(seed: int, keys: Sequence[str], resolution: int, shape: tuple[int, int, int]) -> Tensor:
    """Standard normal float32 (b, *shape), keyed by (seed, sample key, resolution): not by rank or place in a batch."""
    import torch

    return torch.from_numpy(np.stack([normals(shape, seed, "posterior", key, resolution) for key in keys]))


def weights_digest(model: torch.nn.Module) -> str:
    """xxh3-128 over names, dtypes, shapes and bytes of all weights, in the order of their names."""
    import torch
    import xxhash

    digest = xxhash.xxh3_128()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n")
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
