"""Texts to tokens and back, in any language; tokenizers that are learned, saved, and come by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.config.schema import ConfigError
from pipeline.encoders.tokenizer import Tokenizer, pretrained, train_bpe

TEXTS = ["a small red circle", "Ein schwarzes Kleid mit weißen Punkten", "少女が本を読む", "a large blue square"] * 5


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_bpe(TEXTS, 400)


def test_every_text_comes_back(bpe: Tokenizer) -> None:
    texts = [*TEXTS[:4], "unseen wörds 🙂 !", ""]
    rows = bpe.encode(texts, 64)
    assert rows.dtype == np.int64 and rows.shape == (6, 64)
    assert bpe.decode(rows) == texts
    assert (rows[:, 0] == bpe.begin).all() and ((rows == bpe.end).sum(1) == 1).all()


def test_training_is_deterministic_and_the_saved_one_is_the_same(bpe: Tokenizer, tmp_path: Path) -> None:
    assert train_bpe(TEXTS, 400).to_json() == bpe.to_json()
    bpe.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"tokenizer.json", "vocab.json", "merges.txt"}
    expected = bpe.encode(TEXTS, 48)
    assert (pretrained(str(tmp_path)).encode(TEXTS, 48) == expected).all()
    assert (Tokenizer.from_json(bpe.to_json()).encode(TEXTS, 48) == expected).all()
    (tmp_path / "tokenizer.json").unlink()
    assert (pretrained(str(tmp_path)).encode(TEXTS, 48) == expected).all()


def test_long_texts_are_cut_and_still_end(bpe: Tokenizer) -> None:
    (row,) = bpe.encode([TEXTS[1]], 6)
    assert row[-1] == bpe.end
    assert TEXTS[1].startswith(bpe.decode([row])[0])


def test_a_question_stands_before_its_answer(bpe: Tokenizer) -> None:
    (row,) = bpe.encode(["red"], 40, ["what colour is it?"])
    (prompt,) = bpe.prompts(["what colour is it?"])
    assert row[: len(prompt)].tolist() == prompt and prompt[-1] == bpe.answer
    assert bpe.decode([row]) == ["red"]
    with pytest.raises(ConfigError, match="max_length=8"):
        bpe.encode(["red"], 8, ["what colour is the very large thing on the left?"])


def test_a_tokenizer_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no tokenizer.json"):
        pretrained(str(tmp_path))
