"""Asynchronous copies between host and device, and measurement of the time that the device is busy.

On a GPU uploads have a stream of their own, so that they run while the batch before is computed; downloads arrive in
pinned memory when :meth:`Transit.wait` has returned. On a CPU nothing is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor


@dataclass
class Transit:
    """Results on their way to the host; there after :meth:`wait`.

    Attributes:
        seconds: that the device was busy with them (a GPU: measured by itself).
    """

    seconds: float = 0.0
    events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None

    def wait(self) -> None:
        if self.events is not None:
            begin, end = self.events
            end.synchronize()
            self.seconds = begin.elapsed_time(end) / 1000


class Transfers:
    """To and from ``device``."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.on_gpu = device.type == "cuda"
        self._copies: torch.cuda.Stream | None = None
        self._begun = 0.0
        self._first: torch.cuda.Event | None = None

    def upload(self, values: Sequence[Tensor], copied: Callable[[], None] = lambda: None) -> list[Tensor]:
        """``values``, of pinned memory, on the device; ``copied`` is called when that memory may be used again.

        Waits for the copies alone, not for what the device computes. On a CPU ``copied`` is left to the caller.
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
        """``values`` in host memory: there once the :class:`Transit` that :meth:`end` gives has been waited for."""
        if values.device.type != "cuda":
            return values
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        return host.copy_(values, non_blocking=True)

    def begin(self) -> None:
        """The device begins with the next results."""
        self._begun = perf_counter()
        if self.on_gpu:
            self._first = torch.cuda.Event(enable_timing=True)
            self._first.record()

    def end(self) -> Transit:
        """All of them are computed and on their way."""
        if self._first is None:
            return Transit(perf_counter() - self._begun)
        last = torch.cuda.Event(enable_timing=True)
        last.record()
        return Transit(0.0, (self._first, last))


def out_of_memory(error: BaseException) -> bool:
    """Whether a GPU's memory did not suffice: CUDA's libraries say so in errors of their own."""
    said = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "DEVICE_ALLOCATION_FAILED", "out of memory")
    return isinstance(error, torch.OutOfMemoryError) or any(name in str(error) for name in said)
