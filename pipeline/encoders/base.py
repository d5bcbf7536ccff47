"""Interfaces of autoencoders, text encoders and image encoders, and functions that create them by name.

Importing this module does not import torch: launchers and the engine may use it to check names.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt
import xxhash

from pipeline.config.cli import nearest
from pipeline.config.schema import ConfigError
from pipeline.encoders.spec import ModelSpec
from pipeline.randomness import normals
from pipeline.registry import autoencoders, image_encoders, text_encoders

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from pipeline.encoders.crop import BucketCrop, Crop
    from pipeline.encoders.preprocessing import Preprocessing
    from pipeline.imaging.buckets import Buckets
    from pipeline.imaging.transform import Pixels

DTYPES = ("float32", "float16", "bfloat16")
_ENDS = 1 << 20  # bytes


class Encoder(ABC):
    """Common base of all encoders.

    Attributes:
        usage: how a setting names it if the name alone is not enough: ``clip:<repo or folder>``.
        takes: options accepted after ``#``.
    """

    name: str
    usage: ClassVar[str] = ""
    takes: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def from_spec(cls, spec: ModelSpec, device: str | torch.device, dtype: str) -> Encoder:
        """Create the encoder that a setting names; every registered class has this method.

        Raises:
            ConfigError: there is no such model or weights, or an option is invalid.
        """
        raise spec.error("cannot be chosen by this setting")

    def compile(self) -> None:
        """Compile the network, if there is one, at its first use."""
        return

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What the manifest records: name, version, shapes, and hashes of weights if there are any."""


