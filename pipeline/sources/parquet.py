"""Parquet files with images in them, by URL or on this machine."""

from __future__ import annotations

from pathlib import Path

from pipeline.sources.webdataset import WebDataset, refuse_own


class Parquet(WebDataset):
    """Files whose rows are samples, each a partition."""

    suffixes = (".parquet",)

    def _below(self, path: Path) -> list[Path]:
        refuse_own(path)
        return super()._below(path)


SOURCE = Parquet
