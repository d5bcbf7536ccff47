"""Whatever the web serves: each file gets one outcome, and neither memory nor the rank is ever in danger."""

from __future__ import annotations

import re
from collections import Counter

import psutil
import pytest
from image_files import SAMPLES, hostile

from pipeline.imaging.transform import Dropped, ImageError, Limits, Result, Rules, judge
from pipeline.imaging.worker_pool import Pool
from pipeline.imaging.worker_protocol import answer, understood

MEMORY = 2**29
RULES, LIMITS = Rules(min_image_size=8, max_image_size=32), Limits(max_pixels=4_000_000)


def pool(workers: int = 1) -> Pool:
    return Pool("pipeline.imaging.worker_protocol:answer", (RULES, LIMITS), workers=workers, timeout=60, memory=MEMORY)


_HARMLESS = ("pixel bomb", "profile bomb", "text bomb")
"""Bombs that nobody unpacks: data beyond the last row, profiles beyond the limit, texts."""


def test_every_file_of_a_hostile_corpus_gets_one_outcome() -> None:
    corpus = list(hostile())
    assert len({data for _, data in corpus}) >= 2000
    tested = pool()
    kept: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    most = 0
    for (kind, data), said in tested.map(((kind, data), data) for kind, data in corpus):
        assert isinstance(said, (bytes, bytearray)), f"{kind}: {said}"
        result = understood(said, data)
        if isinstance(result, Result):
            kept[kind] += 1
        else:
            assert isinstance(result, (ImageError, Dropped)), f"{kind}: {result}"
            assert re.fullmatch("[a-z_]+", result.reason)
            reasons[result.reason] += 1
        most = max([most, *(psutil.Process(pid).memory_info().rss for pid in tested.pids)])
    tested.close()
    assert sum(kept.values()) + sum(reasons.values()) == len(corpus)
    assert most < MEMORY
    assert not kept["SVG"] + kept["cut ICC"] + kept["a million frames"] + kept["endless scans"]
    assert not any(kept[kind] for kind in kept if kind.endswith("bomb") and kind not in _HARMLESS)
    assert reasons >= Counter(("truncated", "decode_error", "too_many_pixels", "too_many_frames", "svg"))


@pytest.mark.parametrize("name", ["jpeg", "jpeg-cmyk", "png", "webp", "gif", "tiff"])
def test_good_files_with_harmless_tails_are_kept(name: str) -> None:
    """As decoders and browsers do; what comes after the end is not looked at, and goes when the image is changed."""
    tested = pool()
    data = SAMPLES[name] + b"\0" * 10
    ((_, said),) = tested.map([(name, data)])
    tested.close()
    assert isinstance(said, (bytes, bytearray))
    assert isinstance(understood(said, data), Result)


@pytest.mark.parametrize("name", ["jpeg", "png-alpha", "jpeg-grey"])
@pytest.mark.parametrize("rules", [Rules(0, 0), Rules(0, 16), Rules(64), Rules(0, 0, validate="header")])
def test_what_a_worker_says_is_what_it_found(name: str, rules: Rules) -> None:
    for data in (SAMPLES[name], SAMPLES[name][:-20], b"\xff\xfe <svg"):
        expected, found = judge(data, rules), understood(answer(data, rules), data)
        assert str(found) == str(expected)
        assert type(found) is type(expected)


@pytest.mark.parametrize(
    "said", [b"", b"\0", b"\x09", b"\0" + bytes(40), b"\3no reason\0", b"\3\xff\0", b"\2" + b"a" * 41]
)
def test_what_no_worker_of_ours_would_say_is_refused(said: bytes) -> None:
    with pytest.raises(ValueError, match=r"no|codec"):
        understood(said, b"")
