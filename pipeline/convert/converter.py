"""Converters for use from Python: stage=shard as an object."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from pipeline.config import cli
from pipeline.config.arrow import without_pandas
from pipeline.config.schema import FORMATS, ConfigError, ShardConfig
from pipeline.distributed import Place, Rank, find_place
from pipeline.formats.base import Format, Location, Writer, get_format, register_format
from pipeline.formats.fixed import FixedWriter
from pipeline.formats.pixel_arrays import mask_array, nearest, to_array, to_image
from pipeline.imaging.memory import keep_freed_memory
from pipeline.partitions import engine
from pipeline.samples import Row
from pipeline.stages.inputs import Items, Objects
from pipeline.stages.shard import Shard
from pipeline.storage import StorageError

if TYPE_CHECKING:
    from pipeline.partitions.dataset import Dataset

_GIB = 1 << 30
_FINE = b""  # a process's message of success; otherwise, it sends the pickled error


class Converter:
    """Converts a folder of images, a dataset directory or a map-style Dataset when ``convert()`` is called.

    The output has the same bytes as that of ``python -m pipeline.stages.shard`` with the same settings, for any number
    of processes. After an interruption, the same call resumes.

    Args:
        input_data: a folder (class folders give integer labels), a dataset directory, or a Dataset whose items are
            ``(image, label)``, ``(image, mask)``, an image, or a mapping with ``image`` and any other columns. Images
            are PIL images, arrays (h, w[, c]), tensors (c, h, w), or the bytes or path of a file, which is kept.
        output_path: Folder to write to, which is empty or from an earlier call.
        images_per_file: Number of samples per file (0: as many as fit into 64 MiB).
        batch_size: Number of items of a Dataset that are passed to ``_custom_collate_fn`` at once.
        num_workers: Number of processes.
        shape: (height, width) to which images are resized; masks are resized by nearest neighbour.
        im_mode: Mode to which images are converted: RGB, L, RGBA, LA, I;16.
        dist: Whether this process is one of several started by torchrun or srun, which share the work.
        settings: Any other option of ``python -m pipeline.stages.shard --help``.
    """

    format: ClassVar[str | Format] = ""
    """Storage format: the name of a known format, or a custom one; see :mod:`pipeline.formats.extension`."""
    _family: ClassVar[str] = ""
    """Known format of the same kind, whose settings a custom format uses."""

    def __init__(
        self,
        input_data: Any,
        output_path: str | Path,
        images_per_file: int = 0,
        batch_size: int = 32,
        num_workers: int = 0,
        shape: tuple[int, int] | None = None,
        im_mode: str = "",
        dist: bool = False,
        **settings: Any,
    ) -> None:
        for name, value, least in (
            ("images_per_file", images_per_file, 0),
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
        ):
            if value < least:
                raise ConfigError(f"{name}={value}: must be at least {least}")
        self.input_data = input_data
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.dist = dist
        given: dict[str, Any] = {"format": self._known_format(), "output": str(output_path), **settings}
        given |= {"shape": list(shape or ()), "im_mode": im_mode}
        if images_per_file:
            given = {"partition_size": images_per_file, "shard_bytes": _GIB, **given}
        if isinstance(input_data, (str, Path)):
            if not Path(input_data).is_dir():
                raise ConfigError(f"input_data={input_data}: no such folder")
            given["input"] = str(input_data)
        self.config: ShardConfig = cli.build(ShardConfig, given)

    def _known_format(self) -> str:
        """Set ``format_name``, and return the format for the config, which only allows built-in formats.

        Raises:
            ConfigError: there is no such format, or it does not match the base class.
        """
        if not self._family:
            raise ConfigError(f"{type(self).__name__}: derive it from ConverterFixedSize or ConverterFlexibleSize")
        if isinstance(self.format, str):
            self.format_name = self.format or self._family
        else:
            register_format(self.format)
            self.format_name = self.format.name
        if get_format(self.format_name).fixed != get_format(self._family).fixed:
            base = "ConverterFixedSize" if get_format(self.format_name).fixed else "ConverterFlexibleSize"
            raise ConfigError(f"{type(self).__name__}.format={self.format_name}: derive the class from {base}")
        return self.format_name if self.format_name in FORMATS else self._family

    def convert(self) -> Path:
        """Convert everything that earlier calls have not converted, and return the output folder.

        Raises:
            ConfigError: A setting, the input or the output is wrong; the message names it.
            StorageError: The output cannot be written, or too many samples failed. Committed partitions are kept.
            Stopped: The process received a signal to stop.
        """
        place = find_place(os.environ) if self.dist else Place()
        if self.num_workers > 1:
            self._convert_in_processes(place)
        else:
            self._run(place)
        self._check_readable()
        return Path(self.config.output)

    def _check_readable(self) -> None:
        """Raise ConfigError if the output of a custom ``_write_data_to_disk`` is unreadable."""
        known = (ConverterFixedSize, ConverterFlexibleSize)
        if any(type(self)._write_data_to_disk is cls._write_data_to_disk for cls in known):  # type: ignore[attr-defined]
            return
        from pipeline.partitions.dataset import Dataset, RandomAccess

        dataset = Dataset.open(self.config.output)
        if dataset.success is None or not len(dataset):
            return
        access = RandomAccess(dataset)
        try:
            for position in (0, len(access) - 1):
                access.row(position)
        except StorageError as error:
            raise ConfigError(
                f"{type(self).__name__}._write_data_to_disk has written data that format={self.format_name} cannot "
                "read "
                f"({error.__cause__}): give the class a format= of its own, see FixedFiles and FlexibleFiles"
            ) from error

    def repair(self) -> bool:
        """Check every byte of the finished output and rebuild damaged partitions; return whether there were any.

        Outputs made from a folder or a dataset directory can also be repaired by stage=repair; outputs made from a
        Dataset cannot.

        Raises:
            ConfigError: There is no output, or the input has changed.
            StorageError: The content differs from the earlier one.
        """
        from pipeline.stages.repair import repair

        def make(dataset: Dataset, rank: Rank, lenient: bool) -> Shard:
            again = replace(self.config, overwrite=False, run_id="")
            return _stage_of(self, replace(again, max_failed_fraction=1.0) if lenient else again, rank)

        rank = Rank(Place())
        with rank.signals:
            return repair(self.config.output, rank, workers=max(1, self.num_workers), make=make) is not None

    def _run(self, place: Place, run_id: str = "", planned: Callable[[], None] = lambda: None) -> None:
        rank = Rank(place)
        config = replace(self.config, run_id=run_id) if run_id and not self.config.run_id else self.config
        with rank.signals:
            engine.run(_stage_of(self, config, rank), planned)

    def _convert_in_processes(self, place: Place) -> None:
        """Each process is a rank; the first one plans. Processes are forked, so the Dataset need not be picklable."""
        run_id = uuid.uuid4().hex if not self.dist else ""
        count = self.num_workers
        processes: list[_Process] = []
        try:
            for worker in range(count):
                rank = Place(place.rank * count + worker, place.world_size * count, worker, count)
                processes.append(_Process(self._child, rank, run_id))
                if worker == 0:
                    processes[0].heard()
            _await_all(processes)
        finally:
            for process in processes:
                process.stop()
            for process in processes:
                process.join()

    def _child(self, say: Callable[[bytes], None], place: Place, run_id: str) -> None:
        """Run a process: report the plan, if it is the first one, and the result."""
        keep_freed_memory()
        gc.freeze()  # do not scan objects from before the fork for garbage
        if self.config.input:  # otherwise, the Dataset may need pandas
            without_pandas()
        try:
            self._run(place, run_id, lambda: say(_FINE) if not place.local_rank else None)
            say(_FINE)
        except BaseException as error:
            say(_portable(error))

    # ---- hooks

    def _custom_collate_fn(self, batch: list[Any]) -> list[Row]:
        """Turn the items of a Dataset into rows, one for each item: mappings with ``image`` and any other columns."""
        from pipeline.stages.inputs import rows_of

        return rows_of(batch)

    def _adapted(self, writer: Writer) -> Writer:
        return writer


class ConverterFlexibleSize(Converter):
    """Converter to formats that store image files unchanged; without a ``format``, Arrow IPC."""

    _family = "ipc"

    def _write_data_to_disk(self, writer: Writer, row: Row) -> None:
        """Write one sample."""
        writer.write(row)

    def _adapted(self, writer: Writer) -> Writer:
        return _Hooked(self, writer)


class _Hooked(Writer):
    def __init__(self, converter: ConverterFlexibleSize, writer: Writer) -> None:
        self._converter = converter
        self._writer = writer

    def write(self, row: Row) -> None:
        self._converter._write_data_to_disk(self._writer, row)

    def close(self) -> list[Location]:
        return self._writer.close()


class ConverterFixedSize(Converter):
    """Converter to formats that store pixels of one size and mode; without a ``format``, ``.npy`` files.

    Give ``shape`` and ``im_mode`` if images differ.
    """

    _family = "memmap"

    def _init_arrays(self, writer: FixedWriter, count: int, first: Row) -> dict[str, npt.NDArray[Any]]:
        """Allocate the arrays (count, h, w[, c]) for the samples of a file; ``first`` is the first sample."""
        return writer.init_arrays(count, first)

    def _write_data_to_disk(
        self, writer: FixedWriter, number: int, arrays: Mapping[str, npt.NDArray[Any]], rows: list[Row]
    ) -> list[Location]:
        """Write data file ``number`` and return the location of each row's image."""
        return writer.write_file(number, dict(arrays), rows)

    def _adapted(self, writer: Writer) -> Writer:
        assert isinstance(writer, FixedWriter)
        writer.allocate = lambda count, first: self._init_arrays(writer, count, first)
        writer.store = lambda number, arrays, rows: self._stored(writer, number, arrays, rows)
        return writer

    def _stored(
        self, writer: FixedWriter, number: int, arrays: Mapping[str, npt.NDArray[Any]], rows: list[Row]
    ) -> list[Location]:
        places = self._write_data_to_disk(writer, number, arrays, rows)
        if not isinstance(places, list) or len(places) != len(rows):
            raise ConfigError(
                f"{type(self).__name__}._write_data_to_disk must return a list of (file, offset, length), one for "
                f"each of the {len(rows)} rows, as writer.write_file does"
            )
        return places


