"""scorers=redness: how red an image is."""

from __future__ import annotations

from pipeline.curation.scorers import scorer
from pipeline.curation.scorers.pixels import View


@scorer("pixels")
def redness(view: View) -> float:
    """Share of an image's light that is red, in 0..1; 0 for a black image."""
    red, green, blue = view.small.astype(float).sum((0, 1))
    return float(red / (red + green + blue)) if red + green + blue else 0.0
