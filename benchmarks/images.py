"""Images per second on one core of `pipeline.imaging.transform.process` and others, at four sizes; and its fidelity.

    python benchmarks/images.py photos=<folder> [rounds=9] [core=0] [photo_count=6] [sizes=1,4,12] [stage=true]

All resize JPEGs (quality 90, 4:2:0) to a shorter edge of 512 and write quality 95, 4:2:0. Contestants take turns on
each photo; a ratio is the median of the ratios of single turns, so that a change in the machine's speed affects both
sides. `floor` decodes in full and encodes, and nothing else: without a scaled decode, no resizer can be faster. PSNR
and SSIM compare pixels before encoding with a full decode and bicubic resizing in floats.
Without `photos`, scikit-learn's two are upscaled, which makes them softer than real ones. Debian's packages
gnome-backgrounds, mate-backgrounds and plasma-workspace-wallpapers have some of 12 MP and more.
pyvips takes part if it is installed (pip install pyvips pyvips-binary).

benchmarks/filter.py measures the speed of the whole filter stage relative to this; `stage=true` runs it at the end on
the same photos. benchmarks/download.py photos=<folder> compares with img2dataset itself, with a server.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from statistics import median
from time import perf_counter

import cv2
import numpy as np
import simplejpeg
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import Resize

sys.path.insert(0, str(Path(__file__).parents[1]))

from _photos import EDGE, SIZES, photos

from pipeline.imaging.transform import Rules, decode, geometry, probe, process, render, target_size

Job = Callable[[bytes], bytes]


def rules(backend: str = "fast", scaled: bool = True) -> Rules:
    return Rules(min_image_size=0, max_image_size=EDGE, resize=backend, scaled_decode=scaled)


def ours(backend: str = "fast", scaled: bool = True) -> Job:
    chosen = rules(backend, scaled)
    return lambda data: process(data, chosen).data


_torchvision_resize = Resize(EDGE, InterpolationMode.BICUBIC)


def torchvision_on_pil(data: bytes) -> bytes:
    """As micro_diffusion does."""
    with Image.open(BytesIO(data)) as image:
        sized = _torchvision_resize(image.convert("RGB"))
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


def vips_thumbnail(data: bytes) -> bytes:
    import pyvips

    header = probe(data)
    width, height = target_size(header.width, header.height, EDGE)
    sized = pyvips.Image.thumbnail_buffer(data, width, height=height, size="force")
    return bytes(sized.jpegsave_buffer(Q=95, subsample_mode="on"))


def floor(data: bytes) -> bytes:
    pixels = simplejpeg.decode_jpeg(data, "RGB")
    size = target_size(pixels.shape[1], pixels.shape[0], EDGE)
    corner = np.ascontiguousarray(pixels[: size[1], : size[0]])
    return bytes(simplejpeg.encode_jpeg(corner, 95, "RGB", "420"))


CONTESTANTS: dict[str, Job] = {
    "ours": ours(),
    "ours, full decode": ours(scaled=False),
    "ours, resize=pillow": ours("pillow"),
    "torchvision on PIL": torchvision_on_pil,
    "OpenCV area": opencv_area,
    "floor": floor,
}
os.environ["VIPS_CONCURRENCY"] = "1"  # threads per image
try:
    import pyvips  # noqa: F401

    CONTESTANTS["pyvips thumbnail"] = vips_thumbnail
except ImportError:
    print("(pyvips is not installed: left out)")


def seconds(job: Job, data: bytes) -> float:
    start = perf_counter()
    job(data)
    return perf_counter() - start


def fidelity(data: bytes) -> tuple[float, float]:
    """PSNR in dB and SSIM of our pixels, before encoding, against a full decode with bicubic in floats."""
    header = probe(data)
    shape = geometry(header.width, header.height, rules())
    full = decode(data, header)
    planes = [Image.fromarray(full[:, :, channel].astype(np.float32)) for channel in range(3)]
    sized = [np.asarray(plane.resize(shape.sized, Image.Resampling.BICUBIC)) for plane in planes]
    exact = np.stack(sized, -1).clip(0, 255).astype(np.float64)
    got = render(data, header, shape, rules())[:, :, :3].astype(np.float64)
    return float(10 * np.log10(255**2 / np.mean((got - exact) ** 2))), ssim(got.mean(-1), exact.mean(-1))


def ssim(one: np.ndarray, other: np.ndarray) -> float:
    """Wang et al. 2004 with a Gaussian window (sigma 1.5), on grey levels 0 to 255."""

    def blurred(image: np.ndarray) -> np.ndarray:
        return np.asarray(cv2.GaussianBlur(image, (11, 11), 1.5))

    a, b = blurred(one), blurred(other)
    va, vb, cov = blurred(one * one) - a * a, blurred(other * other) - b * b, blurred(one * other) - a * b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return float(np.mean((2 * a * b + c1) * (2 * cov + c2) / ((a * a + b * b + c1) * (va + vb + c2))))


def compare(name: str, size: tuple[int, int], files: list[bytes], rounds: int) -> None:
    turns: dict[str, list[float]] = {contestant: [] for contestant in CONTESTANTS}
    order = list(CONTESTANTS.items())
    for turn in range(rounds + 1):
        for data in files:
            for contestant, job in (
                order[turn % len(order) :] + order[: turn % len(order)]
            ):  # contestants take turns to be first
                took = seconds(job, data)
                if turn:  # the first round is a warm-up
                    turns[contestant].append(took)
    psnr, ssims = zip(*map(fidelity, files), strict=True)
    said = f"PSNR min {min(psnr):.1f} mean {np.mean(psnr):.1f} dB, SSIM min {min(ssims):.4f} mean {np.mean(ssims):.4f}"
    print(f"\n{name} ({size[0]}x{size[1]}), {len(files)} photos, {said}")
    print(f"{'':22}{'images/s':>10}{'MP/s':>8}{'x torchvision':>15}{'x OpenCV':>10}{'of floor':>10}")
    for contestant, times in turns.items():
        ratios = [
            median(other / own for other, own in zip(turns[rival], times, strict=True))
            for rival in ("torchvision on PIL", "OpenCV area", "floor")
        ]
        rate = 1 / median(times)
        line = f"{contestant:22}{rate:10.1f}{rate * size[0] * size[1] / 1e6:8.0f}"
        print(line + f"{ratios[0]:15.2f}{ratios[1]:10.2f}{ratios[2]:10.0%}")


def main() -> None:
    options = dict(argument.split("=", 1) for argument in sys.argv[1:])
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {int(options.get("core", min(cores)))})
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    chosen = options.get("sizes", "0.7,1,4,12").split(",")
    for name, size in [(name, size) for name, size in SIZES.items() if name.removesuffix(" MP") in chosen]:
        files = list(photos(options.get("photos", ""), size, int(options.get("photo_count", 6))))
        if files:
            compare(name, size, files, int(options.get("rounds", 9)))
        else:
            print(f"\n{name}: no photo is large enough")
    if options.get("stage") == "true":
        os.sched_setaffinity(0, cores)
        command = [sys.executable, str(Path(__file__).with_name("filter.py")), f"photos={options.get('photos', '')}"]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
