"""Options of stage=dedup."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pipeline.config.options import option
from pipeline.config.run import CurationConfig, seed_option
from pipeline.registry import Traits

SEMANTIC = "semantic"


@dataclass(frozen=True, kw_only=True)
class DedupConfig(CurationConfig):
    """stage=dedup: keep one image of each group of duplicates; optional, between filter and shard."""

    traits: ClassVar = Traits(upstream=("filter",), partitioned=True)

    method: str = option(
        "hash",
        "what makes duplicates: equal bytes and like perceptual hashes, or like embeddings that stage=score has stored",
        identity=True,
        choices=("hash", SEMANTIC),
    )
    hamming: int = option(
        20,
        "images are near duplicates if at most this many of their 128 bits differ (-1: only exact)",
        identity=True,
        ge=-1,
        le=128,
        when="method=hash",
    )
    cosine: float = option(
        0.95,
        "images are duplicates if the cosine of their embeddings is at least this; what is right depends on the model",
        identity=True,
        gt=0,
        le=1,
        when="method=semantic",
    )
    scores: str = option(
        "",
        "folder of the scores with the embeddings (default: the input, or what it was selected by)",
        when="method=semantic",
    )
    probes: int = option(
        2,
        "number of further clusters, besides its own, that are searched for duplicates of each sample",
        identity=True,
        ge=0,
        le=64,
        when="method=semantic",
    )
    seed: int = seed_option(when="method=semantic")
    memory: int = option(1024, "memory that a rank may use for the hashes or embeddings of samples, in MiB", ge=1)

    @property
    def default_variant(self) -> str:
        return SEMANTIC if self.method == SEMANTIC else ""

    @property
    def upstreams(self) -> tuple[str, ...]:
        return ("select", "score") if self.method == SEMANTIC else self.traits.upstream