class Autoencoder(Encoder):
    """Images to latents and back.

    Attributes:
        scaling: factor applied to raw latents to give them about unit deviation.
        floor: minimum PSNR in dB of a reconstructed smooth image; below, something is wrong.
        widest: channels of the largest activations, which have the image's own height and width.
    """

    channels: int
    downsample: int
    scaling: float
    floor: float
    widest: int = 3
    device: torch.device
    preprocessing: Preprocessing

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """(channels, h, w) of the latents of a square image.

        Raises:
            ConfigError: ``resolution`` is not a multiple of ``downsample``.
        """
        if resolution < 1 or resolution % self.downsample:
            raise ConfigError(f"image_resolutions={resolution}: must be a multiple of {self.downsample}")
        edge = resolution // self.downsample
        return (self.channels, edge, edge)

    def preprocess(self, images: Sequence[Pixels], resolution: int) -> Tensor:
        """Images uint8 (h, w, 3) of any sizes → (b, 3, resolution, resolution) in [-1, 1], for :meth:`encode`."""
        return self.preprocessing(images, resolution, self.device)

    def preprocess_for(
        self, image: Pixels, resolution: int, buckets: Buckets | None = None, seed: int = 0, key: str = ""
    ) -> Tensor:
        """An image uint8 (h, w, 3) → (1, 3, h, w) in [-1, 1], cropped as by stage=precompute.

        Args:
            buckets: of this resolution; None: a square crop.
            seed, key: of the stage and the sample; they determine random crop positions.

        Raises:
            ImageError: the image fits no bucket.
        """
        return self.preprocessing.of_one(image, self.crop(resolution, buckets, seed), self.device, key)

    def crop(self, resolution: int, buckets: Buckets | None = None, seed: int = 0) -> Crop | BucketCrop:
        """The crop of an image for :meth:`encode`; arguments as for :meth:`preprocess_for`."""
        if buckets is None:
            return self.preprocessing.crop(resolution)
        from pipeline.encoders.crop import BucketCrop

        return BucketCrop(buckets, seed, self.preprocessing.mode)

    @abstractmethod
    def moments(self, x: Tensor) -> Tensor:
        """(b, 3, h, w) in [-1, 1] → float32 (b, 2 * channels, h / downsample, w / downsample).

        The first half is the posterior's mean, the second its standard deviation (zero if there is no posterior).
        """

    def encode(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """(b, 3, h, w) in [-1, 1] → (b, channels, h / downsample, w / downsample), float32.

        ``noise``: standard normal with the shape of the result, to sample the posterior; None: the posterior's mode.
        Autoencoders without a posterior ignore it.
        """
        return sampled(self.moments(x), noise)

    @abstractmethod
    def decode(self, z: Tensor) -> Tensor:
        """(b, channels, h, w) → (b, 3, h * downsample, w * downsample), float32, in [-1, 1]."""


def sampled(moments: Tensor, noise: Tensor | None) -> Tensor:
    """Sample latents (b, c, h, w) from moments (b, 2c, h, w): mean + deviation * noise; the mean without noise."""
    mean, deviation = moments.chunk(2, 1)
    return mean if noise is None else mean + deviation * noise.to(mean)


class TextEncoder(Encoder):
    """Captions to sequences of states of fixed length.

    Attributes:
        pooled_width: width of the embedding of a whole caption; 0: there is none.
    """

    length: int
    width: int
    pooled_width: int = 0

    @abstractmethod
    def encode(self, captions: Sequence[str]) -> Tensor:
        """Captions → (b, length, width), float32. Captions are truncated and padded as the model does it."""

    def encode_pooled(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Captions → states as from :meth:`encode`, and pooled embeddings, float32 (b, pooled_width)."""
        raise NotImplementedError(f"{self.name} has no pooled embeddings")

    def lengths(self, captions: Sequence[str]) -> list[int]:
        """Number of tokens of each caption that take time; captions of similar length are best encoded together."""
        return [self.length] * len(captions)

    def tokens(self, captions: Sequence[str]) -> list[int]:
        """Number of states of each caption that are not padding, including special tokens; all states if the encoder's
        padding states carry information (``mask=false``)."""
        return self.lengths(captions)


class ImageEncoder(Encoder):
    """Images to one vector each, for filtering and retrieval; some encoders also give one for each patch.

    Attributes:
        patch_width: width of the vector of a patch.
    """

    width: int
    patch_width: int = 0
    resolution: int
    device: torch.device
    preprocessing: Preprocessing

    @property
    def patch(self) -> int:
        """Edge of a patch of :meth:`encode_patches` in pixels; 0: the encoder has no features of patches."""
        return 0

    def preprocess(self, images: Sequence[Pixels]) -> Tensor:
        """Images uint8 (h, w, 3) of any sizes → (b, 3, resolution, resolution), for :meth:`encode`."""
        return self.preprocessing(images, self.resolution, self.device)

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """(b, 3, resolution, resolution) → float32 (b, width), of unit length."""

    def encode_patches(self, x: Tensor) -> Tensor:
        """(b, 3, h, w) of whole patches → float32 (b, n, patch_width), row by row; no class or register tokens."""
        raise NotImplementedError(f"{self.name} has no features of patches")

    def describe_patches(self) -> dict[str, Any]:
        """The manifest's entry for features of patches."""
        known = ("resolution", "width", "preprocessing")
        said = {name: value for name, value in self.describe().items() if name not in known}
        how = self.preprocessing.describe() | {"resize": f"{self.preprocessing.mode}, antialiased, crop of the latents"}
        return {**said, "width": self.patch_width, "patch": self.patch, "preprocessing": how}


class TextTower(ABC):
    """Captions to one vector each, in the same space as the images of the same model."""

    name: str
    width: int

    @abstractmethod
    def encode(self, captions: Sequence[str]) -> Tensor:
        """Captions → float32 (b, width), of unit length. Captions are truncated to the model's maximum length."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What the manifest records: name, version, width, and hashes of weights if there are any."""


def autoencoder(name: str, device: str | torch.device = "cpu", dtype: str = "float32") -> Autoencoder:
    """Create the autoencoder ``name``: ``embedded``, ``embedded16``, or a diffusers repository or folder.

    A repository is ``owner/name`` or ``owner/name@revision``.

    Raises:
        ConfigError: there is no such name or dtype, or the weights cannot be found.
    """
    _check_dtype(dtype)
    spec = ModelSpec.parse("vae", name)
    if spec.kind not in autoencoders:
        if "/" not in name and not Path(name).is_dir():
            known = nearest(name, [kind for kind in autoencoders if kind != "diffusers"])
            raise spec.error(f"{known} (or give a diffusers repo as owner/name, or a folder)")
        spec = ModelSpec("vae", name, "diffusers", name)
    found: Autoencoder = spec.find(autoencoders).from_spec(spec, device, dtype)
    return found


def text_encoder(name: str, device: str | torch.device = "cpu", dtype: str = "float32") -> TextEncoder:
    """Create the text encoder ``name``.

    ``embedded``; ``openclip:<model>[:<pretrained>]``; ``clip:<repo or folder>`` and ``t5:<repo or folder>`` of
    transformers; ``hf:<repo or folder>``, any language model or text tower that transformers can load (UMT5, Gemma,
    Qwen, SigLIP). Options follow ``#``: ``layer=penultimate``; for T5 ``length=<tokens>`` and ``mask=false``; for
    ``hf`` those of :class:`pipeline.encoders.language_model.LanguageModelEncoder`.

    Raises:
        ConfigError: there is no such name, model, weights or dtype.
    """
    _check_dtype(dtype)
    spec = ModelSpec.parse("text_encoder", name)
    if "=" in spec.kind:
        raise spec.error(f"this is an option of a model: append it to the model with #, as in t5:<repo>#{name}")
    found: TextEncoder = spec.find(text_encoders).from_spec(spec, device, dtype)
    return found


def image_encoder(name: str, device: str | torch.device = "cpu", dtype: str = "float32") -> ImageEncoder:
    """Create the image encoder ``name``: ``embedded``, ``openclip:<model>[:<pretrained>]``, ``clip:<repo or folder>``.

    Raises:
        ConfigError: there is no such name, model, weights or dtype.
    """
    _check_dtype(dtype)
    spec = ModelSpec.parse("image_encoder", name)
    found: ImageEncoder = spec.find(image_encoders).from_spec(spec, device, dtype)
    return found


def patch_encoder(name: str, device: str | torch.device = "cpu", dtype: str = "float32") -> ImageEncoder:
    """The image encoder called ``name`` for features of patches: ``embedded``, or ``hf:<repo or folder>``.

    Raises:
        ConfigError: no such name, model, weights or dtype, or the encoder has no features of patches.
    """
    _check_dtype(dtype)
    spec = ModelSpec.parse("image_features", name)
    kind = spec.find(image_encoders)
    if kind.encode_patches is ImageEncoder.encode_patches:
        raise spec.error("this encoder gives one vector for an image: use hf:<repo or folder>, or embedded")
    found: ImageEncoder = kind.from_spec(spec, device, dtype)
    if not found.patch:
        raise spec.error("this is not a vision transformer that gives one token for each patch of images of any size")
    return found


def _check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise ConfigError(f"model_dtype={dtype}: {nearest(dtype, DTYPES)}")


def repository(spec: str) -> tuple[str, str | None]:
    """Name and revision of ``owner/name[@revision]``; a folder has no revision."""
    if Path(spec).is_dir():
        return spec, None
    name, _, revision = spec.partition("@")
    return name, revision or None


def model_files(specs: Iterable[str]) -> dict[str, str]:
    """The local files that the models ``specs`` are loaded from, each with a state that changes with the file.

    The state is made of the file's size and its first and last MiB: the modification time differs between copies on
    several nodes, and hashing gigabytes would take too long. Repositories on the Hub are recorded by commit.
    """
    found: dict[str, str] = {}
    for spec in specs:
        model = ModelSpec.parse("", spec)
        kind, rest, options = model.kind, model.place, model.options
        for place in (rest or kind, rest.partition(":")[2], options.get("template", "")):
            if place and place not in autoencoders.builtin:
                found |= {str(path): _state_of(path) for path in _files_of(Path(place))}
    return found


def _files_of(place: Path) -> list[Path]:
    """A file, or the files of a folder except hidden ones and Markdown; for the folder of a pipeline's text encoder,
    the files of the whole pipeline."""
    if place.is_file():
        return [place]
    folder = place.parent if place.name.startswith("text_encoder") else place
    files = (path for path in folder.rglob("*") if path.suffix != ".md" and path.is_file()) if folder.is_dir() else ()
    return sorted(path for path in files if not any(part[0] == "." for part in path.relative_to(folder).parts))


def _state_of(path: Path) -> str:
    digest, size = xxhash.xxh3_128(), path.stat().st_size
    with path.open("rb") as file:
        digest.update(file.read(_ENDS))
        file.seek(max(0, size - _ENDS))
        digest.update(file.read(_ENDS))
    return f"{size}:{digest.hexdigest()}"


def commit_of(name: str, revision: str | None, file: str = "config.json") -> dict[str, str]:
    """``{"revision": <commit>}`` of a repository that was loaded from the Hub; empty for a folder."""
    from huggingface_hub import try_to_load_from_cache

    path = None if Path(name).exists() else try_to_load_from_cache(name, file, revision=revision)
    if not isinstance(path, str):
        return {}
    parts = Path(path).parts
    return {"revision": parts[parts.index("snapshots") + 1]}


def to_pixels(x: Tensor) -> npt.NDArray[Any]:
    """(b, 3, h, w) in [-1, 1] → uint8 (b, h, w, 3); values outside the range are clipped."""
    import torch

    pixels = ((x.float().clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)
    images: npt.NDArray[Any] = pixels.permute(0, 2, 3, 1).cpu().numpy()
    return images


def posterior_noise(seed: int, keys: Sequence[str], resolution: int, shape: tuple[int, int, int]) -> Tensor:
    """Standard normal float32 (b, *shape), keyed by (seed, sample key, resolution), not by rank or batch position."""
    import torch

    return torch.from_numpy(np.stack([normals(shape, seed, "posterior", key, resolution) for key in keys]))


def sent(values: Tensor, device: torch.device) -> Tensor:
    """Copy ``values`` from the host to ``device`` without synchronizing with a GPU."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def allow_graphs(count: int) -> None:
    """Allow torch.compile at least ``count`` graphs per function; beyond its limit, it stops compiling."""
    import torch

    config = torch._dynamo.config
    for name in ("recompile_limit", "accumulated_recompile_limit", "cache_size_limit"):
        if hasattr(config, name) and getattr(config, name) < count:
            setattr(config, name, count)


def weights_digest(model: torch.nn.Module) -> str:
    """xxh3-128 over names, dtypes, shapes and bytes of all weights, in the order of their names."""
    import torch

    digest = xxhash.xxh3_128()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n")
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