def _stage_of(converter: Converter, config: ShardConfig, rank: Rank) -> Shard:
    class Conversion(Shard):
        @property
        def reads_upstream(self) -> bool:  # type: ignore[override]
            return super().reads_upstream if config.input else False

        @cached_property
        def items(self) -> Items:
            if config.input:
                return super().items
            return Objects(config, converter.input_data, converter._custom_collate_fn, converter.batch_size)

        @property
        def format(self) -> str:
            return converter.format_name

        def identity(self) -> dict[str, Any]:
            return super().identity() | {"format": converter.format_name}

        def adapted(self, writer: Writer) -> Writer:
            return converter._adapted(writer)

    return Conversion(config, rank)


class _Process:
    """A conversion process and the pipe for its messages."""

    def __init__(self, life: Callable[..., None], *args: Any) -> None:
        context = multiprocessing.get_context("fork")
        self.receiver, sender = context.Pipe(duplex=False)
        self._process = context.Process(target=life, args=(sender.send, *args), daemon=True)
        self._process.start()
        sender.close()

    def heard(self) -> None:
        """Wait for the next message; raise the error if it reports one."""
        try:
            said = self.receiver.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(
                f"a conversion process was killed (exit code {self._process.exitcode}): the same call resumes"
            ) from None
        if said != _FINE:
            raise pickle.loads(said)

    def stop(self) -> None:
        self._process.terminate()

    def join(self) -> None:
        self._process.join()


