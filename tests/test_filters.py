"""Checks of captions and columns give the reason that they promise, in any script."""

from __future__ import annotations

import pytest

from pipeline.config import ConfigError
from pipeline.filters import CAPTION_CHECKS, at_least, good_captions, score


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        ("a red fox", ""),
        ("", "caption_empty"),
        (" .-- !", "caption_empty"),
        ("\u8d64\u3044\u72d0", ""),
        ("https://example.org/a.jpg", "caption_url"),
        (" WWW.example.org ", "caption_url"),
        ("from https://example.org", ""),
        ("buy now " * 10, "caption_repetitive"),
        ("very very nice", ""),
        ("a long sentence that tells of a dog, a cat, and the house in which they live together", ""),
        ("short", "caption_short"),
    ],
)
def test_a_caption_is_left_out_for_a_reason(caption: str, reason: str) -> None:
    checks = [*CAPTION_CHECKS.values(), *([at_least(8)] if reason == "caption_short" else [])]
    assert good_captions([caption], checks) == ([] if reason else [caption], reason)


def test_a_sample_goes_only_with_its_last_caption() -> None:
    checks = list(CAPTION_CHECKS.values())
    assert good_captions(["", "a fox"], checks) == (["a fox"], "")
    assert good_captions(["www.a.b", ""], checks) == ([], "caption_url")
    assert good_captions([], checks) == ([], "caption_empty")
    assert good_captions([], []) == ([], "")


def test_scores_are_conditions_on_columns() -> None:
    assert score("nsfw<0.5")({"nsfw": 0.4}) == ""
    assert score("nsfw < 0.5")({"nsfw": 0.5}) == "score_nsfw"
    assert score("aesthetic>=5")({"aesthetic": 5}) == ""
    assert score("aesthetic>=5")({}) == score("aesthetic>=5")({"aesthetic": "6"}) == "score_aesthetic"
    with pytest.raises(ConfigError, match="scores=nsfw"):
        score("nsfw")
