"""Parquet files with images in them, by URL or on this machine."""

from __future__ import annotations

from pipeline.sources.webdataset import WebDataset


class Parquet(WebDataset):
    """Files whose rows are samples, each a partition."""

    suffixes = (".parquet",)


SOURCE = Parquet
