"""What an image autoencoder, a text encoder and an image encoder are, and how to get one by name.

Importing this module does not import torch: launchers and the engine may use it to check names.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.config.cli import nearest
from pipeline.config.schema import ConfigError
from pipeline.randomness import normals

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from pipeline.encoders.preprocessing import Preprocessing
    from pipeline.imaging.transform import Pixels

AUTOENCODERS = ("embedded", "embedded16")
TEXT_ENCODERS = ("embedded", "openclip", "clip", "t5")
IMAGE_ENCODERS = ("embedded", "openclip", "clip")
DTYPES = ("float32", "float16", "bfloat16")
LAYERS = ("last", "penultimate")


class Autoencoder(ABC):
    """Pictures to latents and back.

    Attributes:
        scaling: what raw latents were multiplied with, so that they have about unit deviation.
        floor: dB of PSNR that a smooth image keeps at least on the way there and back: below, something is wrong.
        widest: channels of the largest activations, which have the image's own height and width.
    """

    name: str
    channels: int
    downsample: int
    scaling: float
    floor: float
    widest: int = 3
    device: torch.device
    preprocessing: Preprocessing

    def compile(self) -> None:
        """Have the network compiled, if there is one, when it is used first."""
        return

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """(channels, h, w) of the latents of a square image.

        Raises:
            ConfigError: its edge is no multiple of ``downsample``.
        """
        if resolution < 1 or resolution % self.downsample:
            raise ConfigError(f"image_resolutions={resolution}: must be a multiple of {self.downsample}")
        edge = resolution // self.downsample
        return (self.channels, edge, edge)

    def preprocess(self, images: Sequence[Pixels], resolution: int) -> Tensor:
        """Images uint8 (h, w, 3) of any sizes → (b, 3, resolution, resolution) in [-1, 1], for :meth:`encode`."""
        return self.preprocessing(images, resolution, self.device)

    @abstractmethod
    def moments(self, x: Tensor) -> Tensor:
        """(b, 3, h, w) in [-1, 1] → float32 (b, 2 * channels, h / downsample, w / downsample).

        The first half is the posterior's mean, the second its deviation (zero where there is no posterior).
        """

    def encode(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """(b, 3, h, w) in [-1, 1] → (b, channels, h / downsample, w / downsample), float32.

        ``noise``: standard normal of the result's shape makes it a sample of the posterior; None means its mode.
        An autoencoder without a posterior does not use it.
        """
        return sampled(self.moments(x), noise)

    @abstractmethod
    def decode(self, z: Tensor) -> Tensor:
        """(b, channels, h, w) → (b, 3, h * downsample, w * downsample), float32, in [-1, 1]."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What the manifest records: name, version, shapes, scaling, and hashes of weights if there are any."""


def sampled(moments: Tensor, noise: Tensor | None) -> Tensor:
    """The latents (b, c, h, w) of moments (b, 2c, h, w): mean + deviation * noise; None means the mean."""
    mean, deviation = moments.chunk(2, 1)
    return mean if noise is None else mean + deviation * noise.to(mean)


