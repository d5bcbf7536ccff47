"""Measures decoding on one core and encoding with the chosen networks, to see which one waits for the other."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np

from pipeline.doctor.finding import Finding

if TYPE_CHECKING:
    import torch

_WIDTH, _HEIGHT = 683, 512  # size of a photo after stage=filter with default settings
_DIFFERENT = 8


def photos() -> list[bytes]:
    """JPEGs of the size that stage=filter produces, with details at all scales as in photos."""
    from PIL import Image

    dice = np.random.default_rng(0)
    made = []
    for _ in range(_DIFFERENT):
        pixels = np.zeros((_HEIGHT, _WIDTH, 3))
        for scale in (4, 16, 64):
            noise = Image.fromarray(dice.integers(0, 256, (_HEIGHT // scale, _WIDTH // scale, 3), dtype=np.uint8))
            pixels += np.asarray(noise.resize((_WIDTH, _HEIGHT), Image.Resampling.BICUBIC)) / 3
        file = BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(file, "JPEG", quality=90)
        made.append(file.getvalue())
    return made


def rate(do: Callable[[int], object], count: int, seconds: float) -> float:
    """Items per second, if ``do(n)`` processes ``count`` items; measured for ``seconds`` after one warm-up call."""
    do(0)
    done, begin = 0, time.perf_counter()
    while True:
        do(done + 1)
        done += 1
        if (elapsed := time.perf_counter() - begin) >= seconds:
            return done * count / elapsed


def decoding(resolution: int, seconds: float) -> Finding:
    """Measure images per second that one core decodes, resizes and crops, as a worker of stage=precompute does."""
    from pipeline.encoders.crop import Crop
    from pipeline.imaging import transform
    from pipeline.imaging.headers import probe

    files, crop = photos(), Crop(resolution)

    def decode(number: int) -> object:
        data = files[number % len(files)]
        return crop.cut(transform.decode_fast(data, probe(data)))

    speed = rate(decode, 1, seconds)
    text = f"one core decodes {speed:,.0f} images of {_WIDTH}x{_HEIGHT} a second"
    return Finding("decoding", "ok", text, values={"decode": speed})


def encoders(
    vae: str, text: str, resolutions: Sequence[int], batch: int, seconds: float, device: torch.device
) -> Iterator[Finding]:
    """Measure images per second of the networks alone, on this rank's device."""
    import torch

    from pipeline.encoders.base import autoencoder, text_encoder

    dtype = "bfloat16" if device.type == "cuda" else "float32"
    time_each = 0.0

    def timed(do: Callable[[int], torch.Tensor]) -> float:
        def run(number: int) -> None:
            do(number)
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        with torch.inference_mode():
            return rate(run, batch, seconds)

    if vae:
        network = autoencoder(vae, device)  # float32, as in stage=precompute
        for resolution in resolutions:
            x = torch.rand(batch, 3, resolution, resolution, device=device) * 2 - 1
            speed = timed(lambda _, x=x: network.moments(x))  # type: ignore[misc]
            time_each += 1 / speed
            yield Finding("autoencoder", "ok", f"{vae}: {speed:,.1f} images of {resolution} a second on {device}")
    if text:
        encoder = text_encoder(text, device, dtype)
        captions = ["a photograph of a small red house next to a lake, seen from the other shore"] * batch
        speed = timed(lambda _: encoder.encode(captions))
        time_each += 1 / speed
        yield Finding("text encoder", "ok", f"{text}: {speed:,.1f} captions a second on {device}")
    if time_each:
        text_all = f"{1 / time_each:,.1f} images a second with all of that"
        yield Finding("encoders", "ok", text_all, values={"encode": 1 / time_each})


def balance(decode: float, encode: float, cpus: int, gpu: bool) -> Finding:
    """Whether the GPU will wait for images, and how many CPUs prevent that.

    Args:
        decode: Images per second that one core decodes.
        encode: Images per second that the networks encode.
        cpus: CPUs that the rank may use, including one for the rank itself.
        gpu: Whether the networks run on a GPU.
    """
    if not gpu:
        share = encode / (decode + encode)
        text = f"on CPUs the networks take {1 - share:.0%} of the time, decoding {share:.0%}"
        return Finding("balance", "ok", text)
    needed = math.ceil(1.1 * encode / decode) + 1  # 10% more, because no core is always free
    text = f"a GPU takes {encode:,.0f} images a second, {max(1, cpus - 1)} cores give {max(1, cpus - 1) * decode:,.0f}"
    values = {"cpus_needed": needed}
    if cpus < needed:
        share = 1 - max(1, cpus - 1) * decode / encode
        advice = f"cpus_per_task={needed} for each GPU, or smaller images (stage=filter max_image_size=)"
        return Finding("balance", "warn", f"{text}: it will be idle for {max(share, 0):.0%}", advice, values)
    return Finding("balance", "ok", f"{text}: it will not wait (cpus_per_task={needed} would do)", values=values)
