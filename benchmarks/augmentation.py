"""RandAugment's operations: Pillow's, which training uses, and those of torchvision.transforms.v2 on tensors.

    python benchmarks/augmentation.py [edge=224] [rounds=15]

Uses one core. Each round applies each operation once to one uint8 image, from tensor to tensor, alternating between the
libraries. The ratio is the median of the ratios of single rounds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from statistics import median
from time import perf_counter

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from pipeline.training.images import OPERATIONS

STRENGTH = 0.5


def pillow(image: Tensor) -> list[Tensor]:
    pillow_image = Image.fromarray(image.permute(1, 2, 0).numpy())
    return [torch.from_numpy(np.array(each(pillow_image, STRENGTH))).permute(2, 0, 1) for each in OPERATIONS[1:]]


def torchvision(image: Tensor) -> list[Tensor]:
    grey, bilinear, edge = [127.0] * 3, InterpolationMode.BILINEAR, image.shape[2]
    shear, shift, factor = (
        float(np.degrees(np.arctan(0.3 * STRENGTH))),
        round(0.45 * STRENGTH * edge),
        1 + 0.9 * STRENGTH,
    )
    operations: tuple[Callable[[Tensor], Tensor], ...] = (
        F.autocontrast,
        F.equalize,
        lambda x: F.rotate(x, 30 * STRENGTH, bilinear, fill=grey),
        lambda x: F.posterize(x, 8 - round(4 * STRENGTH)),
        lambda x: F.solarize(x, round(256 * (1 - STRENGTH))),
        lambda x: F.adjust_saturation(x, factor),
        lambda x: F.adjust_contrast(x, factor),
        lambda x: F.adjust_brightness(x, factor),
        lambda x: F.adjust_sharpness(x, factor),
        lambda x: F.affine(x, 0, [0, 0], 1, [shear, 0], bilinear, fill=grey),
        lambda x: F.affine(x, 0, [0, 0], 1, [0, shear], bilinear, fill=grey),
        lambda x: F.affine(x, 0, [shift, 0], 1, [0, 0], bilinear, fill=grey),
        lambda x: F.affine(x, 0, [0, shift], 1, [0, 0], bilinear, fill=grey),
    )
    return [each(image) for each in operations]


def main(arguments: list[str]) -> None:
    given = dict(argument.split("=", 1) for argument in arguments)
    edge = int(given.get("edge", 224))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    image = (torch.rand(3, edge, edge) * 255).to(torch.uint8)
    same = [bool(torch.equal(one, other)) for one, other in zip(pillow(image), torchvision(image), strict=True)]
    ratios = []
    for _ in range(int(given.get("rounds", 15))):
        begin = perf_counter()
        pillow(image)
        middle = perf_counter()
        torchvision(image)
        ratios.append((perf_counter() - middle) / (middle - begin))
    print(
        f"torchvision takes {median(ratios):.2f} times as long as Pillow; {sum(same)} of {len(same)} give equal pixels"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
