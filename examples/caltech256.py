"""Caltech256 from start to end: `256_ObjectCategories/<number>.<class>/<image>.jpg` → a storage format → batches.

    python examples/caltech256.py 256_ObjectCategories /data/caltech256 ipc 8

The last two arguments are the storage format (ipc) and the number of processes (2).
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from torch.utils.data import DataLoader

from pipeline import formats

CONVERTERS = {
    "ipc": formats.IpcConverter,
    "parquet": formats.ParquetConverter,
    "tar": formats.TarConverter,
    "mds": formats.MDSConverter,
    "memmap": formats.MemmapConverter,
    "hdf5": formats.HDF5Converter,
}
SIZE = (224, 224)


def prepared(image: object) -> torch.Tensor:
    """A tensor (3, h, w), float32 in [0, 1]."""
    pixels = np.array(formats.ResizeAndConvert(SIZE, keep_ratio=True)(image))
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def main(source: str, output: str, format: str = "ipc", processes: str = "2") -> None:
    # The folder 257.clutter is not a real class; remove it from the folder if you do not want it.
    pixels = {"shape": SIZE, "im_mode": "RGB"} if format in ("memmap", "hdf5") else {}
    CONVERTERS[format](source, output, images_per_file=5000, num_workers=int(processes), **pixels).convert()

    reader = formats.Reader(output, transform=prepared, mode="RGB")
    print(reader)
    loader = DataLoader(reader, batch_size=32, shuffle=True, num_workers=2, worker_init_fn=reader.worker_init_fn)
    images, labels = next(iter(loader))
    names = [reader.classes[label] for label in labels[:4]]
    print(f"a batch: images {tuple(images.shape)}, labels {labels[:4].tolist()} = {names}")


if __name__ == "__main__":
    main(*sys.argv[1:]) if len(sys.argv) > 2 else sys.exit(__doc__)
