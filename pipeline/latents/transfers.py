"""Asynchronous copies between host and device, and measurement of the device's busy time.

On a GPU, uploads use a separate stream, so that they overlap with the previous batch's computation; downloads are in
pinned memory when :meth:`Transit.wait` returns. On a CPU, nothing is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor


@dataclass
class Transit:
    """Results that are being copied to the host; valid after :meth:`wait`.

    Attributes:
        seconds: that the device was busy with them; on a GPU, measured by events.
    """

    seconds: float = 0.0
    events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None

    def wait(self) -> None:
        if self.events is not None:
            begin, end = self.events
            end.synchronize()
            self.seconds = begin.elapsed_time(end) / 1000


class Transfers:
    """Copies to and from ``device``."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.on_gpu = device.type == "cuda"
        self._copies: torch.cuda.Stream | None = None
        self._begun = 0.0
        self._first: torch.cuda.Event | None = None

    def upload(self, values: Sequence[Tensor], copied: Callable[[], None] = lambda: None) -> list[Tensor]:
        """Copy ``values`` from pinned memory to the device; calls ``copied`` when that memory may be overwritten.

        Waits only for the copies, not for computation on the device. On a CPU, the caller has to call ``copied``.
        """
        if not self.on_gpu:
            return list(values)
        if self._copies is None:
            self._copies = torch.cuda.Stream(self.device)
        compute = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._copies):
            there = [value.to(self.device, non_blocking=True) for value in values]
            event = torch.cuda.Event()
            event.record()
        compute.wait_event(event)
        for tensor in there:
            tensor.record_stream(compute)
        event.synchronize()
        copied()
        return there

    def download(self, values: Tensor) -> Tensor:
        """Copy ``values`` to the host; valid once the :class:`Transit` returned by :meth:`end` has been waited for."""
        if values.device.type != "cuda":
            return values
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        return host.copy_(values, non_blocking=True)

    def begin(self) -> None:
        """Mark the start of the computation of the next results."""
        self._begun = perf_counter()
        if self.on_gpu:
            self._first = torch.cuda.Event(enable_timing=True)
            self._first.record()

    def end(self) -> Transit:
        """Mark the end of the computation; returns a handle to wait for the results."""
        if self._first is None:
            return Transit(perf_counter() - self._begun)
        last = torch.cuda.Event(enable_timing=True)
        last.record()
        return Transit(0.0, (self._first, last))


def out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` means that a GPU ran out of memory; some CUDA libraries raise errors of their own for it."""
    said = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "DEVICE_ALLOCATION_FAILED", "out of memory")
    return isinstance(error, torch.OutOfMemoryError) or any(name in str(error) for name in said)
