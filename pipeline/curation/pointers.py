"""Common code of stages that select samples and write pointers to their images."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

from pipeline.partitions.dataset import Dataset, SlotReader
from pipeline.partitions.planning import last_upstream
from pipeline.partitions.stage import ConfigT, Stage
from pipeline.samples import TAKEN, Schema


class PointerStage(Stage[ConfigT]):
    """A stage whose rows are pointers to samples of the upstream, or, if that holds scores, to the scored samples."""

    @property
    def format(self) -> str:
        return "pointer"

    @cached_property
    def images(self) -> Dataset:
        """The dataset directory that the pointers refer to."""
        return images_of(self.upstream)

    def schema(self) -> Schema:
        return dict(self.images.schema)

    def extra(self) -> dict[str, Any]:
        return dict(self.images.header["extra"])

    def origin(self) -> str:
        return str(self.images.root.path)

    def image_places(self, index: int) -> Iterator[int]:
        """Yield the positions of the images of the upstream's partition ``index`` among all images ever kept; -1 for
        samples that have been taken down."""
        if self.images is self.upstream:
            first = int(self.upstream.places[index])
            yield from range(first, int(self.upstream.places[index + 1]))
            return
        first = int(self.images.places[self.upstream.partition(index).inputs[0].start])
        columns = ["container", "outcome", "reason", "source_offset"]
        table = SlotReader(self.upstream, index).ledger(columns)
        rows = zip(*(table[name].to_pylist() for name in columns), strict=True)
        for container, outcome, reason, offset in rows:
            taken = outcome == "dropped" and reason == TAKEN
            if not container and (outcome == "kept" or taken):
                yield -1 if taken else first + offset


def images_of(dataset: Dataset) -> Dataset:
    """``dataset``, or, if it holds scores, the dataset directory that was scored."""
    upstream = last_upstream(dataset) if dataset.format.name == "scores" else None
    return dataset if upstream is None else Dataset.open(upstream["path"])
