"""Semantic segmentation: images and masks with the same names in two folders → (image, mask), values unchanged.

    python examples/dense_labels.py VOC2012/JPEGImages VOC2012/SegmentationClass /data/voc

Masks are resized by nearest neighbour. The fixed-size format has arrays (num, height, width, channels) that
`numpy.load(..., mmap_mode="r")` reads, too; the flexible one keeps the files and their sizes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from pipeline.formats import DenseIpcConverter, DenseIpcReader, DenseMemmapConverter, DenseMemmapReader


def main(images: str, masks: str, output: str) -> None:
    root = Path(output)
    fixed = DenseMemmapConverter(
        (images, masks), root / "memmap", shape=(256, 256), im_mode="RGB", num_workers=2, max_failed_fraction=0.9
    ).convert()  # images without a mask count as failed: in VOC, only some have one
    flexible = DenseIpcConverter((images, masks), root / "ipc", num_workers=2, max_failed_fraction=0.9).convert()

    reader = DenseMemmapReader(fixed, output="array")
    pixels, mask = reader[0]
    print(
        f"fixed: {len(reader)} pairs, pixels {pixels.shape}, mask {mask.shape}, classes {np.unique(mask)[:5].tolist()}"
    )
    image, mask = DenseIpcReader(flexible)[0]
    print(f"flexible: an image of {image.size[0]}x{image.size[1]}, a mask of {mask.shape[1]}x{mask.shape[0]}")


if __name__ == "__main__":
    main(*sys.argv[1:]) if len(sys.argv) > 3 else sys.exit(__doc__)
