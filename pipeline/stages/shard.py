"""stage=shard: pack all kept samples, optionally shuffled, into partitions of equal size in a storage format.

The input is a dataset directory in any format, or a folder of images. Flexible formats keep the original bytes unless
``shape=``, ``im_mode=`` or ``encode=`` change them; fixed-size formats hold pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.config.cli import config_for
from pipeline.config.schema import ConfigError, ShardConfig
from pipeline.distributed import Rank, distributed
from pipeline.formats.base import IMAGE, MASK, get_format
from pipeline.formats.columns import WIDE
from pipeline.formats.pixel_arrays import mask_array, natural_mode, to_array, to_bytes
from pipeline.imaging import transform
from pipeline.imaging.memory import keep_freed_memory
from pipeline.partitions import engine
from pipeline.partitions.plan import Input, LeftOut, Partition
from pipeline.partitions.stage import Context, Stage
from pipeline.registry import stages
from pipeline.samples import Outcome, Row, SampleError, Schema
from pipeline.stages.inputs import Folder, Items, Upstream, is_image_folder

_CURE = "give shape=[height,width] to resize them, or choose a flexible format (ipc, parquet, tar, mds)"


@stages.register("shard", ShardConfig)
class Shard(Stage[ShardConfig]):
    name = "shard"
    writes_to_stores = True

    @classmethod
    def version_with(cls, config: ShardConfig) -> int:
        return 2 if config.format == "parquet" else 1

    @property
    def reads_upstream(self) -> bool:  # type: ignore[override]
        return not is_image_folder(self.config.input)

    @property
    def rechecks(self) -> bool:  # type: ignore[override]
        return not self.reads_upstream

    def watched(self) -> dict[str, str]:
        return self.items.watched()

    def left_out(self) -> LeftOut:
        return self.items.left_out()

    def changed(self, file: Input) -> bool:
        return self.items.changed(file)

    @property
    def format(self) -> str:
        return str(self.config.format)

    @cached_property
    def fixed(self) -> bool:
        return get_format(self.format).fixed

    @cached_property
    def items(self) -> Items:
        """The input to convert."""
        return Upstream(self.config, self.upstream) if self.reads_upstream else Folder(self.config)

    def forget_upstream(self) -> None:
        super().forget_upstream()
        self.__dict__.pop("items", None)

    def schema(self) -> Schema:
        schema = self.items.schema()
        if not any(kind in WIDE for kind in schema.values()):
            raise ConfigError(f"input={self.config.input}: there is no column of bytes to store")
        if (self.fixed or self.changes_pixels) and IMAGE not in schema:
            raise ConfigError(f"format={self.format}: the input has no column {IMAGE!r}; it has {', '.join(schema)}")
        if self.fixed and any(kind in WIDE for name, kind in schema.items() if name not in (IMAGE, MASK)):
            wide = ", ".join(name for name, kind in schema.items() if kind in WIDE and name not in (IMAGE, MASK))
            raise ConfigError(f"format={self.format} holds images, masks and short columns, not {wide}")
        return schema

    def extra(self) -> dict[str, Any]:
        inherited = {name: value for name, value in self.items.extra().items() if name != "image"}
        return {**inherited, "image": self._first_image} if self.fixed else inherited

    # ---- pixels

    @property
    def changes_pixels(self) -> bool:
        config = self.config
        return bool(config.shape or config.im_mode or config.encode)

    @cached_property
    def size(self) -> tuple[int, int] | None:
        """Requested (height, width); None: unchanged."""
        shape = self.config.shape
        if len(shape) not in (0, 2) or min(shape, default=1) < 1:
            raise ConfigError(f"shape={list(shape)}: expected [height,width] in pixels")
        return (shape[0], shape[1]) if shape else None

    @cached_property
    def _first_image(self) -> dict[str, Any]:
        """Shape, dtype and mode of all images in a fixed-size format: as requested, else those of the first image."""
        for row in self.items.some():
            try:
                mode = self.config.im_mode or _mode_of(row)
                array = to_array(row[IMAGE], mode, self.size)
                masks = {"mask": _kind(_with_channels(mask_array(row[MASK], self.size)))} if MASK in row else {}
            except SampleError:
                continue
            return {**_kind(array), "mode": mode, **masks}
        raise ConfigError(f"input={self.config.input}: none of its first images can be decoded")

    def validate(self) -> None:
        config = self.config
        if not self.fixed and (self.size or config.im_mode) and not config.encode:
            raise ConfigError("shape= and im_mode= change pixels: say how to store them, encode=png or encode=jpeg")
        if self.fixed and config.encode:
            raise ConfigError(f"encode={config.encode}: format={config.format} holds pixels, not files")
        if config.compression and config.format != "hdf5":
            raise ConfigError(f"compression={config.compression}: only format=hdf5 supports it")

    def _to_pixels(self, row: Row, source: str, first: dict[str, Any]) -> None:
        """Replace the files of image and mask by arrays, which must have the shape and mode of the first image."""
        natural = _mode_of(row)
        if not self.config.im_mode and natural != first["mode"]:
            raise ConfigError(
                f"{source or row['key']} has mode {natural}, but format={self.format} holds images of one mode, "
                f"{first['mode']} as the first has: give im_mode=RGB, or choose a flexible format"
            )
        array = to_array(row[IMAGE], first["mode"], self.size)
        if list(array.shape) != first["shape"] or str(array.dtype) != first["dtype"]:
            raise ConfigError(
                f"{source or row['key']} is {_shape(array.shape)}, but format={self.format} holds images of one size, "
                f"{_shape(first['shape'])} as the first has: {_CURE}"
            )
        row[IMAGE] = array
        if MASK in row:
            row[MASK] = self._mask(row, first["mask"], source)
        self._describe(row, array, to_format(array))

    def _mask(self, row: Row, first: dict[str, Any], source: str) -> npt.NDArray[Any]:
        values = _with_channels(mask_array(row[MASK], self.size))
        if list(values.shape) != first["shape"] or str(values.dtype) != first["dtype"]:
            raise ConfigError(
                f"the mask of {source or row['key']} is {_shape(values.shape)} {values.dtype}, but "
                f"format={self.format} holds masks of one kind, {_shape(first['shape'])} {first['dtype']} as the first "
                f"is: {_CURE}"
            )
        return values

    def _encode(self, row: Row) -> None:
        """Encode image and mask again as ``encode=`` requests."""
        array = to_array(row[IMAGE], self.config.im_mode or _encodable(_mode_of(row), self.config.encode), self.size)
        kind = self.config.encode
        if kind == "png":
            row[IMAGE], kind = to_bytes(array)
        else:
            pixels = array if array.ndim == 3 and array.shape[2] == 3 else to_array(row[IMAGE], "RGB", self.size)
            row[IMAGE] = transform.encode(pixels, kind, self.config.quality)
        if MASK in row and self.size:
            row[MASK] = to_bytes(mask_array(row[MASK], self.size))[0]
        self._describe(row, array, kind)

    def _describe(self, row: Row, array: npt.NDArray[Any], kind: str) -> None:
        row |= {
            name: value
            for name, value in (
                ("format", kind),
                ("width", array.shape[1]),
                ("height", array.shape[0]),
                ("mode", natural_mode_of(array)),
            )
            if name in row
        }

    # ---- work

    def plan(self, since: int = 0) -> Iterator[Partition]:
        sample_bytes = 0
        if self.fixed:
            first = self._first_image
            sample_bytes = int(np.prod(first["shape"])) * np.dtype(first["dtype"]).itemsize
        return self.items.plan(since, sample_bytes)

    def process(self, partition: Partition, context: Context) -> Iterator[Outcome]:
        for outcome in self.items.outcomes(partition, context):
            if outcome.row is not None and (self.fixed or self.changes_pixels):
                try:
                    if self.fixed:
                        self._to_pixels(outcome.row, outcome.source, context.extra["image"])
                    else:
                        self._encode(outcome.row)
                except SampleError as error:
                    outcome.row, outcome.status = None, "failed"
                    outcome.reason, outcome.detail = error.reason, error.detail
            yield outcome


def _mode_of(row: Row) -> str:
    return "" if row.get("format") == "npy" else natural_mode(row[IMAGE])


def _kind(array: npt.NDArray[Any]) -> dict[str, Any]:
    return {"shape": list(array.shape), "dtype": str(array.dtype)}


def _with_channels(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Add a channel axis to masks, so that a file of them is (n, h, w, c)."""
    return values[:, :, None] if values.ndim == 2 else values


def _encodable(mode: str, encode: str) -> str:
    return mode if encode == "png" else "RGB"


def to_format(array: npt.NDArray[Any]) -> str:
    """File format for rows read from a fixed-size format: ``png``, or ``npy`` if PNG cannot represent the array."""
    channels = array.shape[2] if array.ndim == 3 else 1
    png = (array.dtype == np.uint8 and channels <= 4) or (array.dtype == np.uint16 and channels == 1)
    return "png" if png else "npy"


def natural_mode_of(array: npt.NDArray[Any]) -> str:
    """Pillow's mode for an array of pixels; the dtype if Pillow has no such mode."""
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.dtype == np.uint8 and channels <= 4:
        return ("L", "LA", "RGB", "RGBA")[channels - 1]
    return "I;16" if array.dtype == np.uint16 and channels == 1 else str(array.dtype)


def _shape(shape: Any) -> str:
    return "×".join(map(str, shape))


@distributed
def main(rank: Rank, config: ShardConfig) -> None:
    keep_freed_memory()
    engine.main(Shard, config, rank)


if __name__ == "__main__":
    main(config_for("shard"))
