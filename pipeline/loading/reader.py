"""Readers for PyTorch's DataLoader: map-style datasets with random access that can be forked, spawned and pickled."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy.typing as npt
from PIL import Image, ImageOps

from pipeline.config.schema import ConfigError
from pipeline.distributed import ignore_signals
from pipeline.formats.base import IMAGE, MASK, get_format
from pipeline.formats.blocks import VERIFY, Verify
from pipeline.formats.pixel_arrays import MODES, from_npy, mask_array, to_array, to_image
from pipeline.imaging import transform as images
from pipeline.partitions.dataset import Dataset, RandomAccess
from pipeline.samples import Row, Schema
from pipeline.storage import StorageError
from pipeline.stores import is_url

OUTPUTS = ("image", "array", "bytes", "view")
_NPY = b"\x93NUMPY"


class Reader:
    """Samples of a finished dataset directory in any storage format: ``reader[i]`` is ``(image, target)``.

    Args:
        dataset_path: Output folder of a converter or a stage, or the URL of a published one (``s3://…``, ``gs://…``,
            ``az://…``, ``hf://datasets/…``), whose files are cached for all processes of the machine.
        transform: Called with each image.
        target_transform: Called with each target.
        output: ``image``: PIL image, upright; ``array``: pixels (h, w) or (h, w, c), read-only and without a copy if
            the format stores pixels; ``bytes``: the stored file; ``view``: the stored file as uint8 (n,), a read-only
            view of the page cache that is not copied, even when a DataLoader's worker returns it. Decoders accept it
            like bytes.
        target: Column of the target; empty: ``label``, else ``mask``, else ``caption``, whichever exists first. A mask
            is an array with unchanged values, (h, w, c) in formats of fixed size, else of its original shape.
        mode: Convert images to this mode (RGB, L, RGBA, LA, I;16); empty: keep their modes.
        verify: When to check a 4 MiB block of a data file against its hash: at ``first`` access, ``always`` or
            ``never``.
        open_files: Number of data files that each process keeps open.

    Raises:
        ConfigError: There is no finished dataset in this format, or an argument is invalid.
    """

    format: ClassVar[str] = ""
    """Storage format of the class; empty: any."""
    default_target: ClassVar[str] = ""

    def __init__(
        self,
        dataset_path: str | Path,
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[Any], Any] | None = None,
        *,
        output: str = "image",
        target: str = "",
        mode: str = "",
        verify: Verify = "first",
        open_files: int = 256,
    ) -> None:
        _choice("output", output, OUTPUTS)
        _choice("verify", verify, VERIFY)
        if mode:
            _choice("mode", mode, MODES)
        self.dataset_path = Path(dataset_path) if is_url(dataset_path) else Path(dataset_path).absolute()
        self.transform = transform
        self.target_transform = target_transform
        self.output = output
        self.mode = mode
        self.verify = verify
        self.open_files = open_files
        dataset = Dataset.open(self.dataset_path)
        self._content = dataset.require_success()["content_digest"]
        stored = dataset.format.name
        if self.format and stored != self.format:
            raise ConfigError(f"{self.dataset_path} has format {stored}, not {self.format}: use {_class_of(stored)}")
        self.storage_format = stored
        self.fixed = get_format(stored).fixed
        self.schema: Schema = dict(dataset.schema)
        """Column name → type."""
        dataset.require_columns(IMAGE)
        self.classes: list[str] = list(dataset.header["extra"].get("classes", []))
        """Names of the classes, by label."""
        self.class_to_idx = {name: number for number, name in enumerate(self.classes)}
        self.target = target or self.default_target or self._usual_target()
        if self.target:
            dataset.require_columns(self.target)
        self._length = len(dataset)
        self._access: RandomAccess | None = RandomAccess(dataset, verify, open_files)

    def _usual_target(self) -> str:
        return next((name for name in ("label", MASK, "caption") if name in self.schema), "")

    # ---- samples

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """``(image, target)`` of one sample; the target is None if the sample has none.

        Raises:
            IndexError: There is no such sample.
            StorageError: Its bytes have changed since they were written. The message names the file and the sample.
            SampleError: The image cannot be decoded.
        """
        return self._sample(self._position(index))

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Any, Any]]:
        """Several samples at once, as DataLoader requests them, read in the order in which they are stored."""
        positions = [self._position(index) for index in indices]
        found = {position: self._sample(position) for position in sorted(set(positions))}
        return [found[position] for position in positions]

    def require(self, indices: Sequence[int]) -> None:
        """Prefetch these samples if they are in an object store."""
        self.access.require(indices)

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        return (self[index] for index in range(len(self)))

    def row(self, index: int) -> Row:
        """All columns of a sample as stored."""
        return self.access.row(self._position(index))

    def rows(self, indices: Sequence[int]) -> list[Row]:
        """All columns of several samples."""
        return [self.row(index) for index in indices]

    def key(self, index: int) -> str:
        """The key of the sample, which identifies its source."""
        return self.access.key(self._position(index))

    def array(self, index: int) -> npt.NDArray[Any]:
        """Pixels of a sample, (h, w) or (h, w, c); for formats of fixed size, a read-only view of the file."""
        position = self._position(index)
        if self.fixed:
            return self.access.array(position)
        data = self._bytes(position)
        return to_array(data, self.mode or _mode_of(data))

    def _position(self, index: int) -> int:
        position = int(index) + self._length if index < 0 else int(index)
        if not 0 <= position < self._length:
            raise IndexError(f"there is no sample {index}: {self.dataset_path} has {self._length}")
        return position

    def _bytes(self, position: int) -> bytes:
        data: bytes = self.access.row(position, (IMAGE,))[IMAGE]
        return data

    def _sample(self, position: int) -> tuple[Any, Any]:
        image: Any
        target: Any
        access = self.access
        if self.output == "view":
            image, target = access.view(position, self.target)
            if self.target == MASK:
                target = mask_array(target)
        elif self.fixed and self.output != "bytes":
            image = self._of_pixels(access.array(position))
            target = self._target_of_pixels(position)
        else:
            row = access.row(position, (IMAGE, self.target) if self.target else (IMAGE,))
            image = self._of_file(row[IMAGE])
            target = row[self.target] if self.target else None
            if self.target == MASK:
                target = mask_array(target)
        if self.target and self.target_transform is not None:
            target = self.target_transform(target)
        return (image if self.transform is None else self.transform(image)), target

    def _target_of_pixels(self, position: int) -> Any:
        if self.target == MASK:
            return self.access.mask(position)
        return self.access.row(position, (self.target,))[self.target] if self.target else None

    def _of_file(self, data: bytes) -> Any:
        if self.output == "bytes":
            return data
        return open_image(data, self.mode) if self.output == "image" else to_array(data, self.mode or _mode_of(data))

    def _of_pixels(self, array: npt.NDArray[Any]) -> Any:
        if self.output == "array":
            return array
        image = to_image(array)
        return image.convert(self.mode) if self.mode and image.mode != self.mode else image

    # ---- processes

    @property
    def access(self) -> RandomAccess:
        """Access to rows by position, opened at first use in each process."""
        if self._access is None:
            dataset = Dataset.open(self.dataset_path)
            if dataset.require_success()["content_digest"] != self._content:
                raise StorageError(f"{self.dataset_path} has changed since this reader was created: create a new one")
            self._access = RandomAccess(dataset, self.verify, self.open_files)
        return self._access

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_access": None}

    @staticmethod
    def worker_init_fn(worker: int) -> None:
        """Optional ``worker_init_fn`` for DataLoader: workers ignore the signals that the main process handles."""
        ignore_signals(worker)

    def __repr__(self) -> str:
        columns = ", ".join(f"{name}: {kind}" for name, kind in self.schema.items())
        lines = [f"{type(self).__name__}({str(self.dataset_path)!r})", f"  samples: {self._length}"]
        lines += [f"  format: {self.storage_format}", f"  columns: {columns}"]
        if self.classes:
            lines.append(f"  classes: {len(self.classes)} ({', '.join(self.classes[:3])}, ...)")
        return "\n".join([*lines, f"  target: {self.target or 'none'}"])


def open_image(data: bytes, mode: str = "") -> Image.Image:
    """Open an image file as an upright PIL image, converted to ``mode`` if one is given.

    Raises:
        SampleError: the file is damaged.
        TypeError: it holds an array that is not an image.
    """
    if mode or data.startswith(_NPY):
        return to_image(from_npy(data) if data.startswith(_NPY) else to_array(data, mode))
    images.probe(data)
    image = Image.open(io.BytesIO(data))
    ImageOps.exif_transpose(image, in_place=True)
    image.load()
    return image


def _mode_of(data: bytes) -> str:
    from pipeline.formats.pixel_arrays import natural_mode

    return "" if data.startswith(_NPY) else natural_mode(data)


def _choice(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ConfigError(f"{name}={value}: expected one of {', '.join(known)}")


def _class_of(format: str) -> str:
    found = (cls.__name__ for cls in _ALL if cls.format == format)
    return next(found, "Reader")


class MemmapReader(Reader):
    """Reader of ``format=memmap`` (``.npy`` files)."""

    format = "memmap"


class HDF5Reader(Reader):
    """Reader of ``format=hdf5``."""

    format = "hdf5"


class ParquetReader(Reader):
    """Reader of ``format=parquet``."""

    format = "parquet"


class TarReader(Reader):
    """Reader of ``format=tar`` (WebDataset)."""

    format = "tar"


class IpcReader(Reader):
    """Reader of ``format=ipc`` (Arrow)."""

    format = "ipc"


class MDSReader(Reader):
    """Reader of ``format=mds``."""

    format = "mds"


class DenseMemmapReader(MemmapReader):
    """Reader of ``(image, mask)`` in ``format=memmap``."""

    default_target = MASK


class DenseIpcReader(IpcReader):
    """Reader of ``(image, mask)`` in ``format=ipc``."""

    default_target = MASK


_ALL = (MemmapReader, HDF5Reader, ParquetReader, TarReader, IpcReader, MDSReader)
