"""Decodes and crops images in worker processes, into memory that is shared, reused and, for a GPU, pinned.

A slot of the memory holds the network's input for one image: its crops, and the noise to sample its latents with. Its
size does not depend on the image's, and only a few numbers per image pass through the sockets of
:mod:`pipeline.imaging.worker_pool`, whose limits apply here as well.
"""

from __future__ import annotations

import struct
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pipeline.encoders.crop import AnyCrop
from pipeline.imaging import transform
from pipeline.imaging.slots import Slots, starts_of
from pipeline.imaging.worker_pool import DEFAULT_WORKER_LIMITS, Lost, Pool, Task, WorkerLimits
from pipeline.imaging.worker_protocol import SMALL, read_reason, reason_bytes
from pipeline.randomness import normals

FILL = "pipeline.latents.image_decoding:fill"
"""Function that the workers run."""
_DEPTH = 8  # images queued per worker: small ones take it less than a millisecond
_SIZE = struct.Struct("<II")  # width, height
_EDGE = 2**31
Said = tuple[int, int, str, str]
"""Width and height of the image (upright, before cropping), and reason and detail of a failure."""


class SlotLayout(Protocol):
    """Fills a slot from an image; see :class:`Layout`."""

    @property
    def starts(self) -> list[int]: ...

    def fill(self, slot: npt.NDArray[Any], data: bytes, key: str) -> Said: ...


@dataclass(frozen=True)
class Noise:
    """Standard normal float32 noise of ``shape``, keyed by (seed, "posterior", the sample's key, resolution).

    Attributes:
        downsample: with buckets, pixels per latent along an edge: the noise has the shape of the image's bucket, and
            ``shape`` is that of the largest bucket.
    """

    seed: int
    resolution: int
    shape: tuple[int, ...]
    downsample: int = 0

    @property
    def bytes(self) -> int:
        return 4 * int(np.prod(self.shape))

    def shape_for(self, size: tuple[int, int]) -> tuple[int, ...]:
        """Shape of the noise for a crop of this height and width in pixels."""
        return (self.shape[0], *(edge // self.downsample for edge in size)) if self.downsample else self.shape


@dataclass(frozen=True)
class Layout:
    """The content of a slot, in this order."""

    crops: tuple[AnyCrop, ...]
    noises: tuple[Noise, ...] = ()

    @property
    def starts(self) -> list[int]:
        """Byte offset of each part, followed by the size of the slot."""
        parts: tuple[AnyCrop | Noise, ...] = (*self.crops, *self.noises)
        return starts_of(part.bytes for part in parts)

    def fill(self, slot: npt.NDArray[Any], data: bytes, key: str) -> Said:
        """Decode ``data`` into ``slot``, uint8 (bytes,); if that fails, fill it with zeros."""
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


def fill(slot: npt.NDArray[Any], data: bytes, key: str, layout: SlotLayout) -> bytes:
    """:meth:`SlotLayout.fill` for workers, with its result as bytes."""
    width, height, reason, detail = layout.fill(slot, data, key)
    return _SIZE.pack(width, height) + (reason_bytes(reason, detail) if reason else b"")


def read_filled(said: bytes | bytearray, data: bytes) -> Said:
    """Parse the result of `fill`; raises ValueError if it is malformed."""
    if len(said) < _SIZE.size:
        raise ValueError("no answer")
    width, height = _SIZE.unpack_from(said)
    refused = len(said) > _SIZE.size
    if max(width, height) >= _EDGE or not (refused or (width and height)):
        raise ValueError("no image")
    return width, height, *(read_reason(said[_SIZE.size :]) if refused else ("", ""))


@dataclass(slots=True)
class Decoded:
    """An image being decoded; its slot and the attributes below are valid after :meth:`Decoders.wait`.

    Attributes:
        width, height: of the upright source image.
        reason, detail, retryable: why decoding failed; ``reason`` is empty if it succeeded, else the slot is zeros.
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
    """Decodes images into slots that are laid out as ``layout``.

    Args:
        workers: number of processes; 0: images are decoded in this process, without isolation.
        slots: number of images that the memory holds.
        limits: of a worker, per image.

    Attributes:
        memory: uint8 (slots, bytes).
    """

    def __init__(
        self, workers: int, slots: int, layout: SlotLayout, limits: WorkerLimits = DEFAULT_WORKER_LIMITS
    ) -> None:
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
        """Pin the memory for asynchronous copies to the calling thread's current GPU."""
        import torch

        address, cudart = self.memory.ctypes.data, torch.cuda.cudart()
        torch.cuda.check_error(cudart.cudaHostRegister(address, self.memory.nbytes, 0))
        self._unpin = weakref.finalize(self.memory.base, cudart.cudaHostUnregister, address)

    @property
    def pids(self) -> list[int]:
        """Process ids of the running workers."""
        return self._pool.pids

    def submit(self, data: bytes, slot: int, key: str = "") -> Decoded:
        """Start decoding ``data`` into ``slot``, which must not be in use."""
        image = Decoded(self._pool.submit(data, slot, key))
        self._pool.push()
        return image

    def wait(self, image: Decoded) -> None:
        """Wait until ``image`` is decoded."""
        found = self._pool.wait(image.task)
        if isinstance(found, Lost):
            image.reason, image.detail, image.retryable = f"decoder_{found.reason}", found.detail, True
        else:
            image.width, image.height, image.reason, image.detail = found

    def drain(self) -> None:
        """Discard queued images, and wait for those being decoded."""
        self._pool.drain()

    def close(self) -> None:
        """Stop the workers and unpin the memory."""
        self._pool.close()
        self._unpin()
        self._slots.close()
