"""Decoding in worker processes: the same pixels as here, whatever happens to a worker."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import numpy as np
import pytest
import simplejpeg

from pipeline.latents.decoding import Decoders


def jpeg(height: int, width: int, seed: int = 0) -> bytes:
    smooth = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(smooth.repeat(8, 0).repeat(8, 1)), 95))


@pytest.fixture
def decoders() -> Iterator[Decoders]:
    pool = Decoders(2, 6, 64 * 64 * 3, 64)
    yield pool
    pool.close()


def test_workers_decode_as_one_would_here(decoders: Decoders) -> None:
    here = Decoders(0, 6, 0, 64)
    files = [jpeg(40 + 8 * n, 48, n) for n in range(4)]
    jobs = [decoders.submit(data, slot) for slot, data in enumerate(files)]
    for job, data in zip(jobs, files, strict=True):
        decoders.wait(job)
        expected = here.submit(data, 0)
        assert job.pixels is not None and expected.pixels is not None
        assert np.array_equal(job.pixels, expected.pixels)
        assert (job.width, job.height, job.in_slot) == (48, expected.height, True)


def test_pictures_that_are_too_large_for_a_slot_come_all_the_same(decoders: Decoders) -> None:
    job = decoders.submit(jpeg(96, 120), 0)
    decoders.wait(job)
    assert job.pixels is not None and job.pixels.shape == (96, 120, 3) and not job.in_slot


def test_a_large_jpeg_is_decoded_at_a_fraction_of_its_size(decoders: Decoders) -> None:
    job = decoders.submit(jpeg(640, 640), 0)
    decoders.wait(job)
    assert job.pixels is not None and job.pixels.shape == (160, 160, 3)
    assert (job.width, job.height) == (640, 640)


def test_a_bad_picture_has_a_reason(decoders: Decoders) -> None:
    job = decoders.submit(jpeg(64, 64)[:200], 0)
    decoders.wait(job)
    assert job.pixels is None and job.reason == "truncated" and not job.retryable


def test_a_worker_that_dies_costs_one_picture(decoders: Decoders) -> None:
    for worker in decoders._idle:
        os.kill(worker.process.pid, signal.SIGKILL)
        worker.process.wait()
    jobs = [decoders.submit(jpeg(64, 64, n), n) for n in range(5)]
    for job in jobs:
        decoders.wait(job)
    assert sorted(job.reason for job in jobs) == ["", "", "", "decoder_died", "decoder_died"]
    assert all(job.retryable for job in jobs if job.reason)


def test_nothing_is_left_of_what_is_given_up(decoders: Decoders) -> None:
    for slot in range(6):
        decoders.submit(jpeg(64, 64), slot)
    decoders.drain()
    job = decoders.submit(jpeg(64, 64, 3), 0)
    decoders.wait(job)
    assert job.pixels is not None


def test_the_shared_memory_has_no_name() -> None:
    before = set(os.listdir("/dev/shm"))
    pool = Decoders(1, 4, 1000, 64)
    assert set(os.listdir("/dev/shm")) - before == set()
    pool.close()
