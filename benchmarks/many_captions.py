"""Bytes of text states of several captions per sample, with and without padding, for captions as long as COCO's.

    python benchmarks/many_captions.py [samples=20000] [captions=5] [width=1024] [length=77]

Captions have as many words as COCO's (normally distributed, mean 10.5, standard deviation 2.4, at least 7), with 1.3
tokens per word and two special tokens, as CLIP's tokenizer makes on average. Sizes are those stored by
stage=precompute, which depend only on the number of tokens.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from pipeline.loading import text_storage
from pipeline.loading.caption_choice import TOKENS

WORDS, DEVIATION, LEAST = 10.5, 2.4, 7.0
TOKENS_PER_WORD, MARKS = 1.3, 2


def main() -> None:
    given = {name: int(value) for name, value in (argument.split("=") for argument in sys.argv[1:])}
    samples, captions = given.get("samples", 20_000), given.get("captions", 5)
    length, width = given.get("length", 77), given.get("width", 1024)
    words = np.maximum(np.random.default_rng(0).normal(WORDS, DEVIATION, (samples, captions)), LEAST)
    tokens = np.minimum(np.round(words * TOKENS_PER_WORD + MARKS).astype(np.int64), length)
    print(f"{samples} samples with {captions} captions of {tokens.mean():.1f} of {length} tokens, {width} numbers each")
    dense = captions * text_storage.size_of((length, width), "dense", "float16")
    for storage in ("dense", "ragged", "int8", "int8+ragged"):
        size = float(captions * text_storage.size_of((length, width), storage, "float16"))
        if text_storage.is_ragged(storage):
            each = text_storage.token_bytes(width, storage, "float16")
            size = tokens.sum() * each / samples + captions * TOKENS.itemsize
        print(f"{storage:12} {size / 1024:8.1f} KiB a sample, {size / dense:6.1%} of dense")


if __name__ == "__main__":
    main()
