"""What both stand-ins for a GPU (fake_cuda, transfer_double) know alike: when a host waits for its device, and where.

with gpus.no_waits():           # AssertionError that names the lines that wait
    step()
gpus.waits                      # all of them so far, in any thread
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

_ROOT = str(Path(__file__).resolve().parent.parent)
_STAND_INS = {str(Path(__file__).with_name(f"{name}.py")) for name in ("waits", "fake_cuda", "transfer_double")}
_ON_VALUES = {
    "_local_scalar_dense", "_unique", "_unique2", "allclose", "bincount", "equal", "is_nonzero", "item",
    "masked_select", "nonzero", "unique_consecutive", "unique_dim",
}  # fmt: skip


@dataclass(frozen=True)
class Wait:
    """Something that made the host wait for the device; ``where``: innermost line of the pipeline, ``path:line``."""

    what: str
    shape: tuple[int, ...]
    where: str
    thread: int

    def __str__(self) -> str:
        return f"{self.where}: {self.what} of {self.shape}"


class Waits:
    """Of pretended devices: what the host has waited for, and which of its memory is pinned.

    Attributes:
        registered: memory that ``cudaHostRegister`` has pinned, by address: bytes, and the device that was current.
    """

    def __init__(self) -> None:
        self.waits: list[Wait] = []
        self.registered: dict[int, tuple[int, int]] = {}
        self._pinned: dict[int, Any] = {}  # storages by address, which stay: no other may come to lie there

    def note(self, what: str, shape: tuple[int, ...] = ()) -> None:
        """The host waits here for something."""
        self.waits.append(Wait(what, tuple(shape), place(), threading.get_ident()))

    @contextmanager
    def no_waits(self) -> Iterator[None]:
        """Context in which this thread must not wait for the device.

        Raises:
            AssertionError: it did; names the lines.
        """
        before = len(self.waits)
        yield
        ours = (wait for wait in self.waits[before:] if wait.thread == threading.get_ident())
        found = list(dict.fromkeys(map(str, ours)))
        assert not found, "the host waits for the device:\n  " + "\n  ".join(found)

    # ---- pinned memory

    def pin(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self._pinned[storage.data_ptr()] = storage
        return tensor

    def is_pinned(self, tensor: Tensor) -> bool:
        address = tensor.data_ptr()
        within = any(start <= address < start + size for start, (size, _) in self.registered.items())
        return within or tensor.untyped_storage().data_ptr() in self._pinned

    def cudart(self, current_device: Callable[[], int]) -> SimpleNamespace:
        """What ``torch.cuda.cudart()`` gives."""

        def register(address: int, size: int, flags: int) -> int:
            """712 if a part of it is registered already."""
            if any(start < address + size and address < start + held for start, (held, _) in self.registered.items()):
                return 712
            self.registered[address] = (size, current_device())
            return 0

        def unregister(address: int) -> int:
            """713 if it is not registered."""
            return 0 if self.registered.pop(address, None) else 713

        return SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=unregister)


def checked(result: int) -> None:
    """As ``torch.cuda.check_error``."""
    if result:
        raise RuntimeError(f"CUDA error: {result}")


def reads_values(name: str, args: Any, on_device: type[Tensor]) -> str:
    """Why the host must see values of the device for the operation ``name``, without overload; empty: it need not.

    Args:
        on_device: the class of tensors that are on the device.
    """
    if name in _ON_VALUES or (name == "repeat_interleave" and len(args) < 2):
        return "item()" if name == "_local_scalar_dense" else f"{name}()"
    if name not in ("index", "index_put", "index_put_", "_index_put_impl_"):
        return ""
    chosen = [x for x in args[1] if isinstance(x, Tensor)]
    fills = name != "index" and args[2].numel() == 1  # becomes a masked_fill
    if not fills and any(x.dtype in (torch.bool, torch.uint8) for x in chosen):
        return f"{name} with a mask"
    return f"{name} with places on the host" if any(not isinstance(x, on_device) for x in chosen) else ""


def place() -> str:
    """``path:line`` of the innermost frame in the project's code, else in the test's."""
    frame: FrameType | None = sys._getframe(1)
    outer = "?"
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(_ROOT) and file not in _STAND_INS and "/.venv/" not in file:
            where = f"{file[len(_ROOT) + 1 :]}:{frame.f_lineno}"
            if not where.startswith("tests/"):
                return where
            outer = where if outer == "?" else outer
        frame = frame.f_back
    return outer
