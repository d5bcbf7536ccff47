"""The key-value cache of a decoder that generates texts."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor


class Cache(ABC):
    """What a decoder remembers of the texts it is writing: ``group`` texts for each image, side by side."""

    @abstractmethod
    def step(self, tokens: Tensor) -> Tensor:
        """The next tokens (n, l) of all texts → logits (n, vocab) of what follows the last of them."""

    @abstractmethod
    def reorder(self, index: Tensor) -> None:
        """Text i resumes from what text ``index[i]`` was; both are of the same image. (n,) int64."""
