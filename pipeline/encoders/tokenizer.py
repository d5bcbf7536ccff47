"""Conversion between captions and tokens: byte-level BPE trained on captions, or a pretrained tokenizer by name."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import decoders as byte_decoders
from tokenizers import models, pre_tokenizers, trainers

from pipeline.config.schema import ConfigError
from pipeline.encoders.from_hub import expect_model

PAD, BEGIN, END, ANSWER = "<pad>", "<s>", "</s>", "<answer>"
"""Padding, start and end of a text; ``<answer>`` separates a question from its answer."""
SPECIAL = (PAD, BEGIN, END, ANSWER)
_MIN_FREQUENCY = 2


@dataclass
class Tokenizer:
    """Wraps a tokenizer of the ``tokenizers`` library.

    ``name``: "bpe", or that of the pretrained tokenizer. ``core`` is the whole state: :meth:`to_json` is complete.
    """

    core: tokenizers.Tokenizer
    name: str = "bpe"

    def __post_init__(self) -> None:
        self.core.no_padding()
        self.core.no_truncation()
        self.core.add_special_tokens([token for token in SPECIAL if self.core.token_to_id(token) is None])
        self.pad, self.begin, self.end, self.answer = (self._id(token) for token in SPECIAL)

    def _id(self, token: str) -> int:
        number: int | None = self.core.token_to_id(token)
        assert number is not None
        return number

    def __len__(self) -> int:
        """Number of tokens."""
        found: int = self.core.get_vocab_size()
        return found

    def encode(self, texts: Sequence[str], max_length: int, questions: Sequence[str] | None = None) -> npt.NDArray[Any]:
        """Encode ``<s> text </s>`` or ``<s> question <answer> text </s>``: int64 (b, max_length), padded or cut.

        Raises:
            ConfigError: a question leaves no room for an answer.
        """
        table = np.full((len(texts), max_length), self.pad, np.int64)
        prompts = self.prompts(questions if questions is not None else [None] * len(texts))
        bodies = [encoding.ids for encoding in self.core.encode_batch(list(texts), add_special_tokens=False)]
        for row, prompt, body in zip(table, prompts, bodies, strict=True):
            room = max_length - len(prompt) - 1
            if room < 1:
                raise ConfigError(f"max_length={max_length}: a question of {len(prompt)} tokens leaves no room")
            ids = [*prompt, *body[:room], self.end]
            row[: len(ids)] = ids
        return table

    def prompts(self, questions: Sequence[str | None]) -> list[list[int]]:
        """The start of each sequence: ``<s>``, or ``<s> question <answer>``."""
        asked = [
            self.core.encode(question, add_special_tokens=False).ids if question else None for question in questions
        ]
        return [[self.begin] if ids is None else [self.begin, *ids, self.answer] for ids in asked]

    def decode(self, rows: Iterable[Sequence[int]]) -> list[str]:
        """Texts of token sequences, from ``<answer>`` (if any) up to the first end, without special tokens."""
        return [self.core.decode(self._body(list(map(int, row)))).strip() for row in rows]

    def _body(self, row: list[int]) -> list[int]:
        if self.answer in row:
            row = row[row.index(self.answer) + 1 :]
        if self.end in row:
            row = row[: row.index(self.end)]
        return [number for number in row if number not in (self.pad, self.begin)]

    def save(self, folder: str | Path) -> None:
        """Write ``tokenizer.json``; for a byte-level BPE also ``vocab.json`` and ``merges.txt``."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.core.save(str(Path(folder) / "tokenizer.json"))
        self.core.model.save(str(folder))

    def to_json(self) -> dict[str, Any]:
        """The state for checkpoints, so that a model is always used with its own tokenizer."""
        return {"name": self.name, "tokenizer": json.loads(self.core.to_str())}

    @classmethod
    def from_json(cls, facts: dict[str, Any]) -> Tokenizer:
        return cls(tokenizers.Tokenizer.from_str(json.dumps(facts["tokenizer"])), facts["name"])


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE (Sennrich et al., ACL 2016) on ``texts``. It can encode any text, and is deterministic for
    the same texts in the same order."""
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    core.decoder = byte_decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=max(vocab_size, 256 + len(SPECIAL)),
        min_frequency=_MIN_FREQUENCY,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return Tokenizer(core)


def pretrained(name: str) -> Tokenizer:
    """Load the tokenizer of a repository on the Hub (google/flan-t5-base), or of a folder with ``tokenizer.json``, or
    with ``vocab.json`` and ``merges.txt``.

    Its own start and end tokens are not used; ours are added instead.

    Raises:
        ConfigError: there is no such tokenizer.
    """
    folder = Path(name)
    try:
        if (folder / "tokenizer.json").is_file():
            core = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        elif (folder / "vocab.json").is_file():
            core = tokenizers.Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
            core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
            core.decoder = byte_decoders.ByteLevel()
        elif folder.is_dir():
            raise ConfigError(f"tokenizer={name}: the folder has no tokenizer.json, and no vocab.json with merges.txt")
        else:
            expect_model(f"tokenizer={name}", name)
            core = tokenizers.Tokenizer.from_pretrained(name)
    except ConfigError:
        raise
    except Exception as error:  # tokenizers raises bare Exception
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"tokenizer={name}: no such tokenizer ({reason}); bpe learns one from the captions") from None
    return Tokenizer(core, name)