class TextEncoder(ABC):
    """Captions to a sequence of states of a fixed length.

    Attributes:
        pooled_width: of the one embedding that stands for a caption; 0: there is none.
    """

    name: str
    length: int
    width: int
    pooled_width: int = 0

    def compile(self) -> None:
        """Have the network compiled, if there is one, when it is used first."""
        return

    @abstractmethod
    def encode(self, captions: Sequence[str]) -> Tensor:
        """Captions → (b, length, width), float32. Longer captions are cut, shorter ones padded as the model does it."""

    def encode_pooled(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Captions → their states, and what is pooled of them: float32 (b, pooled_width)."""
        raise NotImplementedError(f"{self.name} has no pooled embeddings")

    def lengths(self, captions: Sequence[str]) -> list[int]:
        """How many tokens of each caption cost time; captions of like lengths are best encoded together."""
        return [self.length] * len(captions)

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What the manifest records: name, version, shapes, and hashes of weights if there are any."""


class ImageEncoder(ABC):
    """Pictures to one vector each, for filtering and retrieval."""

    name: str
    width: int
    resolution: int
    device: torch.device
    preprocessing: Preprocessing

    def preprocess(self, images: Sequence[Pixels]) -> Tensor:
        """Images uint8 (h, w, 3) of any sizes → (b, 3, resolution, resolution), for :meth:`encode`."""
        return self.preprocessing(images, self.resolution, self.device)

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """(b, 3, resolution, resolution) → float32 (b, width), of unit length."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What the manifest records: name, version, width, and hashes of weights if there are any."""


def autoencoder(name: str, device: str | torch.device = "cpu", dtype: str = "float32") -> Autoencoder:
    """The autoencoder called ``name``: ``embedded``, ``embedded16``, or a diffusers repository or folder.

    A repository is ``owner/name`` or ``owner/name@revision``.

    Raises:
        ConfigError: no such name or dtype, or the weights are not there.
    """
    _check_dtype(dtype)
    if name in AUTOENCODERS:
        from pipeline.encoders.embedded import EmbeddedAutoencoder

        return EmbeddedAutoencoder(name, device)
    if "/" in name or Path(name).is_dir():
        from pipeline.encoders.diffusers import diffusers_autoencoder

        return diffusers_autoencoder(name, device, dtype)
    raise ConfigError(
        f"vae={name}: {nearest(name, AUTOENCODERS)} (or give a diffusers repo as owner/name, or a folder)"
    )


def text_encoder(name: str, device: str | torch.device = "cpu", dtype: str = "float32") -> TextEncoder:
    """The text encoder called ``name``.

    ``embedded``; ``openclip:<model>[:<pretrained>]``; ``clip:<repo or folder>`` and ``t5:<repo or folder>`` of
    transformers. After ``#``: ``layer=penultimate``, and for T5 ``length=<tokens>`` and ``mask=false``.

    Raises:
        ConfigError: no such name, model, weights or dtype.
    """
    _check_dtype(dtype)
    kind, rest, options = _parts(name)
    if name == "embedded":
        from pipeline.encoders.embedded import EmbeddedTextEncoder

        return EmbeddedTextEncoder(device)
    takes = {"openclip": ("layer",), "clip": ("layer",), "t5": ("length", "mask")}
    if kind not in takes or not rest:
        raise ConfigError(
            f"text_encoder={name}: {nearest(kind, TEXT_ENCODERS)} "
            "(as openclip:<model>[:<pretrained>], clip:<repo or folder>, t5:<repo or folder>)"
        )
    for option in options:
        if option not in takes[kind]:
            raise ConfigError(f"text_encoder={name}: {kind} takes {', '.join(takes[kind])} after the #")
    layer = options.get("layer", "last")
    if layer not in LAYERS:
        raise ConfigError(f"text_encoder={name}: layer={layer}: {nearest(layer, LAYERS)}")
    if kind == "openclip":
        from pipeline.encoders.openclip import OpenClipTextEncoder

        return OpenClipTextEncoder(rest, device, dtype, layer)
    from pipeline.encoders.transformers import ClipTextEncoder, T5TextEncoder

    if kind == "clip":
        return ClipTextEncoder(rest, device, dtype, layer)
    length = options.get("length", "256")
    if not length.isdigit() or not int(length):
        raise ConfigError(f"text_encoder={name}: length={length}: expected a number of tokens")
    mask = options.get("mask", "true")
    if mask not in ("true", "false"):
        raise ConfigError(f"text_encoder={name}: mask={mask}: expected true or false")
    return T5TextEncoder(rest, device, dtype, int(length), mask == "true")


def image_encoder(name: str, device: str | torch.device = "cpu", dtype: str = "float32") -> ImageEncoder:
    """The image encoder called ``name``: ``embedded``, ``openclip:<model>[:<pretrained>]``, ``clip:<repo or folder>``.

    Raises:
        ConfigError: no such name, model, weights or dtype.
    """
    _check_dtype(dtype)
    kind, rest, options = _parts(name)
    if name == "embedded":
        from pipeline.encoders.embedded import EmbeddedImageEncoder

        return EmbeddedImageEncoder(device)
    if kind not in IMAGE_ENCODERS or not rest or options:
        raise ConfigError(
            f"image_encoder={name}: {nearest(kind, IMAGE_ENCODERS)} "
            "(as openclip:<model>[:<pretrained>], clip:<repo or folder>)"
        )
    if kind == "openclip":
        from pipeline.encoders.openclip import OpenClipImageEncoder

        return OpenClipImageEncoder(rest, device, dtype)
    from pipeline.encoders.transformers import ClipImageEncoder

    return ClipImageEncoder(rest, device, dtype)


def _parts(name: str) -> tuple[str, str, dict[str, str]]:
    """``kind:rest#key=value,key=value`` → kind, rest, options."""
    spec, _, tail = name.partition("#")
    kind, _, rest = spec.partition(":")
    options = dict(part.partition("=")[::2] for part in tail.split(",")) if tail else {}
    return kind, rest, options


def _check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise ConfigError(f"model_dtype={dtype}: {nearest(dtype, DTYPES)}")


def repository(spec: str) -> tuple[str, str | None]:
    """Name and revision of ``owner/name[@revision]``; a folder has no revision."""
    if Path(spec).is_dir():
        return spec, None
    name, _, revision = spec.partition("@")
    return name, revision or None


def commit_of(name: str, revision: str | None, file: str = "config.json") -> dict[str, str]:
    """``{"revision": <commit>}`` of a repository that was loaded from the hub; nothing for a folder."""
    from huggingface_hub import try_to_load_from_cache

    path = None if Path(name).exists() else try_to_load_from_cache(name, file, revision=revision)
    if not isinstance(path, str):
        return {}
    parts = Path(path).parts
    return {"revision": parts[parts.index("snapshots") + 1]}


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


def sent(values: Tensor, device: torch.device) -> Tensor:
    """``values`` of the host on ``device``, without waiting for what a GPU is at."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def weights_digest(model: torch.nn.Module) -> str:
    """xxh3-128 over names, dtypes, shapes and bytes of all weights, in the order of their names."""
    import torch
    import xxhash

    digest = xxhash.xxh3_128()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n")
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
