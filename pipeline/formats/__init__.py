"""Storage formats: how the samples of a partition lie on disk; converters and readers for people who work in Python."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.convert.converter import (
        Converter,
        ConverterFixedSize,
        ConverterFlexibleSize,
        DenseIpcConverter,
        DenseMemmapConverter,
        HDF5Converter,
        IpcConverter,
        MDSConverter,
        MemmapConverter,
        PairedFolders,
        ParquetConverter,
        ResizeAndConvert,
        TarConverter,
    )
    from pipeline.formats.base import Format, register_format
    from pipeline.formats.extension import FixedFiles, FlexibleFiles
    from pipeline.formats.reader import (
        DenseIpcReader,
        DenseMemmapReader,
        HDF5Reader,
        IpcReader,
        MDSReader,
        MemmapReader,
        ParquetReader,
        Reader,
        TarReader,
    )

__all__ = [
    "Converter",
    "ConverterFixedSize",
    "ConverterFlexibleSize",
    "DenseIpcConverter",
    "DenseIpcReader",
    "DenseMemmapConverter",
    "DenseMemmapReader",
    "FixedFiles",
    "FlexibleFiles",
    "Format",
    "HDF5Converter",
    "HDF5Reader",
    "IpcConverter",
    "IpcReader",
    "MDSConverter",
    "MDSReader",
    "MemmapConverter",
    "MemmapReader",
    "PairedFolders",
    "ParquetConverter",
    "ParquetReader",
    "Reader",
    "ResizeAndConvert",
    "TarConverter",
    "TarReader",
    "register_format",
]
_MODULES = {"Format": "base", "register_format": "base", "FixedFiles": "extension", "FlexibleFiles": "extension"}


def __getattr__(name: str) -> Any:
    """The classes are loaded when they are asked for: the engine, which they use, uses this package's modules."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _MODULES.get(name) or ("reader" if name.endswith("Reader") else "converter")
    return getattr(import_module(f"{__name__}.{module}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
