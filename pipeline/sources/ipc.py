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
"""Next to the files that ``save_to_disk`` wrote: names those that count, as caches may lie there, too."""
_NEXT_TO = (_STATE, "dataset_info.json", "dataset_dict.json")


@sources.register("ipc")
class Ipc(WebDataset):
    """Files whose rows are samples, each a partition."""

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
        """What ``save_to_disk`` writes next to its files."""
        return {name for name in self.tree.ending((".json",)) if name.rpartition("/")[2] in _NEXT_TO}

    def read(self, planned: Input, file: IO[bytes], context: Context) -> Iterator[Outcome]:
        """Raises SampleError ``damaged_arrow`` or ``no_column`` before anything is yielded."""
        try:
            batches = _Batches(file)
            roles = roles_of(self.config, batches.names)
            for batch in batches:  # all of it can be read, before any of it counts
                _check(batch)
                self.check_stop()
        except (pa.ArrowException, OSError, ValueError, KeyError, MemoryError) as error:
            raise SampleError("damaged_arrow", type(error).__name__, retryable=True) from None
        rows = (row for batch in batches for row in batch_rows(batch.select(roles.wanted)))
        return row_outcomes(planned.path, rows, roles, self.config, self.annotations.columns)


def _check(batch: pa.RecordBatch) -> None:
    """Raises ArrowInvalid for offsets and indices that point outside of their buffers: following one can end the
    process. Whether texts are valid UTF-8 is not checked here, as those that are not are repaired row by row."""
    for column in batch.columns:
        column.cast(_with_bytes(column.type)).validate(full=True)


def _with_bytes(kind: pa.DataType) -> pa.DataType:
    """The same type, with bytes instead of texts."""
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


def _folder(name: str) -> str:
    """``a/b/`` of ``a/b/c``; empty of ``c``."""
    return name[: name.rfind("/") + 1]


def _listed(tree: Tree, folder: str) -> list[str] | None:
    """The files that count in a folder of ``save_to_disk``; None for any other folder."""
    try:
        files = json.loads(tree.read(folder + _STATE))["_data_files"]
        return [folder + str(file["filename"]).rpartition("/")[2] for file in files]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"{tree.place(folder + _STATE)}: cannot be read ({type(error).__name__})") from None
