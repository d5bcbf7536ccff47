"""Images per second on one core: `pipeline.images.process` against what others do, at four sizes.

    python benchmarks/images.py [photos=<folder>] [rounds=9] [core=0]

All bring JPEGs (quality 90, 4:2:0) to a smaller edge of 512 and write quality 95, 4:2:0. Contestants take turns on each
photo; a ratio is the median of the ratios of single turns, so that a change of the machine's speed hits both sides.
`floor` decodes and encodes, and nothing else: what no resizer can beat without a scaled decode.
Without `photos`, scikit-learn's two are enlarged, which makes them softer than real ones.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from statistics import median
from time import perf_counter

import cv2
import numpy as np
import simplejpeg
import torch
from PIL import Image

from pipeline.images import Limits, Pixels, Rules, decode, probe, process, resize, target_size

SIZES = {"0.7 MP": (1024, 683), "1 MP": (1224, 816), "4 MP": (2464, 1632), "12 MP": (4000, 3000)}
EDGE = 512


def ours(backend: str, scaled: bool = True) -> Callable[[bytes], bytes]:
    rules = Rules(min_image_size=0, max_image_size=EDGE, resize=backend, scaled_decode=scaled)
    return lambda data: process(data, rules).data


def pillow_bicubic(data: bytes) -> bytes:
    """As torchvision's transforms on PIL images do, and trainers that use them."""
    with Image.open(BytesIO(data)) as image:
        sized = image.convert("RGB").resize(target_size(*image.size, EDGE), Image.Resampling.BICUBIC)
    file = BytesIO()
    sized.save(file, "JPEG", quality=95, subsampling="4:2:0")
    return file.getvalue()


def opencv_area(data: bytes) -> bytes:
    """As img2dataset does."""
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    assert pixels is not None
    size = target_size(pixels.shape[1], pixels.shape[0], EDGE)
    sized = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    options = [cv2.IMWRITE_JPEG_QUALITY, 95, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420]
    return bytes(cv2.imencode(".jpg", sized, options)[1])


def floor(data: bytes) -> bytes:
    pixels = simplejpeg.decode_jpeg(data, "RGB")
    size = target_size(pixels.shape[1], pixels.shape[0], EDGE)
    corner = np.ascontiguousarray(pixels[: size[1], : size[0]])
    return bytes(simplejpeg.encode_jpeg(corner, 95, "RGB", "420"))


CONTESTANTS: dict[str, Callable[[bytes], bytes]] = {
    "ours, torch": ours("torch"),
    "ours, pillow": ours("pillow"),
    "ours, torch, full decode": ours("torch", scaled=False),
    "Pillow bicubic": pillow_bicubic,
    "OpenCV area": opencv_area,
    "floor": floor,
}


def photos(folder: str, size: tuple[int, int]) -> Iterator[bytes]:
    """Up to 6 photos, cut to the aspect of `size` and brought to it (only down, where they come from a folder)."""
    if folder:
        found = sorted(path for path in Path(folder).rglob("*.jp*g") if path.is_file() and not path.is_symlink())
        images: list[Image.Image] = [
            image for image in map(Image.open, found) if image.width >= size[0] and image.height >= size[1]
        ]
    else:
        from sklearn.datasets import load_sample_images

        images = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    for image in images[:6]:
        scale = min(image.width / size[0], image.height / size[1])
        box = (0, 0, size[0] * scale, size[1] * scale)
        pixels = np.asarray(image.convert("RGB").resize(size, Image.Resampling.BICUBIC, box=box))
        yield simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), 90, "RGB", "420")


def seconds(job: Callable[[bytes], bytes], data: bytes) -> float:
    start = perf_counter()
    job(data)
    return perf_counter() - start


def psnr(data: bytes, backend: str) -> float:
    """dB of our resized pixels, before encoding, against a full decode with bicubic in floats."""
    header = probe(data)
    size = target_size(header.width, header.height, EDGE)
    full = decode(data, header, Limits())
    planes = [Image.fromarray(full[:, :, channel].astype(np.float32)) for channel in range(3)]
    exact = np.stack([np.asarray(plane.resize(size, Image.Resampling.BICUBIC)) for plane in planes], -1).clip(0, 255)
    got: Pixels = resize(decode(data, header, Limits(), at_least=size), size, backend)
    return float(10 * np.log10(255**2 / np.mean((got - exact) ** 2)))


def main() -> None:
    options = dict(argument.split("=", 1) for argument in sys.argv[1:])
    os.sched_setaffinity(0, {int(options.get("core", min(os.sched_getaffinity(0))))})
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    for name, size in SIZES.items():
        files = list(photos(options.get("photos", ""), size))
        turns: dict[str, list[float]] = {contestant: [] for contestant in CONTESTANTS}
        for turn in range(int(options.get("rounds", 9)) + 1):
            for data in files:
                for contestant, job in CONTESTANTS.items():
                    took = seconds(job, data)
                    if turn:  # the first only warms up
                        turns[contestant].append(took)
        quality = [psnr(data, "torch") for data in files]
        fidelity = f"PSNR min {min(quality):.1f} mean {np.mean(quality):.1f} dB"
        print(f"\n{name} ({size[0]}x{size[1]}), {len(files)} photos, {fidelity}")
        print(f"{'':26}{'images/s':>10}{'MP/s':>8}{'x Pillow':>10}{'x OpenCV':>10}{'of floor':>10}")
        for contestant, times in turns.items():
            ratios = [
                median(other / own for other, own in zip(turns[rival], times, strict=True))
                for rival in ("Pillow bicubic", "OpenCV area", "floor")
            ]
            rate = 1 / median(times)
            line = f"{contestant:26}{rate:10.1f}{rate * size[0] * size[1] / 1e6:8.0f}"
            print(line + f"{ratios[0]:10.2f}{ratios[1]:10.2f}{ratios[2]:10.0%}")


if __name__ == "__main__":
    main()
