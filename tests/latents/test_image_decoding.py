"""Decoding in worker processes: the same pixels as here, whatever happens to a worker."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import faulty
import numpy as np
import psutil
import pytest
import simplejpeg
from PIL import Image

from pipeline.encoders.base import posterior_noise
from pipeline.encoders.crop import Crop
from pipeline.imaging import transform
from pipeline.imaging.worker_pool import WorkerLimits
from pipeline.latents import image_decoding
from pipeline.latents.image_decoding import Decoders, Layout, Noise


def jpeg(height: int, width: int, seed: int = 0) -> bytes:
    smooth = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(smooth.repeat(8, 0).repeat(8, 1)), 95))


LAYOUT = Layout((Crop(64), Crop(35)), (Noise(7, 64, (4, 8, 8)),))


@pytest.fixture
def decoders() -> Iterator[Decoders]:
    pool = Decoders(2, 40, LAYOUT)
    yield pool
    pool.close()


def test_workers_decode_as_one_would_here(decoders: Decoders) -> None:
    here = Decoders(0, 40, LAYOUT)
    files = [jpeg(40 + 8 * n, 72, n) for n in range(9)]
    jobs = [decoders.submit(data, slot, f"key{slot}") for slot, data in enumerate(files)]
    for job, data in zip(jobs, files, strict=True):
        decoders.wait(job)
        expected = here.submit(data, job.slot, f"key{job.slot}")
        here.wait(expected)
        assert (job.width, job.height, job.reason) == (72, expected.height, "")
    assert np.array_equal(decoders.memory, here.memory) and here.memory[:9].any(1).all()
    here.close()


@pytest.mark.parametrize(("height", "width"), [(48, 64), (1504, 2000), (64, 2000), (2400, 48), (3304, 3344)])
def test_an_image_of_any_size_fits_its_slot(decoders: Decoders, height: int, width: int) -> None:
    data = jpeg(height, width)
    job = decoders.submit(data, 3, "a")
    decoders.wait(job)
    assert (job.width, job.height) == (width, height)
    pixels = transform.decode(data, transform.probe(data))
    first, second, third, _ = LAYOUT.starts
    slot = decoders.memory[3]
    for crop, start in zip(LAYOUT.crops, (first, second), strict=True):
        cut = slot[start : start + crop.bytes].reshape(crop.edge, crop.edge, 3)
        assert np.array_equal(cut, crop.cut(pixels))
        assert_like_pillow(cut, pixels, crop.edge)
    noise = posterior_noise(7, ["a"], 64, (4, 8, 8)).numpy()
    assert np.array_equal(slot[third : third + 1024].view(np.float32).reshape(1, 4, 8, 8), noise)


def assert_like_pillow(cut: np.ndarray, pixels: np.ndarray, edge: int) -> None:
    """Resize and CenterCrop, within the tolerance that is documented."""
    height, width = pixels.shape[:2]
    short = min(height, width)
    across, down = (edge if side == short else int(edge * side / short) for side in (width, height))
    rows = Image.fromarray(pixels).resize((across, height), Image.Resampling.BICUBIC)
    whole = np.asarray(rows.resize((across, down), Image.Resampling.BICUBIC)).astype(int)
    left, top = round((across - edge) / 2), round((down - edge) / 2)
    assert np.abs(whole[top : top + edge, left : left + edge] - cut).max() <= 2


def test_a_bad_image_has_a_reason_and_leaves_zeros(decoders: Decoders) -> None:
    decoders.memory[:] = 9
    job = decoders.submit(jpeg(64, 64)[:200], 0)
    decoders.wait(job)
    assert (job.reason, job.retryable) == ("truncated", False) and not decoders.memory[0].any()


def test_workers_that_died_before_cost_nothing(decoders: Decoders) -> None:
    decoders.wait(decoders.submit(jpeg(64, 64), 0))
    for pid in decoders.pids:
        os.kill(pid, signal.SIGKILL)
    psutil.wait_procs([psutil.Process(pid) for pid in decoders.pids if psutil.pid_exists(pid)], timeout=0.2)
    jobs = [decoders.submit(jpeg(64, 64, n), n) for n in range(5)]
    for job in jobs:
        decoders.wait(job)
    assert [job.reason for job in jobs] == [""] * 5


def test_images_that_kill_or_corrupt_workers_cost_themselves_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_decoding, "FILL", "faulty:fill")
    evil = dict(zip(range(2, 40, 4), faulty.EVIL, strict=False))
    files = [faulty.evil_png(evil[n]) if n in evil else jpeg(64, 64, n) for n in range(40)]
    decoders = Decoders(2, 40, LAYOUT, WorkerLimits(timeout=2, memory=2**30))
    decoders.memory[[*evil]] = 9
    jobs = [decoders.submit(data, n) for n, data in enumerate(files)]
    for job in jobs:
        decoders.wait(job)
    decoders.close()
    reasons = {evil.get(n, n): job.reason for n, job in enumerate(jobs) if job.reason}
    died = dict.fromkeys(faulty.EVIL, "decoder_crash")
    assert reasons == {**died, "hang": "decoder_timeout", "flood": "out_of_memory"}
    here = Decoders(0, 40, LAYOUT)
    for n, (job, data) in enumerate(zip(jobs, files, strict=True)):
        assert job.retryable == job.reason.startswith("decoder_")
        if not job.reason:
            here.submit(data, n)
    assert np.array_equal(here.memory, decoders.memory), "the others are as they should be, and its slots are zeros"


def test_nothing_is_left_of_what_is_given_up(decoders: Decoders) -> None:
    for slot in range(20):
        decoders.submit(jpeg(64, 64), slot)
    decoders.drain()
    job = decoders.submit(jpeg(64, 64, 3), 0)
    decoders.wait(job)
    assert not job.reason


def test_the_shared_memory_has_no_name() -> None:
    before = set(os.listdir("/dev/shm"))
    pool = Decoders(1, 4, LAYOUT)
    assert set(os.listdir("/dev/shm")) - before == set()
    pool.close()
