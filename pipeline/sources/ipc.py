"""Arrow IPC files with images in them, as ``save_to_disk`` of the Hugging Face library writes them, or anybody else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from pipeline.config.schema import ConfigError
from pipeline.partitions.plan import Input
from pipeline.samples import Outcome, SampleError
from pipeline.sources.lists import batch_rows
from pipeline.sources.parquet_rows import roles_of, row_outcomes
from pipeline.sources.webdataset import WebDataset, refuse_own

_STATE = "state.json"
"""Beside the files that ``save_to_disk`` wrote: names those that count, as caches may lie there, too."""


class Ipc(WebDataset):
    """Files whose rows are samples, each a partition."""

    suffixes = (".arrow", ".ipc", ".feather")

    def _below(self, path: Path) -> list[Path]:
        refuse_own(path)
        found = super()._below(path)
        listed = {folder: _listed(folder) for folder in {file.parent for file in found}}
        wanted = {file for files in listed.values() if files is not None for file in files}
        missing = sorted(str(file) for file in wanted - set(found))
        if missing:
            raise ConfigError(
                f"input={path}: {_STATE} names {len(missing)} files that are not there, such as {missing[0]}"
            )
        return [file for file in found if listed[file.parent] is None or file in wanted]

    def read(self, planned: Input, file: IO[bytes]) -> Iterator[Outcome]:
        """Raises SampleError ``damaged_arrow`` or ``no_column`` before anything is yielded."""
        try:
            batches = _Batches(file)
            roles = roles_of(self.config, batches.names)
            for _ in batches:  # all of it can be read, before any of it counts
                self.check_stop()
        except (pa.ArrowException, OSError, ValueError, KeyError) as error:
            raise SampleError("damaged_arrow", type(error).__name__, retryable=True) from None
        rows = (row for batch in batches for row in batch_rows(batch.select(roles.wanted)))
        return row_outcomes(planned.path, rows, roles, self.config, self.annotations.columns)


class _Batches:
    """The record batches of a file in either of Arrow's two layouts; it can be gone through again."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._open: Any = pa.ipc.open_file
        try:
            self.names: list[str] = self._opened().schema.names
        except pa.ArrowInvalid:
            self._open = pa.ipc.open_stream
            self.names = self._opened().schema.names

    def _opened(self) -> Any:
        self._file.seek(0)
        return self._open(pa.PythonFile(self._file, mode="r"))

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        reader = self._opened()
        if self._open is pa.ipc.open_stream:
            yield from reader
            return
        for number in range(reader.num_record_batches):
            yield reader.get_batch(number)


def _listed(folder: Path) -> list[Path] | None:
    """The files that count in a folder of ``save_to_disk``; None for any other folder."""
    try:
        files = json.loads((folder / _STATE).read_bytes())["_data_files"]
        return [folder / Path(str(file["filename"])).name for file in files]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"{folder / _STATE}: cannot be read ({type(error).__name__})") from None


SOURCE = Ipc
