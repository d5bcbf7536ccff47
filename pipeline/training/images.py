"""Labelled images as tensors, and their augmentation, whose random numbers are keyed by (seed, epoch, sample).

RandAugment's operations are Pillow's. torchvision.transforms.v2 takes 1.4 times as long on one core, and 8 of its 13
operations give different pixels (``python benchmarks/augmentation.py``). The others are a few lines on tensors, because
torchvision draws from torch's global generator instead of keyed random numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from pipeline.config.schema import ConfigError, TrainConfig
from pipeline.imaging import transform
from pipeline.imaging.decoder import ImageDecoder
from pipeline.loading import Rows
from pipeline.randomness import uniforms
from pipeline.training.tasks.base import Batch, Keys

_CACHED = 2**30  # bytes of pixels up to which a dataset is decoded once and cached
_BLOCK = 256
Draws = npt.NDArray[Any]
"""Uniform random numbers of one sample, float64 (n,)."""


class ImageDataset:
    """Images and labels of stored samples.

    Small datasets are decoded once and cached; images of larger ones are decoded at each access.

    Training decodes in its own processes, without limits, as it reads only dataset directories that a stage has
    finished. Untrusted images go through ``stage=filter`` first, which uses the isolated decoder
    (:mod:`pipeline.imaging.worker_pool`). Pass ``decoder`` to read images that have not been checked.

    Args:
        rows: samples with ``jpg`` and ``label``.
        size: edge of the square images.
        margin: images are resized to ``size * margin`` and center-cropped (for large images, 1.143 = 256 / 224).
        decoder: decodes the images in other processes; an image that cannot be decoded is zeros, has the label -1 and
            is recorded in ``failed``.
    """

    def __init__(self, rows: Rows, size: int, margin: float = 1.0, decoder: ImageDecoder | None = None) -> None:
        self.rows, self.size, self._margin = rows, size, margin
        self.failed: dict[str, str] = {}
        """Keys of images that could not be decoded, with the reasons."""
        self._decoder = decoder
        self.names: dict[int, str] = {}
        """Class names by label, from the top folder in samples' keys."""
        self._images: npt.NDArray[Any] | None = None
        self.labels: npt.NDArray[Any] | None = None
        if len(rows) * size * size * 3 <= _CACHED:
            self._keep()

    def __len__(self) -> int:
        return len(self.rows)

    def __getstate__(self) -> dict[str, Any]:
        """State for worker processes: cached pixels are shared with them, not copied."""
        state = dict(self.__dict__)
        if self._images is not None:
            shared = torch.from_numpy(self._images).share_memory_()
            self._images = shared.numpy()
            state["_images"] = shared
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        shared = state.pop("_images")
        self.__dict__.update(state, _images=None if shared is None else shared.numpy())

    def _keep(self) -> None:
        pixels = np.empty((len(self), 3, self.size, self.size), np.uint8)
        labels = np.empty(len(self), np.int64)
        for start in range(0, len(self), _BLOCK):
            some = range(start, min(start + _BLOCK, len(self)))
            pixels[some.start : some.stop], labels[some.start : some.stop] = self._decoded(np.array(some))
        self._images, self.labels = pixels, labels

    def batch(self, positions: npt.NDArray[Any], epochs: npt.NDArray[Any] | None = None) -> Batch:
        """``images`` uint8 (b, 3, h, w) and ``labels`` int64 (b,), in the order of ``positions``.

        Raises:
            ValueError: a sample has no label, or its image cannot be decoded.
        """
        if self._images is not None and self.labels is not None:
            pixels, labels = self._images[positions], self.labels[positions]
        else:
            pixels, labels = self._decoded(positions)
        return {"images": torch.from_numpy(pixels), "labels": torch.from_numpy(labels)}

    def _decoded(self, positions: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        rows = self.rows.rows([int(position) for position in positions])
        if self._decoder is None:
            pixels = np.stack([self._cut(_decoded_here(row)) for row in rows])
            return pixels, np.array([self._label(row) for row in rows], np.int64)
        pixels = np.zeros((len(rows), 3, self.size, self.size), np.uint8)
        labels = np.full(len(rows), -1, np.int64)
        for (place, row), image in self._decoder.pixels(((place, row), row["jpg"]) for place, row in enumerate(rows)):
            if isinstance(image, np.ndarray):
                pixels[place], labels[place] = self._cut(image), self._label(row)
            else:
                self.failed[str(row.get("key"))] = str(image)
        return pixels, labels

    def _label(self, row: dict[str, Any]) -> int:
        if row.get("label") is None:
            raise ValueError(f"sample {row.get('key')!r} has no label")
        label = int(row["label"])
        folder, slash, _ = str(row.get("key", "")).partition("/")
        if slash:
            self.names.setdefault(label, folder)
        return label

    def _cut(self, pixels: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Resize and center-crop an image, uint8 (h, w, 3) → uint8 (3, size, size)."""
        edge = max(self.size, round(self.size * self._margin))
        height, width = pixels.shape[:2]
        if min(height, width) != edge:
            scale = edge / min(height, width)
            pixels = transform.resize(pixels, (max(edge, round(width * scale)), max(edge, round(height * scale))))
        top, left = (pixels.shape[0] - self.size) // 2, (pixels.shape[1] - self.size) // 2
        return np.ascontiguousarray(pixels[top : top + self.size, left : left + self.size].transpose(2, 0, 1))


def _decoded_here(row: dict[str, Any]) -> npt.NDArray[Any]:
    try:
        return transform.decode(row["jpg"], transform.probe(row["jpg"], transform.Limits()))
    except transform.ImageError as error:
        raise ValueError(f"sample {row.get('key')!r}: {error}") from error


class Augmentation:
    """The augmentation selected in the config, of crop, flip, affine, RandAugment and erasing.

    Args:
        size: edge of the output (0: as the input).
    """

    def __init__(self, config: TrainConfig, size: int = 0) -> None:
        self._config, self._size = config, size
        names = ("shift", "flip", "rotate", "shear", "randaugment", "erase")
        self.given = [name for name in names if getattr(config, name)] + ["crop_scale"] * (config.crop_scale < 1)
        """Names of the settings that have an effect."""

    def __call__(self, pixels: Tensor, keys: Keys) -> Tensor:
        """uint8 (b, 3, h, w) → the same or (b, 3, size, size); each image depends only on (seed, epoch, position)."""
        config = self._config
        draws = np.stack(
            [
                uniforms(16 + 3 * config.randaugment, keys.seed, "augment", int(epoch), int(position))
                for epoch, position in zip(keys.epochs, keys.positions, strict=True)
            ]
        )
        moved = self._moved(pixels, torch.from_numpy(draws[:, :8]).float())
        out = []
        for image, draw in zip(moved, draws, strict=True):
            if config.randaugment:
                image = _randaugment(image, draw[16:], config.randaugment_magnitude / 10)
            if draw[8] < config.erase:
                image = _erased(image, draw[9:13])
            out.append(image)
        return torch.stack(out)

    def _moved(self, pixels: Tensor, u: Tensor) -> Tensor:
        """Crop, flip and affine map in one resampling; exact for shifts by whole pixels without rotation or scaling."""
        config = self._config
        b, _, height, width = pixels.shape
        angle = (2 * u[:, 0] - 1) * config.rotate * torch.pi / 180
        shear = (2 * u[:, 1] - 1) * config.shear
        lowest = config.crop_scale
        zoom = (lowest + (1 - lowest) * u[:, 2]).sqrt()  # edge of the crop, as a fraction
        aspect = torch.exp((2 * u[:, 6] - 1) * np.log(4 / 3)) if lowest < 1 else torch.ones(b)
        wide, high = (zoom * aspect.sqrt()).clamp(max=1), (zoom / aspect.sqrt()).clamp(max=1)
        shift_x = (2 * u[:, 3] - 1) * (1 - wide) + 2 * torch.round((2 * u[:, 3] - 1) * config.shift) / width
        shift_y = (2 * u[:, 4] - 1) * (1 - high) + 2 * torch.round((2 * u[:, 4] - 1) * config.shift) / height
        mirror = torch.where(u[:, 5] < config.flip, -1.0, 1.0)
        cos, sin = angle.cos(), angle.sin()
        rows = [
            torch.stack([cos * wide * mirror, (shear - sin) * high, shift_x], 1),
            torch.stack([sin * wide * mirror, cos * high, shift_y], 1),
        ]
        out = (self._size, self._size) if self._size else (height, width)
        grid = F.affine_grid(torch.stack(rows, 1), [b, 3, *out], align_corners=False)
        moved = F.grid_sample(pixels.float(), grid, align_corners=False, padding_mode="zeros")
        return moved.round().clamp(0, 255).to(torch.uint8)


def centre(pixels: Tensor, size: int) -> Tensor:
    """Center-crop (b, c, h, w) to (b, c, size, size)."""
    top, left = (pixels.shape[2] - size) // 2, (pixels.shape[3] - size) // 2
    return pixels[:, :, top : top + size, left : left + size]


def _erased(image: Tensor, u: Draws) -> Tensor:
    """Random erasing (Zhong et al. 2020): fill a rectangle of 2 to 33 % of the area with grey."""
    _, height, width = image.shape
    area, aspect = 0.02 + 0.31 * u[0], np.exp((2 * u[1] - 1) * np.log(1 / 0.3))
    h = min(height, max(1, round(height * np.sqrt(area * aspect))))
    w = min(width, max(1, round(width * np.sqrt(area / aspect))))
    top, left = int(u[2] * (height - h + 1)), int(u[3] * (width - w + 1))
    image = image.clone()
    image[:, top : top + h, left : left + w] = 127
    return image


def _affine(
    image: Image.Image, a: float = 1, b: float = 0, c: float = 0, d: float = 0, e: float = 1, f: float = 0
) -> Any:
    return image.transform(
        image.size, Image.Transform.AFFINE, (a, b, c, d, e, f), Image.Resampling.BILINEAR, fillcolor=(127, 127, 127)
    )


OPERATIONS: tuple[Callable[[Image.Image, float], Image.Image], ...] = (
    lambda image, m: image,
    lambda image, m: ImageOps.autocontrast(image),
    lambda image, m: ImageOps.equalize(image),
    lambda image, m: image.rotate(30 * m, Image.Resampling.BILINEAR, fillcolor=(127, 127, 127)),
    lambda image, m: ImageOps.posterize(image, 8 - round(4 * abs(m))),
    lambda image, m: ImageOps.solarize(image, round(256 * (1 - abs(m)))),
    lambda image, m: ImageEnhance.Color(image).enhance(1 + 0.9 * m),
    lambda image, m: ImageEnhance.Contrast(image).enhance(1 + 0.9 * m),
    lambda image, m: ImageEnhance.Brightness(image).enhance(1 + 0.9 * m),
    lambda image, m: ImageEnhance.Sharpness(image).enhance(1 + 0.9 * m),
    lambda image, m: _affine(image, b=0.3 * m),
    lambda image, m: _affine(image, d=0.3 * m),
    lambda image, m: _affine(image, c=0.45 * m * image.width),
    lambda image, m: _affine(image, f=0.45 * m * image.height),
)
"""RandAugment's operations, with a strength in [-1, 1]."""


def _randaugment(image: Tensor, u: Draws, magnitude: float) -> Tensor:
    """RandAugment (Cubuk et al. 2020) with magnitudes in [-1, 1] that vary slightly, as in timm."""
    augmented = Image.fromarray(image.permute(1, 2, 0).numpy())
    for which, strength, sign in u.reshape(-1, 3):
        m = float(np.clip(magnitude + 0.1 * (strength - 0.5), 0, 1)) * (1 if sign < 0.5 else -1)
        augmented = OPERATIONS[int(which * len(OPERATIONS))](augmented, m)
    return torch.from_numpy(np.array(augmented)).permute(2, 0, 1)


def mixes(keys: Keys, config: TrainConfig, height: int, width: int) -> Batch:
    """Weights for mixing each sample with its neighbour in the batch: ``keep`` float32 (b,), the share of the sample,
    and for cutmix (Yun et al. 2019) ``box`` int64 (b, 4), the rows and columns taken from the neighbour, else empty
    boxes.

    Neighbours are slots 2i and 2i + 1, which share their draw, so that the result does not depend on the number of
    ranks.

    Raises:
        ConfigError: pairs would be split between ranks or parts of the batch.
    """
    if keys.slots[0] % 2 or len(keys.slots) % 2:
        raise ConfigError(
            "mixup= and cutmix= pair samples: batch_size= must be a multiple of twice the number of ranks, and "
            "micro_batch= even"
        )
    keep = np.ones(len(keys.slots), np.float32)
    box = np.zeros((len(keys.slots), 4), np.int64)
    for place in range(0, len(keys.slots), 2):
        u = np.random.default_rng([keys.seed, 7, keys.step, int(keys.slots[place])])
        if u.random() >= config.mix_probability:
            continue
        cut = config.cutmix > 0 and (config.mixup <= 0 or u.random() < 0.5)
        alpha = config.cutmix if cut else config.mixup
        share = float(u.beta(alpha, alpha))
        if cut:
            edge = np.sqrt(1 - share)
            h, w = round(height * edge), round(width * edge)
            top, left = int(u.integers(0, height - h + 1)), int(u.integers(0, width - w + 1))
            box[place : place + 2] = top, top + h, left, left + w
            share = 1 - h * w / (height * width)
        keep[place : place + 2] = share
    return {"keep": torch.from_numpy(keep), "box": torch.from_numpy(box)}
