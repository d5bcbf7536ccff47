"""Decodes and crops images in worker processes, into memory that is shared, reused and, for a GPU, pinned.

A slot of the memory holds all that a network takes of one image: its crops, and the noise of its samples. So its size
does not depend on the image's, and nothing of an image but a few numbers comes through the sockets of
:mod:`pipeline.imaging.worker_pool`, whose limits hold here as well.
"""

from __future__ import annotations

import struct
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.encoders.crop import BucketCrop, Crop
from pipeline.imaging import transform
from pipeline.imaging.slots import Slots
from pipeline.imaging.worker_pool import DEFAULT_WORKER_LIMITS, Lost, Pool, Task, WorkerLimits
from pipeline.imaging.worker_protocol import SMALL, read_reason, reason_bytes
from pipeline.randomness import normals

FILL = "pipeline.latents.image_decoding:fill"
"""What workers run."""
_ALIGNED = 64  # bytes
_DEPTH = 8  # images that a worker has: small ones take it less than a millisecond
_SIZE = struct.Struct("<II")  # width, height
_EDGE = 2**31
Said = tuple[int, int, str, str]
"""Of an image: width and height (upright, before it was cut), reason and detail of what is wrong."""


@dataclass(frozen=True)
class Noise:
    """Standard normal float32 of ``shape``, keyed by (seed, "posterior", the sample's key, resolution).

    Attributes:
        downsample: with buckets, pixels per latent along an edge: the noise has the shape of the image's own bucket,
            and ``shape`` is only as large as that of the largest.
    """

    seed: int
    resolution: int
    shape: tuple[int, ...]
    downsample: int = 0

    @property
    def bytes(self) -> int:
        return 4 * int(np.prod(self.shape))

    def shape_for(self, size: tuple[int, int]) -> tuple[int, ...]:
        """Of the noise for pixels of this height and width."""
        return (self.shape[0], *(edge // self.downsample for edge in size)) if self.downsample else self.shape


@dataclass(frozen=True)
class Layout:
    """What lies in a slot, in this order."""

    crops: tuple[Crop | BucketCrop, ...]
    noises: tuple[Noise, ...] = ()

    @property
    def starts(self) -> list[int]:
        """Where each part starts, and at last the slot's size; in bytes."""
        starts = [0]
        parts: tuple[Crop | BucketCrop | Noise, ...] = (*self.crops, *self.noises)
        for part in parts:
            starts.append(starts[-1] + -(-part.bytes // _ALIGNED) * _ALIGNED)
        return starts

    def fill(self, slot: npt.NDArray[Any], data: bytes, key: str) -> Said:
        """Decode ``data`` and fill ``slot``, uint8 (bytes,); with zeros where that cannot be done."""
        width = height = 0
        starts = self.starts
        try:
            header = transform.probe(data, transform.Limits())
            width, height = header.upright
            pixels = transform.decode_fast(data, header)
            sizes = []
            for crop, start in zip(self.crops, starts, strict=False):
                cut = crop.cut(pixels, key)
                slot[start : start + cut.size].reshape(cut.shape)[:] = cut
                sizes.append(cut.shape[:2])
        except transform.ImageError as error:
            slot[:] = 0
            return width, height, error.reason, error.detail
        except MemoryError:
            slot[:] = 0
            return width, height, "out_of_memory", ""
        for noise, size, start in zip(self.noises, sizes, starts[len(self.crops) :], strict=False):
            drawn = normals(noise.shape_for(size), noise.seed, "posterior", key, noise.resolution)
            slot[start : start + drawn.nbytes] = drawn.reshape(-1).view(np.uint8)
        return width, height, "", ""


def fill(slot: npt.NDArray[Any], data: bytes, key: str, layout: Layout) -> bytes:
    """:meth:`Layout.fill`, for a worker."""
    width, height, reason, detail = layout.fill(slot, data, key)
    return _SIZE.pack(width, height) + (reason_bytes(reason, detail) if reason else b"")


def read_filled(said: bytes | bytearray, data: bytes) -> Said:
    """What `fill` said; raises ValueError if it cannot have said that."""
    if len(said) < _SIZE.size:
        raise ValueError("no answer")
    width, height = _SIZE.unpack_from(said)
    refused = len(said) > _SIZE.size
    if max(width, height) >= _EDGE or not (refused or (width and height)):
        raise ValueError("no image")
    return width, height, *(read_reason(said[_SIZE.size :]) if refused else ("", ""))


@dataclass(slots=True)
class Decoded:
    """An image on its way; it is in its slot, and what follows is known, once :meth:`Decoders.wait` has returned.

    Attributes:
        width, height: of the source, upright.
        reason, detail, retryable: why there are no pixels; empty if there are. Then the slot is zeros.
    """

    task: Task
    width: int = 0
    height: int = 0
    reason: str = ""
    detail: str = ""
    retryable: bool = False

    @property
    def slot(self) -> int:
        return self.task.slot


class Decoders:
    """Fills slots with what ``layout`` says of images.

    Args:
        workers: processes; none: images are decoded at once, here, unprotected.
        slots: how many images the memory holds.
        limits: what a worker may take for one image.

    Attributes:
        memory: uint8 (slots, bytes).
    """

    def __init__(self, workers: int, slots: int, layout: Layout, limits: WorkerLimits = DEFAULT_WORKER_LIMITS) -> None:
        self._slots = Slots(slots, layout.starts[-1])
        self.memory = self._slots.memory
        self._pool = Pool(
            FILL,
            (layout,),
            workers=workers,
            timeout=limits.timeout,
            memory=limits.memory,
            slots=self._slots,
            read=read_filled,
            largest=SMALL,
            depth=_DEPTH,
        )
        self._unpin: Callable[[], object] = lambda: None

    def pin(self) -> None:
        """Make the memory such that a GPU can copy from it by itself; of the calling thread's current device."""
        import torch

        address, cudart = self.memory.ctypes.data, torch.cuda.cudart()
        torch.cuda.check_error(cudart.cudaHostRegister(address, self.memory.nbytes, 0))
        self._unpin = weakref.finalize(self.memory.base, cudart.cudaHostUnregister, address)

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers that run."""
        return self._pool.pids

    def submit(self, data: bytes, slot: int, key: str = "") -> Decoded:
        """Have ``data`` decoded into ``slot``, which must not be in use."""
        image = Decoded(self._pool.submit(data, slot, key))
        self._pool.push()
        return image

    def wait(self, image: Decoded) -> None:
        """Until ``image`` is decoded."""
        found = self._pool.wait(image.task)
        if isinstance(found, Lost):
            image.reason, image.detail, image.retryable = f"decoder_{found.reason}", found.detail, True
        else:
            image.width, image.height, image.reason, image.detail = found

    def drain(self) -> None:
        """Forget what waits, and wait for what is being decoded."""
        self._pool.drain()

    def close(self) -> None:
        """End the workers; the memory is pinned no longer."""
        self._pool.close()
        self._unpin()
        self._slots.close()
