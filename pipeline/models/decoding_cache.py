"""The key-value cache of a decoder that generates texts."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor


class Cache(ABC):
    """A decoder's state while it generates ``group`` consecutive texts for each image."""

    @abstractmethod
    def step(self, tokens: Tensor) -> Tensor:
        """Append tokens (n, l) to all texts; returns logits (n, vocab) of the token after the last."""

    @abstractmethod
    def reorder(self, index: Tensor) -> None:
        """Let text i continue from text ``index[i]``, which must be of the same image; ``index``: (n,) int64."""
