"""Captions come out as one clean line, whatever went in."""

from __future__ import annotations

import json
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.samples.captions import clean_caption

ANY_TEXT = st.text(st.characters(codec=None, exclude_categories=()))  # lone surrogates too
NASTY = st.text(
    "ab \t\n\0\u0085\u00a0\u00ad\u0301\u0323\u0344\u0958\u200b\u200c\u200d\u200e\u202e\u2028\u2066\ufeff\ud83d\ude00"
)


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("a small red circle", "a small red circle"),
        ("  a\tsmall \r\n red\u00a0\u3000circle\u2028 ", "a small red circle"),
        ("nul\0 bell\x07 escape\x1b[0m delete\x7f c1\x9b", "nul bell escape[0m delete c1"),
        ("next\u0085line\x0bpage\x0cgroup\x1dunit", "next line page group unit"),
        ("e\u0301 A\u030a \u212b", "\u00e9 \u00c5 \u00c5"),
        ("ﬁne ½ Ⅳ", "ﬁne ½ Ⅳ"),  # NFC, not NFKC
        ("\ufeffmarked", "marked"),
        ("abc\u202edcba\u202c \u2066x\u2069 \u200ey\u200f", "abcdcba x y"),
        ("zero\u200bwidth\u2060 soft\u00adhyphen", "zerowidth softhyphen"),
        ("\U000e0041\U000e0042hidden tags", "hidden tags"),
        ("نمی\u200cخواهم", "نمی\u200cخواهم"),
        ("क्\u200dष", "क्\u200dष"),
        ("👩\u200d👩\u200d👧 ❤\ufe0f", "👩\u200d👩\u200d👧 ❤\ufe0f"),
        ("\u200da \u200db\u200d\u200c\u200dc\u200d", "a b\u200dc"),
        ("\u0663\u0664 \u06ddآية", "\u0663\u0664 \u06ddآية"),  # a verse sign is drawn, though its category is Cf
        ("", ""),
        (" \0\u200b\u200d ", ""),
        (b"caf\xc3\xa9", "café"),
        (b"\xef\xbb\xbfcaf\xe9 \xff", "caf\ufffd \ufffd"),
        (json.loads('"\\ud83d\\ude00 \\ud83d"'), "😀 \ufffd"),
        ("\ud83d" + "\ude00", "😀"),
    ],
)
def test_captions_are_cleaned(raw: str | bytes, clean: str) -> None:
    assert clean_caption(raw) == clean


@given(ANY_TEXT | NASTY | st.binary(), st.integers(0, 40))
@example("a" + "\u0344" * 40, 8192)
@example("\u0958" + "\u0301" * 40, 8192)
def test_the_result_keeps_every_promise(raw: str | bytes, most: int) -> None:
    text = clean_caption(raw, most)
    assert text.encode("utf-8").decode("utf-8") == text
    assert unicodedata.is_normalized("NFC", text)
    assert len(text) <= most
    assert text == " ".join(text.split())
    assert not [char for char in text if unicodedata.category(char) in ("Cc", "Cs")]
    assert not set(text) & set("\u200b\u200e\u200f\u202a\u202e\u2066\u2069\ufeff\u00ad")
    assert clean_caption(text, most) == text


def test_long_captions_are_cut_not_refused() -> None:
    assert clean_caption("ab " * 10_000) == ("ab " * 10_000)[:8192].strip()
    assert clean_caption("word next", max_length=5) == "word"
    assert clean_caption("👩\u200d👩", max_length=2) == "👩"


def test_piles_of_combining_marks_are_capped() -> None:
    """Without the cap this takes minutes: normalisation sorts such a run in quadratic time."""
    text = clean_caption("a" + "\u0301\u0323" * 200_000 + "b")
    assert text.endswith("b")
    assert len(text) <= 32


def test_ordinary_marks_stay() -> None:
    for text in ("Việt Nam", "ปลาทูน่า", "हिन्दी", "שָׁלוֹם", "ελληνικά", "日本語"):
        assert clean_caption(text) == unicodedata.normalize("NFC", text)
