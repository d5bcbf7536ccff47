"""Arrow IPC files with images, such as those of ``save_to_disk`` in the Hugging Face library."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import IO, Any

import pyarrow as pa

from pipeline.config.schema import ConfigError
from pipeline.partitions.plan import Input
from pipeline.partitions.stage import Context
from pipeline.registry import sources
from pipeline.samples import Outcome, SampleError
from pipeline.sources.lists import batch_rows
from pipeline.sources.parquet_rows import roles_of, row_outcomes
from pipeline.sources.trees import Tree
from pipeline.sources.webdataset import WebDataset, refuse_own

_STATE = "state.json"
"""Written by ``save_to_disk``: lists the data files, as cache files may be in the same folder."""
_NEXT_TO = (_STATE, "dataset_info.json", "dataset_dict.json")


@sources.register("ipc")
class Ipc(WebDataset):
    """Files whose rows are samples, one partition per file."""

    suffixes = (".arrow", ".ipc", ".feather")
    reads = ("ipc",)

    def _below(self, tree: Tree) -> list[str]:
        refuse_own(tree)
        found = super()._below(tree)
        listed = {folder: _listed(tree, folder) for folder in {_folder(name) for name in found}}
        wanted = {name for names in listed.values() if names is not None for name in names}
        missing = sorted(wanted - set(found))
        if missing:
            raise ConfigError(
                f"{tree.said}: {_STATE} names {len(missing)} files that are not there, such as {tree.place(missing[0])}"
            )
        return [name for name in found if listed[_folder(name)] is None or name in wanted]

    def _used(self) -> set[str]:
        """Files that ``save_to_disk`` writes next to the data."""
        return {name for name in self.tree.ending((".json",)) if name.rpartition("/")[2] in _NEXT_TO}

    def read(self, planned: Input, file: IO[bytes], context: Context) -> Iterator[Outcome]:
        """Raise SampleError ``damaged_arrow`` or ``no_column`` before the first outcome."""
        try:
            batches = _Batches(file)
            roles = roles_of(self.config, batches.names)
            for batch in batches:  # read the whole file before yielding anything
                _check(batch)
                self.check_stop()
        except (pa.ArrowException, OSError, ValueError, KeyError, MemoryError) as error:
            raise SampleError("damaged_arrow", type(error).__name__, retryable=True) from None
        rows = (row for batch in batches for row in batch_rows(batch.select(roles.wanted)))
        return row_outcomes(planned.path, rows, roles, self.config, self.annotations.columns)


def _check(batch: pa.RecordBatch) -> None:
    """Raise ArrowInvalid for offsets and indices outside their buffers, which could crash the process.

    Texts are not checked for valid UTF-8, since invalid ones are repaired row by row.
    """
    for column in batch.columns:
        column.cast(_with_bytes(column.type)).validate(full=True)


def _with_bytes(kind: pa.DataType) -> pa.DataType:
    """``kind`` with all text types replaced by binary types."""
    if pa.types.is_string(kind):
        return pa.binary()
    if pa.types.is_large_string(kind):
        return pa.large_binary()
    if pa.types.is_string_view(kind):
        return pa.binary_view()
    if pa.types.is_list(kind):
        return pa.list_(_with_bytes(kind.value_type))
    if pa.types.is_large_list(kind):
        return pa.large_list(_with_bytes(kind.value_type))
    if pa.types.is_dictionary(kind):
        return pa.dictionary(kind.index_type, _with_bytes(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, _with_bytes(field.type)) for field in kind])
    return kind


class _Batches:
    """The record batches of an Arrow file or stream; can be iterated repeatedly."""

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


def _folder(name: str) -> str:
    """``a/b/`` for ``a/b/c``; empty for ``c``."""
    return name[: name.rfind("/") + 1]


def _listed(tree: Tree, folder: str) -> list[str] | None:
    """The data files in a folder written by ``save_to_disk``; None for any other folder."""
    try:
        files = json.loads(tree.read(folder + _STATE))["_data_files"]
        return [folder + str(file["filename"]).rpartition("/")[2] for file in files]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"{tree.place(folder + _STATE)}: cannot be read ({type(error).__name__})") from None
