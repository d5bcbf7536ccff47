"""Aspect-ratio buckets: the sizes that images of any shape are brought to without distortion.

For a resolution R, the allowed sizes are all h x w with

- h and w multiples of ``step``,
- h * w <= R * R, and
- max(h, w) <= ``max_aspect_ratio`` * min(h, w).

A *bucket* is an allowed size that no other allowed size contains (no other is at least as high and as wide). An image
of H x W goes to the bucket whose aspect ratio is nearest on a logarithmic scale, that is, with the smallest

    max(w * H, h * W) / min(w * H, h * W)

Ties go to the larger area, then to the shorter long edge, then to the larger height. The image is resized so that it
covers the bucket (its aspect ratio is kept to within one pixel), and what is over is cut off.

Everything here is in integers, so that all platforms agree. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from typing import Any

from pipeline.config.options import ConfigError
from pipeline.randomness import uniforms

Size = tuple[int, int]
"""Height and width in pixels."""
ORIGINAL_COLUMNS = ("original_height", "original_width")
"""Columns of latents with buckets: size of the upright image that was cut."""
BUCKET_COLUMNS = ("height", "width", "crop_top", "crop_left")
"""The same for each resolution R, as ``height_R`` and so on: size of the bucket in pixels, and where it was cut from
the image when that had been resized to cover it."""
_REMEMBERED = 1 << 16  # sizes of images


@dataclass(frozen=True)
class Buckets:
    """The buckets of one resolution.

    Attributes:
        resolution: edge of the square whose area no bucket exceeds.
        step: edges are multiples of this.
        max_aspect_ratio: longer over shorter edge, at most.
        upscale: what becomes of an image that its bucket would enlarge. ``true``: it is enlarged; ``smaller``: only
            sizes that do not enlarge it count, and it goes to the nearest of those that no other of them contains;
            ``false``: it has no bucket.
        crop: where a resized image is cut: ``center``, or ``random``, at a place keyed by seed, sample and resolution.
    """

    resolution: int
    step: int = 64
    max_aspect_ratio: float = 2.0
    upscale: str = "true"
    crop: str = "center"

    def __post_init__(self) -> None:
        if not self.sizes:
            raise ConfigError(
                f"image_resolutions={self.resolution}: no size whose edges are multiples of {self.step} has at most "
                f"{self.resolution} x {self.resolution} pixels: give a smaller bucket_step="
            )

    @classmethod
    def of(cls, described: Mapping[str, Any]) -> Buckets:
        """The buckets that a manifest describes."""
        return cls(**{name: value for name, value in described.items() if name != "sizes"})

    def describe(self) -> dict[str, Any]:
        """What the manifest records: the settings, and the sizes that they give."""
        return {**asdict(self), "sizes": [list(size) for size in self.sizes]}

    @property
    def largest(self) -> int:
        """Pixels of the largest bucket."""
        return max(height * width for height, width in self.sizes)

    @cached_property
    def allowed(self) -> tuple[Size, ...]:
        """All allowed sizes, by height and width."""
        edges = range(self.step, int(self.resolution * self.max_aspect_ratio) + 1, self.step)
        return tuple((h, w) for h in edges for w in edges if self._allows(h, w))

    def _allows(self, height: int, width: int) -> bool:
        short, long = sorted((height, width))
        return height * width <= self.resolution**2 and long <= self.max_aspect_ratio * short

    @cached_property
    def sizes(self) -> tuple[Size, ...]:
        """The sizes that images can come to, by height and width."""
        return self.allowed if self.upscale == "smaller" else _uncontained(self.allowed)

    def size_of(self, height: int, width: int) -> Size | None:
        """The bucket of an upright image of this size; None if it has none."""
        return _size_of(self, height, width)

    def place_of(self, height: int, width: int, seed: int, key: str) -> Placed | None:
        """How an image becomes its bucket; ``seed`` and the sample's ``key`` matter where ``crop`` is ``random``."""
        size = self.size_of(height, width)
        if size is None:
            return None
        over = tuple(whole - part for whole, part in zip(covering((height, width), size), size, strict=True))
        if self.crop == "random":
            draws = uniforms(2, seed, "crop", key, self.resolution)
            top, left = (int(u * (free + 1)) for u, free in zip(draws.tolist(), over, strict=True))
        else:
            top, left = (free // 2 for free in over)
        return Placed(size, top, left)


@dataclass(frozen=True)
class Placed:
    """Where the part of ``size`` lies that is cut from a resized image: pixels from its upper left corner."""

    size: Size
    top: int
    left: int


@lru_cache(_REMEMBERED)
def _size_of(buckets: Buckets, height: int, width: int) -> Size | None:
    candidates: Iterable[Size] = buckets.sizes
    if buckets.upscale == "smaller":
        candidates = _uncontained([(h, w) for h, w in buckets.allowed if h <= height and w <= width])
    nearest = min(candidates, key=lambda size: _distance(size, height, width), default=None)
    if nearest and buckets.upscale == "false" and (nearest[0] > height or nearest[1] > width):
        return None
    return nearest


def _distance(size: Size, height: int, width: int) -> tuple[Fraction, int, int, int]:
    h, w = size
    short, long = sorted((w * height, h * width))
    return Fraction(long, short), -h * w, max(h, w), -h


def _uncontained(sizes: Sequence[Size]) -> tuple[Size, ...]:
    """Those of ``sizes`` that no other of them contains, by height."""
    found: list[Size] = []
    for height, width in sorted(sizes, reverse=True):
        if not found or width > found[-1][1]:
            found.append((height, width))
    return tuple(reversed(found))


def covering(source: Size, size: Size) -> Size:
    """Height and width at which an image of size ``source`` just covers ``size``, rounded down."""
    (height, width), (h, w) = source, size
    return (h, h * width // height) if w * height <= h * width else (w * height // width, w)


def kept_fraction(source: Size, size: Size) -> float:
    """Which part of the pixels of an image of size ``source`` is left when it covers ``size``."""
    (height, width), (h, w) = source, size
    short, long = sorted((w * height, h * width))
    return short / long


class Runs:
    """The samples of a partition as they are stored: how many in a row have the same bucket in every column.

    Args:
        buckets: by column of latents, in the order of the resolutions.

    Attributes:
        runs: a list of ``[sizes, count]`` each, with ``sizes`` as [height, width] for each column; JSON-able.
    """

    def __init__(self, buckets: Mapping[str, Buckets]) -> None:
        self.buckets = dict(buckets)
        self.runs: list[list[Any]] = []

    def add(self, height: int, width: int) -> None:
        """The next sample was made of an image of this size."""
        sizes = [list(buckets.size_of(height, width) or (0, 0)) for buckets in self.buckets.values()]
        if self.runs and self.runs[-1][0] == sizes:
            self.runs[-1][1] += 1
        else:
            self.runs.append([sizes, 1])


def buckets_in(extra: Mapping[str, Any]) -> dict[str, Buckets]:
    """The buckets that a manifest (or a plan's ``extra``) describes, by column of latents; none for square latents."""
    return {column: Buckets.of(described) for column, described in extra.get("buckets", {}).items()}
