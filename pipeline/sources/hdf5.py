"""HDF5 files with images: an HDF5 dataset with one row per image, either pixels or encoded images."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from typing import IO, Any

from pipeline.imaging.worker_pool import Lost, Pool
from pipeline.partitions.plan import Input, stamp
from pipeline.partitions.stage import Context
from pipeline.registry import sources
from pipeline.samples import Outcome, SampleError, real_path
from pipeline.sources.arrays import check_lengths, the_table
from pipeline.sources.hdf5_worker import understood
from pipeline.sources.lists import ListRow
from pipeline.sources.parquet_rows import row_outcomes
from pipeline.sources.trees import Tree
from pipeline.sources.webdataset import WebDataset, refuse_own

_ROWS = 32
"""Rows per task."""
WORKER = "pipeline.sources.hdf5_worker:answer"
_MEMORY = 4 << 30
TIMEOUT = 60.0
"""Seconds until a task is aborted."""


@cache
def _pool(function: str) -> Pool:
    """The process that reads the files; it starts on first use."""
    return Pool(function, workers=1, timeout=TIMEOUT, memory=_MEMORY, read=understood)


@sources.register("hdf5")
class Hdf5(WebDataset):
    """Files whose rows are samples, one partition per file; read in a separate process that damaged files may crash."""

    suffixes = (".h5", ".hdf5", ".he5")
    reads = ("hdf5",)

    def _below(self, tree: Tree) -> list[str]:
        refuse_own(tree)
        return super()._below(tree)

    def read(self, planned: Input, file: IO[bytes], context: Context) -> Iterator[Outcome]:
        """Raise SampleError ``damaged_hdf5``, ``no_column``, ``no_images`` or ``uneven_arrays`` before any outcome."""
        path = getattr(file, "name", "") or real_path(self._mirrored(self.locate(planned), planned.path).path)
        head, _ = self._asked([{"arrays": path}])[0]
        lengths: dict[str, int] = head["arrays"]
        roles, arrays = the_table(list(lengths), self.config)
        columns = {column: arrays[column] for column in roles.wanted}
        count = check_lengths(((column, lengths[name]) for column, name in columns.items()), self.config.max_members)
        task = {"path": path, "state": stamp(path), "columns": columns, "image": roles.image}
        task |= {"most": self.config.max_member_bytes}
        self._asked([{**task, "rows": [0, 0]}])
        rows = self._rows(task, roles.image, count)
        return row_outcomes(planned.path, rows, roles, self.config, self.annotations.columns)

    def _asked(self, tasks: list[dict[str, Any]]) -> list[tuple[dict[str, Any], list[bytes]]]:
        """Answers to ``tasks``. Raises SampleError if one fails."""
        found = []
        for _, answer in _pool(WORKER).map(((None, json.dumps(task).encode()) for task in tasks), self.check_stop):
            if isinstance(answer, Lost):
                raise SampleError("damaged_hdf5", f"the library behind h5py: {answer.detail}", retryable=True)
            if "reason" in answer[0]:
                raise SampleError(answer[0]["reason"], answer[0]["detail"], retryable=True)
            found.append(answer)
        return found

    def _rows(self, task: dict[str, Any], image: str, count: int) -> Iterator[ListRow]:
        spans = [(start, min(start + _ROWS, count)) for start in range(0, count, _ROWS)]
        tasks = ((span, json.dumps({**task, "rows": span}).encode()) for span in spans)
        for (start, stop), answer in _pool(WORKER).map(tasks, self.check_stop):
            if isinstance(answer, Lost) or "reason" in answer[0]:
                detail = answer.detail if isinstance(answer, Lost) else f"{answer[0]['reason']}: {answer[0]['detail']}"
                yield from (ListRow(error=detail) for _ in range(start, stop))
                continue
            head, images = answer
            data = iter(images)
            for row in head["rows"]:
                error = row.get("error", "")
                yield ListRow(error=error) if error else ListRow({**row["values"], image: next(data)})
