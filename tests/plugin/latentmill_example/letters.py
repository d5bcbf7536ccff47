"""text_encoder=letters: each letter of a caption is a state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor

from pipeline.encoders.base import TextEncoder
from pipeline.encoders.spec import ModelSpec
from pipeline.registry import text_encoders

_ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789"


@text_encoders.register("letters")
class Letters(TextEncoder):
    """One-hot vectors of letters and digits; zeros for anything else and after the end.

    ``text_encoder=letters#length=16`` cuts captions to 16 characters.
    """

    takes = ("length",)
    name = "letters"
    width = len(_ALPHABET)

    def __init__(self, length: int, device: str | torch.device) -> None:
        self.length = length
        self.device = torch.device(device)

    @classmethod
    def from_spec(cls, spec: ModelSpec, device: str | torch.device, dtype: str) -> Self:
        return cls(spec.tokens("length") or 32, device)

    def encode(self, captions: Sequence[str]) -> Tensor:
        """Captions → float32 (b, length, width)."""
        states = torch.zeros(len(captions), self.length, self.width)
        for row, caption in zip(states, captions, strict=True):
            for place, letter in enumerate(caption.lower()[: self.length]):
                if letter in _ALPHABET:
                    row[place, _ALPHABET.index(letter)] = 1.0
        return states.to(self.device)

    def describe(self) -> dict[str, Any]:
        """What the manifest says of where the states come from."""
        return {"name": self.name, "version": 1, "length": self.length, "width": self.width}
