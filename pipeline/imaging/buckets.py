"""Aspect-ratio buckets: the sizes to which images of any shape are resized without distortion.

For a resolution R, the allowed sizes are all h x w with

- h and w multiples of ``step``,
- h * w <= R * R, and
- max(h, w) <= ``max_aspect_ratio`` * min(h, w).

A *bucket* is an allowed size that is not contained in another one (none is at least as high and as wide). An image of
size H x W is assigned to the bucket with the closest aspect ratio on a logarithmic scale, that is, with the smallest

    max(w * H, h * W) / min(w * H, h * W)

Ties are broken by larger area, then shorter long edge, then larger height. The image is resized to cover the bucket
(its aspect ratio is kept to within one pixel), and the excess is cropped.

All computations use integers, so that results are the same on all platforms. Does not import torch.
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
"""Columns of latents with buckets: size of the upright image before cropping."""
BUCKET_COLUMNS = ("height", "width", "crop_top", "crop_left")
"""Further columns for each resolution R (``height_R`` and so on): size of the bucket in pixels, and the position of the
crop in the resized image."""
_REMEMBERED = 1 << 16  # cached image sizes


@dataclass(frozen=True)
class Buckets:
    """The buckets of one resolution.

    Attributes:
        resolution: no bucket has a larger area than a square with this edge.
        step: all edges are multiples of this.
        max_aspect_ratio: maximum of longer over shorter edge.
        upscale: how to treat an image that its bucket would enlarge. ``true``: enlarge it; ``smaller``: choose among
            the allowed sizes that do not enlarge it and that no other such size contains; ``false``: it has no bucket.
        crop: how a resized image is cropped: ``center``, or ``random``, at a position keyed by seed, sample and
            resolution.
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
        """Create the buckets that a manifest describes."""
        return cls(**{name: value for name, value in described.items() if name != "sizes"})

    def describe(self) -> dict[str, Any]:
        """The description for the manifest: the settings and the resulting sizes."""
        return {**asdict(self), "sizes": [list(size) for size in self.sizes]}

    @property
    def largest(self) -> int:
        """Number of pixels of the largest bucket."""
        return max(height * width for height, width in self.sizes)

    @cached_property
    def allowed(self) -> tuple[Size, ...]:
        """All allowed sizes, sorted by height and width."""
        edges = range(self.step, int(self.resolution * self.max_aspect_ratio) + 1, self.step)
        return tuple((h, w) for h in edges for w in edges if self._allows(h, w))

    def _allows(self, height: int, width: int) -> bool:
        short, long = sorted((height, width))
        return height * width <= self.resolution**2 and long <= self.max_aspect_ratio * short

    @cached_property
    def sizes(self) -> tuple[Size, ...]:
        """The possible sizes of resized images, sorted by height and width."""
        return self.allowed if self.upscale == "smaller" else _uncontained(self.allowed)

    def size_of(self, height: int, width: int) -> Size | None:
        """The bucket of an upright image of this size; None if it has none."""
        return _size_of(self, height, width)

    def place_of(self, height: int, width: int, seed: int, key: str) -> Placed | None:
        """The crop of an image; ``seed`` and the sample's ``key`` are only used if ``crop`` is ``random``."""
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
    """A crop of ``size`` from a resized image, ``top`` and ``left`` pixels from its upper left corner."""

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
    """Those of ``sizes`` that no other one contains, sorted by height."""
    found: list[Size] = []
    for height, width in sorted(sizes, reverse=True):
        if not found or width > found[-1][1]:
            found.append((height, width))
    return tuple(reversed(found))


def covering(source: Size, size: Size) -> Size:
    """The smallest size, rounded down, at which an image of size ``source`` covers ``size``."""
    (height, width), (h, w) = source, size
    return (h, h * width // height) if w * height <= h * width else (w * height // width, w)


def kept_fraction(source: Size, size: Size) -> float:
    """Fraction of the pixels of an image of size ``source`` that remains after cropping it to ``size``."""
    (height, width), (h, w) = source, size
    short, long = sorted((w * height, h * width))
    return short / long


class Runs:
    """Run-length encoding of the buckets of a partition's samples, in the order in which they are stored.

    Args:
        buckets: buckets by column of latents, in the order of the resolutions.

    Attributes:
        runs: lists ``[sizes, count]``, where ``sizes`` has [height, width] for each column; JSON-serializable.
    """

    def __init__(self, buckets: Mapping[str, Buckets]) -> None:
        self.buckets = dict(buckets)
        self.runs: list[list[Any]] = []

    def add(self, height: int, width: int) -> None:
        """Add the next sample, whose image has this size."""
        sizes = [list(buckets.size_of(height, width) or (0, 0)) for buckets in self.buckets.values()]
        if self.runs and self.runs[-1][0] == sizes:
            self.runs[-1][1] += 1
        else:
            self.runs.append([sizes, 1])


def buckets_in(extra: Mapping[str, Any]) -> dict[str, Buckets]:
    """The buckets in a manifest (or a plan's ``extra``) by column of latents; empty for square latents."""
    return {column: Buckets.of(described) for column, described in extra.get("buckets", {}).items()}
