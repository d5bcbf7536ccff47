"""Layout of the slots that decoding workers fill for ``stage=score``: scores from pixels, and crops for models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pipeline.curation.scorers import get_scorer
from pipeline.curation.scorers.pixels import View
from pipeline.imaging.headers import ImageError, probe
from pipeline.imaging.slots import starts_of
from pipeline.imaging.transform import Pixels, decode

_SIZE = np.dtype(np.float64).itemsize


class Cut(Protocol):
    """A crop that a model needs; see :class:`pipeline.encoders.crop.Crop`."""

    @property
    def bytes(self) -> int: ...

    def cut(self, pixels: Pixels) -> Pixels: ...


@dataclass(frozen=True)
class ScoreLayout:
    """Layout of a slot: a float64 for each of the scorers ``names``, followed by the crops."""

    names: tuple[str, ...]
    crops: tuple[Cut, ...] = ()

    @property
    def starts(self) -> list[int]:
        """Byte offsets of the scores and each crop, followed by the size of the slot."""
        return starts_of((max(1, _SIZE * len(self.names)), *(crop.bytes for crop in self.crops)))

    def scores(self, slots: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """Copy the scores out of slots: uint8 (n, bytes) → (n, names)."""
        return slots[:, : _SIZE * len(self.names)].copy().view(np.float64).reshape(len(slots), len(self.names))

    def fill(self, slot: npt.NDArray[Any], data: bytes, key: str) -> tuple[int, int, str, str]:
        """Decode ``data`` once and fill ``slot``, uint8 (bytes,), with scores and crops, or with zeros on failure.

        Returns:
            Width and height of the image, and the reason and detail of a failure.
        """
        try:
            header = probe(data)
            view = View(decode(data, header), data, header)
            values = np.array([get_scorer(name).function(view) for name in self.names], np.float64)
            cuts = [crop.cut(view.pixels) for crop in self.crops]
        except ImageError as error:
            slot[:] = 0
            return 0, 0, error.reason, error.detail
        except MemoryError:
            slot[:] = 0
            return 0, 0, "out_of_memory", ""
        slot[: values.nbytes] = values.view(np.uint8)
        for cut, start in zip(cuts, self.starts[1:], strict=False):
            slot[start : start + cut.size] = cut.reshape(-1)
        height, width = view.pixels.shape[:2]
        return width, height, "", ""
