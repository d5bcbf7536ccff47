"""Options of stage=score and stage=select."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pipeline.config.decoding import DecodingConfig
from pipeline.config.options import option
from pipeline.config.run import CurationConfig, DeviceConfig
from pipeline.registry import Traits


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(DeviceConfig, CurationConfig, DecodingConfig):
    """stage=score: compute scores of each sample from its pixels, its caption or a model; no image is copied."""

    traits: ClassVar = Traits(upstream=("dedup", "filter"), partitioned=True, gpus=True)
    inherited: ClassVar = {"DecodingConfig": "workers!=0"}

    scorers: tuple[str, ...] = option(
        ("sharpness", "contrast", "entropy", "flat_share", "border", "seam", "caption_words"),
        "scores to compute: names, or embedding:<model>, clip_similarity:<model>, head:<file>, classifier:<repo or "
        "folder>, perplexity:<repo or folder>",
        identity=True,
    )
    reuse: bool = option(
        True, "take scores from another finished score* folder of the same samples instead of computing them again"
    )
    batch_size: int = option(32, "images per forward pass of a model", identity=True, ge=1, le=65536)
    model_dtype: str = option(
        "float32",
        "precision of models on a GPU (CPUs use float32)",
        identity=True,
        choices=("float32", "float16", "bfloat16"),
    )
    workers: str = option(
        "auto",
        "processes that decode images, per rank (auto: one per CPU; 0: decode in the rank itself, unprotected)",
        choices=("auto",),
        ge=0,
        le=1024,
    )


@dataclass(frozen=True, kw_only=True)
class SelectConfig(CurationConfig):
    """stage=select: keep samples by their scores; no image is copied."""

    traits: ClassVar = Traits(upstream=("score",), partitioned=True)

    where: str = option(
        "",
        "conditions on columns, such as \"sharpness > q10 and language == 'en' and top(clip_similarity, 0.3)\"",
        identity=True,
    )
    clusters: int = option(
        0,
        "k-means clusters of the embeddings; the column cluster, for where= and cap=, says which a sample is in",
        identity=True,
        ge=0,
        le=4096,
    )
    concepts: str = option(
        "",
        "file of concepts (text or JSON list, as MetaCLIP's metadata.json): drop samples whose captions name none, and "
        "thin out those whose concepts are all common",
        identity=True,
        path="file",
    )
    per_concept: int = option(
        20_000,
        "samples up to which all that name a concept are kept (t of MetaCLIP); of n samples, each is kept with the "
        "probability per_concept/n",
        identity=True,
        ge=1,
        when="concepts",
    )
    cap: tuple[str, ...] = option(
        (), "maximum number of samples for each value of a column, as [class_name:1000]", identity=True
    )
    sample: int = option(
        0, "maximum number of samples in total, chosen by the seed and their keys (0: no limit)", identity=True, ge=0
    )
    keep_keys: str = option(
        "", "file of keys (text, table, parquet or .npy): drop all other samples", identity=True, path="file"
    )
    deny_keys: str = option(
        "", "file of keys (text, table, parquet or .npy): drop these samples", identity=True, path="file"
    )
    key_column: str = option(
        "",
        "the column or field that these files list and export= writes, as uid or url (default: key)",
        identity=True,
        when="keep_keys or deny_keys or export",
    )
    export: str = option(
        "",
        "also write the keys that are kept: .txt, a line each, or .npy, as DataComp's subsets (uids of 32 hex digits)",
    )
