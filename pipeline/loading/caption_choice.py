"""Text states of several captions in one column, and the choice of a caption in each epoch.

With ``encode_captions=all``, a column of text states holds the states of all captions, concatenated in the order of the
columns ``captions`` and ``caption_sources``. If padding is not stored, ``caption_tokens`` holds the number of tokens of
each caption as unsigned 16-bit integers, little-endian.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from pipeline.config.schema import ConfigError
from pipeline.randomness import keyed_seed

TOKENS = np.dtype("<u2")
CHOICES = ("draw", "first", "all")


def tokens_column(column: str) -> str:
    """The column with the number of tokens of each caption whose states are in ``column``."""
    return column.replace("latents", "tokens")


def ends_of(
    size: int, tokens: npt.NDArray[Any] | None, shape: Sequence[int], storage: str, dtype: str, count: int
) -> npt.NDArray[np.int64]:
    """End of each caption's states in a column of ``size`` bytes: int64 (count,).

    Args:
        tokens: number of tokens of each caption, if padding is not stored.
        shape: (l, d) of a padded caption.

    Raises:
        ValueError: the number of bytes does not match the number of captions.
    """
    from pipeline.loading import text_storage  # imports torch

    if tokens is None:
        sizes = np.full(count, text_storage.size_of(shape, storage, dtype), np.int64)
    else:
        sizes = tokens.astype(np.int64) * text_storage.token_bytes(shape[1], storage, dtype)
    ends = np.cumsum(sizes)
    if len(sizes) != count or not count or int(ends[-1]) != size:
        raise ValueError(f"{size} bytes are not those of {count} captions of {shape[0]} x {shape[1]} numbers at most")
    return ends


def checked_weights(weights: Mapping[str, float], sources: Sequence[str]) -> dict[str, float]:
    """Raises ConfigError unless ``weights`` has a positive weight for each caption source, and for nothing else."""
    if not weights:
        return {}
    for name in weights:
        if name not in sources:
            raise ConfigError(
                f"caption_weights: no captions have the source {name!r}; the sources are {', '.join(sources)}"
            )
    missing = [name for name in sources if name not in weights]
    if missing:
        raise ConfigError(f"caption_weights: give a weight for {', '.join(missing)}, too")
    if min(weights.values()) <= 0:
        raise ConfigError(f"caption_weights: {dict(weights)}: each must be more than 0")
    return {name: float(weight) for name, weight in weights.items()}


def chosen(key: str, sources: Sequence[str], weights: Mapping[str, float], seed: int, epoch: int) -> int:
    """Index of the caption that a sample uses in epoch ``epoch``.

    A source is drawn by weight among those of the sample's captions, then one of its captions; without weights, all
    captions are equally likely. The choice depends only on the seed, the epoch and the sample's key.
    """
    draw = xxhash.xxh3_64_intdigest(key, keyed_seed(seed, "caption", epoch)) / 2.0**64
    if not weights:
        return min(int(draw * len(sources)), len(sources) - 1)
    shares = np.cumsum([weights[source] / sources.count(source) for source in sources])
    return min(int(np.searchsorted(shares, draw * shares[-1], "right")), len(sources) - 1)
