"""Parquet files that contain images, at URLs or local."""

from __future__ import annotations

from pipeline.registry import sources
from pipeline.sources.trees import Tree
from pipeline.sources.webdataset import WebDataset, refuse_own


@sources.register("parquet")
class Parquet(WebDataset):
    """Files whose rows are samples, one partition per file."""

    suffixes = (".parquet",)

    def _below(self, tree: Tree) -> list[str]:
        refuse_own(tree)
        return super()._below(tree)
