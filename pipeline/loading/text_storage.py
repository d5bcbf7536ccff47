"""How text states are stored: unchanged or in 8 bits with a scale per token; with or without padding.

A caption in 8 bits is its scales, float16 (l,), followed by its values, one byte each (l, d): value = byte * scale.

``ragged`` omits padding: a caption of n tokens is stored as (n, d) states, or as n scales and then (n, d) values. The
number of tokens is thus the number of bytes divided by :func:`token_bytes`. Readers get l tokens, with zeros after n.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_LARGEST = {"int8": 127.0, "fp8": 448.0}
_FP8 = torch.float8_e4m3fn


def kind_of(storage: str) -> str:
    """Return ``dense``, ``int8`` or ``fp8`` for a setting such as ``int8+ragged+dedup``."""
    kind = storage.partition("+")[0]
    return kind if kind in _LARGEST else "dense"


def is_dedup(storage: str) -> bool:
    return storage.endswith("dedup")


def is_ragged(storage: str) -> bool:
    return "ragged" in storage.split("+")


def size_of(shape: Sequence[int], storage: str, dtype: str) -> int:
    """Number of bytes of a caption's states of ``shape`` (l, d), including padding."""
    length, width = shape
    return length * token_bytes(width, storage, dtype)


def token_bytes(width: int, storage: str, dtype: str) -> int:
    """Number of bytes of one token's state of ``width`` numbers."""
    return width * np.dtype(dtype).itemsize if kind_of(storage) == "dense" else 2 + width


def cut(packed: npt.NDArray[Any], tokens: int, shape: Sequence[int], storage: str, dtype: str) -> npt.NDArray[Any]:
    """The first ``tokens`` of a caption's packed states, uint8 (bytes,) of ``shape`` (l, d)."""
    length, width = shape
    if kind_of(storage) == "dense":
        return packed[: tokens * token_bytes(width, storage, dtype)]
    return np.concatenate([packed[: 2 * tokens], packed[2 * length : 2 * length + tokens * width]])


def spread(stored: npt.NDArray[Any], target: npt.NDArray[Any], shape: Sequence[int], storage: str, dtype: str) -> int:
    """The inverse of :func:`cut`: copy the ``stored`` states of a caption, uint8 (bytes,), to ``target``, padded with
    zeros. Returns the number of tokens.

    Raises:
        ValueError: the bytes are not a whole number of tokens from 0 to l.
    """
    length, width = shape
    tokens, rest = divmod(len(stored), token_bytes(width, storage, dtype))
    if rest or tokens > length:
        raise ValueError(f"{len(stored)} bytes are not those of 0 to {length} tokens of {width} numbers")
    target[:] = 0
    if kind_of(storage) == "dense":
        target[: len(stored)] = stored
    else:
        target[: 2 * tokens] = stored[: 2 * tokens]
        target[2 * length : 2 * length + tokens * width] = stored[2 * tokens :]
    return tokens


def pack(states: Tensor, storage: str, dtype: str) -> Tensor:
    """Pack states: float (b, l, d) → uint8 (b, bytes), on the same device."""
    kind = kind_of(storage)
    if kind == "dense":
        return states.to(getattr(torch, dtype)).contiguous().flatten(1).view(torch.uint8)
    largest = _LARGEST[kind]
    scales = (states.abs().amax(2) / largest).to(torch.float16)
    divided = states / scales.float().clamp(min=2.0**-24)[:, :, None]
    clipped = divided.clamp(-largest, largest)
    values = clipped.round().to(torch.int8) if kind == "int8" else clipped.to(_FP8)
    parts = [scales.contiguous().view(torch.uint8), values.contiguous().flatten(1).view(torch.uint8)]
    return torch.cat(parts, 1)


def unpack(packed: Tensor, shape: Sequence[int], storage: str, dtype: str) -> Tensor:
    """Unpack states: uint8 (b, bytes) → (b, l, d), in ``dtype`` if dense, else in float16.

    Values that are not finite stay so when packed: the scale of a NaN is NaN.
    """
    length, width = shape
    kind = kind_of(storage)
    if kind == "dense":
        return packed.contiguous().view(getattr(torch, dtype)).reshape(-1, length, width)
    scales = packed[:, : 2 * length].contiguous().view(torch.float16)
    values = packed[:, 2 * length :].contiguous().view(torch.int8 if kind == "int8" else _FP8)
    values = values.reshape(-1, length, width)
    if kind == "fp8":
        values = values.to(torch.float16)
    return values * scales[:, :, None]


def cosine_error(states: Tensor, storage: str, dtype: str) -> dict[str, float]:
    """1 - cosine between states (b, l, d) before and after packing: mean and maximum over tokens that are not zero."""
    back = unpack(pack(states, storage, dtype), states.shape[1:], storage, dtype).double()
    exact = states.double()
    there = exact.abs().amax(2) > 0
    errors = 1 - torch.nn.functional.cosine_similarity(exact[there], back[there], dim=-1, eps=1e-30)
    if not errors.numel():
        return {"mean": 0.0, "max": 0.0}
    return {"mean": round(float(errors.mean()), 9), "max": round(float(errors.max()), 9)}
