"""Columns for captions from several sources, and the consistency checks for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.samples import Row
from pipeline.samples.captions import ORIGINAL, SOURCES, sources_of

WRITTEN = "recaptions"
"""Column of added captions: a list of ``{source, caption, model, prompt}``."""


def joined(row: Mapping[str, Any], texts: Sequence[Mapping[str, str]], source: str, model: str, first: bool) -> Row:
    """Return the caption columns of a sample after adding new captions.

    Args:
        texts: ``caption`` and ``prompt`` of each new caption.
        first: whether to put them before the existing captions.
    """
    had, had_sources = list(row.get("captions") or ()), sources_of(row)
    new = [text["caption"] for text in texts]
    captions = new + had if first else had + new
    names = [source] * len(new)
    written = [
        {"source": source, "caption": text["caption"], "model": model, "prompt": text["prompt"]} for text in texts
    ]
    return {
        "caption": captions[0] if captions else "",
        "captions": captions,
        SOURCES: names + had_sources if first else had_sources + names,
        WRITTEN: [*(row.get(WRITTEN) or ()), *written],
    }


def fault_of(row: Mapping[str, Any], upstream: Mapping[str, Any] | None = None) -> str:
    """Describe what is wrong with the caption columns of a sample; empty if they are consistent.

    Args:
        upstream: the sample before the last captions were added.
    """
    captions, sources, written = row.get("captions") or [], row.get(SOURCES), row.get(WRITTEN)
    if sources is None:
        return ""
    if len(sources) != len(captions):
        return f"has {len(captions)} captions and {len(sources)} sources of captions"
    if row.get("caption", "") != (captions[0] if captions else ""):
        return "its caption is not the first of its captions"
    if written is not None:
        new = sorted((entry["source"], entry["caption"]) for entry in written)
        if new != sorted(pair for pair in zip(sources, captions, strict=True) if pair[0] != ORIGINAL):
            return "its captions do not match its recaptions"
    if upstream is not None:
        before = list(zip(sources_of(upstream), upstream.get("captions") or (), strict=True))
        left = list(zip(sources, captions, strict=True))
        start = next((at for at in range(len(left) - len(before) + 1) if left[at : at + len(before)] == before), -1)
        if start < 0:
            return "its original captions have changed"
    return ""
