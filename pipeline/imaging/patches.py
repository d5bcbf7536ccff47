"""The patches of an image encoder on the part of an image that latents are made of. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.imaging.buckets import Size

FEATURES = "image_features_"
"""Columns of image features, for each resolution R as ``image_features_R``."""


@dataclass(frozen=True)
class PatchGrid:
    """The patches of latents of one resolution.

    The crop of the latents, h x w pixels, is resized to whole patches of p x p pixels, a square of ``resolution`` to
    ``edge``. An edge of h pixels has

        max(1, round(h * edge / (resolution * p)))

    patches; halves are rounded up.

    Attributes:
        resolution: of the latents.
        edge: of the encoder's input for a square of ``resolution``, in pixels; a multiple of ``patch``.
        patch: edge of a patch in pixels.
    """

    resolution: int
    edge: int
    patch: int

    def describe(self) -> dict[str, Any]:
        """What the manifest records."""
        return asdict(self)

    def shape(self, size: Size) -> Size:
        """Rows and columns of patches for a crop of this size."""
        height, width = (max(1, self._rounded(edge)) for edge in size)
        return height, width

    def _rounded(self, edge: int) -> int:
        whole = self.resolution * self.patch
        return (2 * edge * self.edge + whole) // (2 * whole)

    def count(self, size: Size | None = None) -> int:
        """Number of patches for a crop of this size; None: of the square."""
        return math.prod(self.shape(size or (self.resolution, self.resolution)))

    def pixels(self, size: Size) -> Size:
        """Height and width of the encoder's input for a crop of this size."""
        rows, columns = self.shape(size)
        return rows * self.patch, columns * self.patch


def grids_in(extra: Mapping[str, Any]) -> dict[str, PatchGrid]:
    """The patches that a manifest (or a plan's ``extra``) describes, by column of image features."""
    described = extra.get("image_features", {}).get("patches", {})
    return {column: PatchGrid(**grid) for column, grid in described.items()}
