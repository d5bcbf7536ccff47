"""Arrays of images saved by NumPy: separate ``.npy`` files, or one ``.npz`` with several arrays."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np

from pipeline.config.schema import ConfigError
from pipeline.partitions.plan import Input, Partition
from pipeline.partitions.stage import Context
from pipeline.registry import sources
from pipeline.samples import Outcome, SampleError, path_text
from pipeline.sources.archives.member import Wants
from pipeline.sources.archives.zip import zip_members
from pipeline.sources.arrays import Tables, check_lengths, tables, the_table
from pipeline.sources.files import Place
from pipeline.sources.lists import ListRow
from pipeline.sources.memory_images import image_reader
from pipeline.sources.parquet_rows import Roles, row_outcomes
from pipeline.sources.recognition import explained
from pipeline.sources.trees import Tree
from pipeline.sources.webdataset import WebDataset, refuse_own

_IN_MEMORY = 1 << 30
"""Maximum bytes of an array that is loaded into memory: one in an ``.npz``, or in Fortran order."""
_ALONE, _TOGETHER = ".npy", ".npz"


@sources.register("npy")
class Npy(WebDataset):
    """One partition per array of images.

    Labels, captions and other columns are arrays whose names differ in one part, such as ``y_train.npy`` next to
    ``x_train.npy``. Pickled objects are never read.
    """

    suffixes = (_ALONE, _TOGETHER)
    reads = ("npy",)

    @cached_property
    def every(self) -> dict[str, str]:
        """URL or path of each file by name, including arrays that do not hold images; names include the folder."""
        if self.config.urls or not self.config.input:
            return super().places
        return {path_text(name): self.tree.place(name) for name in self._below(self.tree)}

    @cached_property
    def tables(self) -> Tables:
        """The tables of the ``.npy`` files; arrays are named without the suffix."""
        names = [name[: -len(_ALONE)] for name in self.every if name.lower().endswith(_ALONE)]
        return tables(names, self.config, alone=True)

    @cached_property
    def places(self) -> dict[str, str]:
        """URL or path, by name, of each file that is a partition.

        Raises:
            ConfigError: there are none.
        """
        wanted = self.tables.columns
        found = {
            name: place
            for name, place in self.every.items()
            if name[: -len(_ALONE)] in wanted or name.lower().endswith(_TOGETHER)
        }
        if not found:
            said = f"image_column={self.config.image_column}: none of {len(self.every)} arrays is of images"
            (name, place), *others = self.every.items()
            if others or "://" in place:
                raise ConfigError(said)
            with explained(Path(place), name, self.reads):
                raise ConfigError(said)
        return found

    def _below(self, tree: Tree) -> list[str]:
        refuse_own(tree)
        return super()._below(tree)

    def plan(self) -> Iterator[Partition]:
        yield from super().plan()
        self.left_out.add("array_of_another_split", *(f"{name}{_ALONE}" for name in self.tables.other_split))
        self.left_out.add("array_without_images", *(f"{name}{_ALONE}" for name in self.tables.unused))

    def watched(self) -> dict[str, str]:
        """Includes the arrays of the other columns."""
        beside = dict.fromkeys(file for name in self.tables.columns for file in self._beside(name).values())
        return super().watched() | self._states(self._setting, [(file, self._place(file)) for file in beside])

    def _beside(self, name: str) -> dict[str, str]:
        """Files of the other columns that belong to the images ``name``, by column; empty if a column is missing."""
        try:
            roles, columns = self.tables.roles(name, self.config)
        except SampleError:
            return {}
        return {column: self._file(columns[column]) for column in roles.wanted if column != roles.image}

    def _file(self, name: str) -> str:
        return next(file for file in self.every if file[: -len(_ALONE)] == name)

    def _place(self, file: str) -> Place:
        place = self.every[file]
        return Place(url=place) if "://" in place else Place(path=place)

    def read(self, planned: Input, file: IO[bytes], context: Context) -> Iterator[Outcome]:
        """Raise SampleError ``damaged_npy``, ``no_column``, ``no_images`` or ``uneven_arrays`` before any outcome."""
        if planned.path.lower().endswith(_TOGETHER):
            roles, arrays = self._together(file)
            return self._outcomes(planned.path, roles, arrays, ExitStack())
        name = planned.path[: -len(_ALONE)]
        roles, _ = self.tables.roles(name, self.config)
        with ExitStack() as stack:
            arrays = {roles.image: Array(file)}
            for column, beside in self._beside(name).items():
                opened, _, _ = stack.enter_context(self._fetched(beside, self._place(beside), scratch=context.scratch))
                arrays[column] = Array(opened)
            return self._outcomes(planned.path, roles, arrays, stack.pop_all())

    def _together(self, file: IO[bytes]) -> tuple[Roles, dict[str, Array]]:
        """The roles and arrays of an ``.npz``, loaded into memory."""
        most, limit = self.config.max_archive_bytes, self.config.max_members
        nothing: Wants = lambda name, size: 0  # noqa: E731
        names = [member.name.removesuffix(_ALONE) for member in zip_members(file, limit, most, nothing)]
        roles, columns = the_table(names, self.config)
        wanted = {f"{columns[column]}{_ALONE}": column for column in roles.wanted}

        def small(name: str, size: int) -> int | None:
            if name in wanted and size > _IN_MEMORY:
                raise SampleError("too_many_bytes", f"{name}: unpack the .npz, as .npy files of any size are read")
            return size if name in wanted else None

        arrays: dict[str, Array] = {}
        for member in zip_members(file, limit, most, small):
            if member.error:
                raise member.error
            arrays[wanted[member.name]] = Array(io.BytesIO(member.data))
        return roles, arrays

    def _outcomes(self, name: str, roles: Roles, arrays: dict[str, Array], stack: ExitStack) -> Iterator[Outcome]:
        with ExitStack() as checked:
            checked.enter_context(stack)
            count = check_lengths(((c, len(array)) for c, array in arrays.items()), self.config.max_members)
            images = arrays[roles.image]
            encoded = image_reader(images.shape, images.dtype, self.config.max_member_bytes)
            stack = checked.pop_all()

        def rows() -> Iterator[ListRow]:
            with stack:
                for _ in range(count):
                    values: dict[str, Any] = {column: array.next() for column, array in arrays.items()}
                    values[roles.image] = encoded(values[roles.image])
                    yield ListRow(values)

        return row_outcomes(name, rows(), roles, self.config, self.annotations.columns)


class Array:
    """Reads the items of a ``.npy`` file one by one.

    Raises:
        SampleError: ``damaged_npy``, ``pickled``; ``too_many_bytes`` for a large array in Fortran order.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        file.seek(0)
        try:
            version = np.lib.format.read_magic(file)
            header: dict[Any, Callable[[IO[bytes]], Any]] = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a warning about files written by Python 2
                self.shape, fortran, self.dtype = header[version](file)
        except Exception as error:  # NumPy's header parser raises almost any exception
            raise SampleError("damaged_npy", f"no header: {type(error).__name__}", retryable=True) from None
        if self.dtype.hasobject:
            raise SampleError("pickled", "an array of Python objects, which are not read: they can run code")
        start = file.tell()
        size = file.seek(0, io.SEEK_END) - start
        if not self.shape or min(self.shape) < 0 or math.prod(self.shape) * self.dtype.itemsize != size:
            raise SampleError("damaged_npy", f"{size} bytes for {self.shape} of {self.dtype}"[:200], retryable=True)
        file.seek(start)
        if fortran and len(self.shape) > 1:
            if size > _IN_MEMORY:
                raise SampleError("too_many_bytes", "in Fortran's order: save it by numpy.ascontiguousarray")
            items = np.frombuffer(file.read(), self.dtype).reshape(self.shape, order="F")
            self._file = io.BytesIO(np.ascontiguousarray(items).tobytes())
        self._size = math.prod(self.shape[1:]) * self.dtype.itemsize

    def __len__(self) -> int:
        return int(self.shape[0])

    def next(self) -> Any:
        """Return the next item, an array or a scalar. Raises EOFError if the file has become shorter."""
        data = self._file.read(self._size)
        if len(data) < self._size:
            raise EOFError(f"{len(data)} bytes for an item of {self._size}")
        if not self._size:
            return np.zeros(self.shape[1:], self.dtype)[()]
        return np.frombuffer(data, self.dtype).reshape(self.shape[1:])[()]