def _await_all(processes: Iterable[_Process]) -> None:
    """Wait for all processes; raise the error of the first one that fails."""
    pending: dict[Any, _Process] = {process.receiver: process for process in processes}
    while pending:
        for ready in wait(list(pending)):
            pending.pop(ready).heard()


def _portable(error: BaseException) -> bytes:
    try:
        data = pickle.dumps(error)
        pickle.loads(data)
        return data
    except Exception:  # a user's exception may not be picklable
        return pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))


class ResizeAndConvert:
    """Transform for a Dataset that resizes and converts an image (PIL image, array or bytes of a file).

    Args:
        size: (height, width), in this order.
        mode: Pillow's name of the mode.
        keep_ratio: First crop the centre to the aspect ratio of ``size``, instead of distorting the image.
        mask: Resize by nearest neighbour, so that values do not change.
    """

    def __init__(
        self, size: tuple[int, int], mode: str = "RGB", *, keep_ratio: bool = False, mask: bool = False
    ) -> None:
        if len(size) != 2 or min(size) < 1:
            raise ConfigError(f"size={size}: expected (height, width)")
        self.size = (int(size[0]), int(size[1]))
        self.mode = mode
        self.keep_ratio = keep_ratio
        self.mask = mask

    def __call__(self, image: Any) -> Any:
        from PIL import Image

        if isinstance(image, (bytes, bytearray)):
            image = to_image(mask_array(bytes(image)) if self.mask else to_array(bytes(image), self.mode))
        if self.mask:
            return nearest(self._cut(np.asarray(image)), self.size)
        decoded = image if isinstance(image, Image.Image) else to_image(np.asarray(image))
        if decoded.mode != self.mode:
            decoded = decoded.convert(self.mode)
        height, width = self.size
        box = self._box(decoded.width, decoded.height) if self.keep_ratio else None
        return decoded.resize((width, height), Image.Resampling.BICUBIC, box=box)

    def _box(self, width: int, height: int) -> tuple[float, float, float, float]:
        """The central part of an image with the aspect ratio of ``size``: left, upper, right, lower."""
        scale = min(width / self.size[1], height / self.size[0])
        w, h = min(self.size[1] * scale, width), min(self.size[0] * scale, height)  # not exceeded by a rounding error
        return ((width - w) / 2, (height - h) / 2, (width + w) / 2, (height + h) / 2)

    def _cut(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        if not self.keep_ratio:
            return values
        left, upper, right, lower = (round(edge) for edge in self._box(values.shape[1], values.shape[0]))
        return values[upper:lower, left:right]

    def __repr__(self) -> str:
        return f"ResizeAndConvert(size={self.size}, mode={self.mode!r})"


class PairedFolders:
    """Images and masks with the same file names in two folders, as a Dataset of ``{"image", "mask", "key"}``."""

    def __init__(self, image_folder: str | Path, mask_folder: str | Path) -> None:
        from pipeline.sources.image_folder import walk

        self._roots = Path(image_folder), Path(mask_folder)
        for root in self._roots:
            if not root.is_dir():
                raise ConfigError(f"input_data={root}: no such folder")
        masks = {found.path.rpartition(".")[0]: found.path for found in walk(self._roots[1])}
        self._pairs = [(found.path, masks.get(found.path.rpartition(".")[0])) for found in walk(self._roots[0])]
        if not self._pairs:
            raise ConfigError(f"input_data={image_folder}: no image below this folder")

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        from pipeline.samples import make_key

        image, mask = self._pairs[index]
        if mask is None:
            raise FileNotFoundError(f"{image} has no mask")
        return {"key": make_key(image), "image": self._roots[0] / image, "mask": self._roots[1] / mask}


class _Dense(Converter):
    """For dense labels: ``input_data`` may also be a pair of folders with images and masks of the same names."""

    def __init__(self, input_data: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(input_data, (tuple, list)) and len(input_data) == 2 and isinstance(input_data[0], (str, Path)):
            input_data = PairedFolders(*input_data)
        super().__init__(input_data, *args, **kwargs)


class MemmapConverter(ConverterFixedSize):
    """Converter to ``.npy`` files of pixels."""

    format = "memmap"


class HDF5Converter(ConverterFixedSize):
    """Converter to HDF5 files of pixels; ``compression="gzip"`` makes them smaller."""

    format = "hdf5"


class ParquetConverter(ConverterFlexibleSize):
    """Converter to Parquet files."""

    format = "parquet"


class TarConverter(ConverterFlexibleSize):
    """Converter to WebDataset tar files."""

    format = "tar"


class IpcConverter(ConverterFlexibleSize):
    """Converter to Arrow IPC files."""

    format = "ipc"


class MDSConverter(ConverterFlexibleSize):
    """Converter to MDS shards, which StreamingDataset reads."""

    format = "mds"


class DenseMemmapConverter(_Dense, MemmapConverter):
    """Converter of images and masks to ``.npy`` files of pixels."""


class DenseIpcConverter(_Dense, IpcConverter):
    """Converter of images and masks to Arrow IPC files."""
