"""Storage formats: how the samples of a partition are stored in files; converters and readers for use from Python."""

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
    from pipeline.loading.reader import (
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
_OWNERS = {
    "Format": "pipeline.formats.base",
    "register_format": "pipeline.formats.base",
    "FixedFiles": "pipeline.formats.extension",
    "FlexibleFiles": "pipeline.formats.extension",
}


def __getattr__(name: str) -> Any:
    """Import classes lazily: converters need the engine, which needs this package."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    usual = "pipeline.loading.reader" if name.endswith("Reader") else "pipeline.convert.converter"
    return getattr(import_module(_OWNERS.get(name, usual)), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
