"""A stand-in for CUDA devices whose copies take their time: for tests of code that never waits for the GPU.

Real values are computed (on the CPU, at once), but bytes arrive only when somebody waits for them, as with CUDA:

- device → pinned host memory, ``non_blocking``: the host tensor holds poison until an event that was recorded after the
  copy (or its stream, or the device) is synchronised. An operation that reads it earlier fails and names the line.
- host → device: what the device gets is compared with the host memory once more when the copy is over. Host memory that
  was overwritten meanwhile (a slot that was handed out again too early) is an error.
- a stream that reads or overwrites what another stream has written or still reads, without having waited for an event
  recorded after that, fails; so does memory that is freed while another stream than its own still uses it
  (``record_stream`` is missing), and an operation that mixes devices.
- whatever makes the host wait for what the device computes (``.cpu()``, ``.item()``, ``.to()`` without
  ``non_blocking``, memory that is not pinned, boolean masks, ``synchronize()``) works, and is in :attr:`Gpus.waits`
  with the line that did it.

How to use it::

    def test_something(gpus: Gpus) -> None:      # the fixture: one device; `with pretended(monkeypatch, 8)`: eight
        feed = Feed(..., device=torch.device("cuda", 0))
        with gpus.no_waits():                    # loading a model waits, and may; this must not
            ...                                  # code under test: .to("cuda", non_blocking=True), Event, Stream, ...
                                                 # at its end the fixture raises what went wrong in any thread

The fixture ``gpus`` (of conftest.py) is known to all tests. It replaces parts of ``torch.cuda`` for the test and enters
a dispatch mode in the test's thread and in all that are started in it; child processes know nothing of it. Tensors on
the device are :class:`OnDevice`; backward passes and compiled code are not what it is for.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from waits import Waits, checked, place, reads_values

_POISON = 0xFF  # every float of such bytes is NaN, every bool true
_COPIES = ("aten._to_copy.default", "aten.to.dtype_layout", "aten.to.device", "aten.copy_.default", "aten.to.other")


class TransferError(AssertionError):
    """What would go wrong on a real GPU, at times."""


@dataclass(eq=False)
class Memory:
    """A block of a device's memory: which streams have used it, and up to where.

    Attributes:
        stream: the one that it was allocated on, which may use it again once it is freed.
        written: (stream, number) of the last operation that wrote it; ``read``: by stream, the last that read it.
        recorded: streams of ``record_stream``.
    """

    stream: Stream
    written: tuple[Stream, int]
    read: dict[Stream, int] = field(default_factory=dict)
    recorded: set[Stream] = field(default_factory=set)


class Stream:
    """Stands in for ``torch.cuda.Stream``: numbers its operations, knows what of other streams it has waited for."""

    def __init__(self, gpus: Gpus, device: Any = None) -> None:
        self.gpus = gpus
        self.device = torch.device("cuda", gpus.index_of(device))
        self.number = 0
        self.computes = False
        self.clock: dict[Stream, int] = {}
        self.copies: list[tuple[int, Callable[[], None]]] = []

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event(self.gpus)
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        merge(self.clock, event.clock)

    def wait_stream(self, other: Stream) -> None:
        merge(self.clock, other.now())

    def now(self) -> dict[Stream, int]:
        return {**self.clock, self: self.number}

    def synchronize(self) -> None:
        self.gpus.waited("Stream.synchronize()", (), self)

    def query(self) -> bool:
        return not self.copies


class Event:
    """Stands in for ``torch.cuda.Event``."""

    def __init__(self, gpus: Gpus, enable_timing: bool = False, blocking: bool = False) -> None:
        self.gpus, self.timed = gpus, enable_timing
        self.clock: dict[Stream, int] = {}
        self._asked = 0

    def record(self, stream: Stream | None = None) -> None:
        self.clock = (stream or self.gpus.stream()).now()

    def wait(self, stream: Stream | None = None) -> None:
        (stream or self.gpus.stream()).wait_event(self)

    def synchronize(self) -> None:
        """Counts as a wait if it is one for what the device computes, and not for copies of another stream alone."""
        if any(stream.computes and number for stream, number in self.clock.items()):
            self.gpus.note("Event.synchronize()")
        self.gpus.arrived(self.clock)

    def query(self) -> bool:
        """True from the second time on: nobody can say how long a copy takes."""
        self._asked += 1
        if self._asked > 1:
            self.gpus.arrived(self.clock)
        return self._asked > 1

    def elapsed_time(self, other: Event) -> float:
        if not (self.timed and other.timed):
            raise TransferError("elapsed_time of an event without enable_timing=True")
        if any(stream.copies and stream.copies[0][0] <= number for stream, number in other.clock.items()):
            raise TransferError("elapsed_time of an event that nobody has waited for")
        return 1.0


class OnDevice(Tensor):
    """A tensor that says it is on a GPU; its values lie in ``inner``."""

    inner: Tensor
    memory: Memory

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device, memory: Memory) -> OnDevice:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=device,
        )
        made.inner, made.memory = inner, memory
        return made  # type: ignore[no-any-return]

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise TransferError(f"{func}: a tensor of the double is used outside of the test that made it")

    def record_stream(self, stream: Any) -> None:
        self.memory.recorded.add(stream)


class Gpus(Waits):
    """Pretended devices, and what code under test has done with them.

    Attributes:
        count: devices.
        errors: of all threads, also those whose exceptions nobody has seen.
        devices: by thread name, the device that was set in it.
        contexts: devices that somebody has worked on.
    """

    def __init__(self, count: int = 1) -> None:
        super().__init__()
        self.count = count
        self.errors: list[str] = []
        self.devices: dict[str, int] = {}
        self.contexts: set[int] = set()
        self._thread = threading.local()
        self._default = {index: Stream(self, index) for index in range(count)}
        self._streams = list(self._default.values())
        self._pending: dict[int, str] = {}
        self._lock = threading.RLock()

    # ---- devices and streams

    def index_of(self, device: Any) -> int:
        if device is None or (isinstance(device, (str, torch.device)) and torch.device(device).index is None):
            return self.current_device()
        return device if isinstance(device, int) else int(torch.device(device).index)

    def current_device(self) -> int:
        """A new thread begins at device 0, as with CUDA."""
        return int(getattr(self._thread, "device", 0))

    def set_device(self, device: Any) -> None:
        index = self.index_of(device)
        if index >= self.count:
            raise RuntimeError("CUDA error: invalid device ordinal")
        self._thread.device = index
        self.devices[threading.current_thread().name] = index

    def stream(self, device: Any = None) -> Stream:
        """The calling thread's current stream of the device."""
        index = self.index_of(device)
        chosen: dict[int, Stream] = getattr(self._thread, "streams", {})
        return chosen.get(index, self._default[index])

    def make_stream(self, device: Any = None, priority: int = 0) -> Stream:
        self._streams.append(Stream(self, device))
        return self._streams[-1]

    def use(self, stream: Stream) -> Any:
        """The context ``torch.cuda.stream(stream)``."""
        gpus, index = self, stream.device.index

        class Used:
            def __enter__(self) -> None:
                chosen = gpus._thread.__dict__.setdefault("streams", {})
                self.before, self.device = chosen.get(index), gpus.current_device()
                chosen[index] = stream
                gpus._thread.device = index

            def __exit__(self, *error: object) -> None:
                chosen = gpus._thread.streams
                chosen.pop(index) if self.before is None else chosen.update({index: self.before})
                gpus._thread.device = self.device

        return Used()

    # ---- waiting

    def waited(self, what: str, shape: tuple[int, ...], stream: Stream) -> None:
        """The host waits here until ``stream`` has come to its end."""
        self.note(what, shape)
        self.arrived(stream.now())

    def arrived(self, clock: dict[Stream, int]) -> None:
        """The host has waited for all that ``clock`` names: copies up to there are over."""
        with self._lock:
            for stream, number in clock.items():
                while stream.copies and stream.copies[0][0] <= number:
                    stream.copies.pop(0)[1]()

    def check(self) -> None:
        """Wait for everything; raise what was wrong in any thread."""
        for stream in self._streams:
            self.arrived(stream.now())
        if self.errors:
            raise TransferError("\n".join(self.errors))

    def synchronize(self, device: Any = None) -> None:
        """``torch.cuda.synchronize``."""
        self.note("torch.cuda.synchronize()")
        for stream in self._streams:
            if stream.device.index == self.index_of(device):
                self.arrived(stream.now())

    def wrong(self, what: str) -> TransferError:
        self.errors.append(f"{place()}: {what}")
        return TransferError(self.errors[-1])

    def _registers(self) -> int:
        self.contexts.add(self.current_device())
        return self.current_device()

    # ---- operations

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if str(func) == "aten._has_compatible_shallow_copy_type.default":
            return type(args[0]) is type(args[1])  # asked while a module moves
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_device = [tensor for tensor in tensors if isinstance(tensor, OnDevice)]
        if str(func) in _COPIES and self._crosses(func, args, kwargs):
            return self._copy(func, args, kwargs)
        self._require_there([tensor for tensor in tensors if not isinstance(tensor, OnDevice)], func)
        device = kwargs.get("device")
        made_on = torch.device(device) if device is not None else None
        if not on_device and (made_on is None or made_on.type != "cuda"):
            return self._on_host(func, args, kwargs)
        if any(tensor.dim() and not isinstance(tensor, OnDevice) for tensor in tensors) and "index" not in str(func):
            raise self.wrong(f"{func}: tensors on the CPU and on a GPU in one operation")
        target = on_device[0].device if on_device else torch.device("cuda", self.index_of(made_on))
        if why := reads_values(func.overloadpacket.__name__, args, OnDevice):
            self.waited(why, tuple(on_device[0].shape), self.stream(target))
        return self._on_gpu(func, args, kwargs, on_device, target)

    def _on_host(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        pinned = kwargs.pop("pin_memory", False)
        made = func(*args, **kwargs)
        return self.pin(made) if pinned and isinstance(made, Tensor) else made

    def _on_gpu(self, func: Any, args: Any, kwargs: dict[str, Any], used: list[OnDevice], target: torch.device) -> Any:
        stream = self._work(target)
        stream.computes = True
        written = {id(arg) for arg in mutated(func, args, kwargs)}
        for tensor in used:
            self._use(tensor, stream, id(tensor) in written)
        made = func(*tree_map(inner_of, args), **tree_map(inner_of, kwargs))
        known = {tensor.inner.untyped_storage().data_ptr(): tensor for tensor in used}
        same = {id(tensor.inner): tensor for tensor in used}

        def wrapped(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if id(value) in same:
                return same[id(value)]
            of = known.get(value.untyped_storage().data_ptr()) if value.numel() else None
            if of is None:
                return OnDevice(value, target, self._allocate(stream))
            with torch.inference_mode(of.is_inference()):  # so is a view of it
                return OnDevice(value, target, of.memory)

        return tree_map(wrapped, made)

    def _work(self, device: torch.device) -> Stream:
        stream = self.stream(device)
        stream.number += 1
        self.contexts.add(stream.device.index)
        return stream

    def _allocate(self, stream: Stream) -> Memory:
        memory = Memory(stream, (stream, stream.number))
        weakref.finalize(memory, self._freed, stream, memory.read, memory.recorded)
        return memory

    def _freed(self, owner: Stream, read: dict[Stream, int], recorded: set[Stream]) -> None:
        for stream, number in read.items():
            if stream is not owner and stream not in recorded and owner.clock.get(stream, 0) < number:
                self.errors.append("memory is freed while another stream uses it: record_stream() is missing")

    def _use(self, tensor: OnDevice, stream: Stream, writes: bool) -> None:
        memory = tensor.memory
        waits = [memory.written, *(memory.read.items() if writes else ())]
        for other, number in waits:
            if other is not stream and stream.clock.get(other, 0) < number:
                raise self.wrong("a stream uses what another one is still at: wait_event() is missing")
        memory.read[stream] = stream.number
        if writes:
            memory.written = (stream, stream.number)

    def _require_there(self, tensors: list[Tensor], func: Any) -> None:
        for tensor in tensors:
            since = self._pending.get(tensor.untyped_storage().data_ptr()) if tensor.numel() else None
            if since is not None and "detach" not in str(func) and "alias" not in str(func):
                raise self.wrong(f"{func} reads bytes that are still on their way (copied at {since})")

    # ---- copies

    def _crosses(self, func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
        source, target = _ends(func, args, kwargs)
        return source != target and "cuda" in (source.type, target.type)

    def _copy(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        _, target = _ends(func, args, kwargs)
        into = str(func) == "aten.copy_.default"
        host_or_device = args[1] if into else args[0]
        dtype = args[0].dtype if into else kwargs.get("dtype") or _dtype_of(args) or host_or_device.dtype
        blocks = not (kwargs.get("non_blocking") or _flag(func, args))
        if target.type == "cuda":
            return self._up(host_or_device, args[0] if into else None, dtype, target, blocks)
        return self._down(host_or_device, args[0] if into else None, dtype, blocks)

    def _up(self, host: Tensor, into: OnDevice | None, dtype: torch.dtype, device: torch.device, blocks: bool) -> Any:
        if isinstance(host, OnDevice):  # from GPU to GPU
            raise self.wrong("a copy between two GPUs")
        self._require_there([host], "a copy to the device")
        device = torch.device("cuda", self.index_of(device))
        stream = self._work(device)
        if into is None:
            into = OnDevice(host.to(dtype, copy=True), device, self._allocate(stream))
        else:
            self._use(into, stream, True)
            into.inner.copy_(host)
        if blocks:
            self.waited("copy from the host", host.shape, stream)
        elif self.is_pinned(host):
            at, before = place(), host.clone()

            def over() -> None:
                if not torch.equal(_bytes(host), _bytes(before)):
                    self.errors.append(f"{at}: host memory was overwritten while it was being copied to the device")

            stream.copies.append((stream.number, over))
        elif host.numel() > 1:
            self.note("copy from memory that is not pinned", host.shape)
        return into

    def _down(self, values: OnDevice, into: Tensor | None, dtype: torch.dtype, blocks: bool) -> Tensor:
        stream = self._work(values.device)
        self._use(values, stream, False)
        host = into if into is not None else torch.empty(values.shape, dtype=dtype)
        if blocks or not self.is_pinned(host):
            why = "copy to the host" if blocks else "copy to host memory that is not pinned"
            self.waited(why, values.shape, stream)
            return host.copy_(values.inner)
        truth, address = values.inner.to(dtype, copy=True), host.untyped_storage().data_ptr()
        if host.numel():
            _bytes(host).fill_(_POISON)
            self._pending[address] = place()

        def over() -> None:
            self._pending.pop(address, None)
            with torch.inference_mode():
                host.copy_(truth)

        stream.copies.append((stream.number, over))
        return host


class _Mode(TorchDispatchMode):
    """Sends all operations of a thread through the pretended devices."""

    def __init__(self, gpus: Gpus) -> None:
        super().__init__()
        self._mode_key = torch._C._TorchDispatchModeKey.FAKE  # torch then does not look for a real device
        self.gpus = gpus

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with self.gpus._lock:
            return self.gpus.run(func, args, dict(kwargs or {}))


def merge(clock: dict[Stream, int], other: dict[Stream, int]) -> None:
    for stream, number in other.items():
        clock[stream] = max(clock.get(stream, 0), number)


def inner_of(value: Any) -> Any:
    """The argument of the operation that is done on the CPU."""
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("cpu")
    return value.inner if isinstance(value, OnDevice) else value


def mutated(func: Any, args: Any, kwargs: dict[str, Any]) -> list[Any]:
    """The tensors that an operation writes, by its schema."""
    named = zip(func._schema.arguments, args, strict=False)
    written = [(argument, value) for argument, value in named]
    written += [(argument, kwargs[argument.name]) for argument in func._schema.arguments if argument.name in kwargs]
    return [v for argument, v in written if argument.alias_info is not None and argument.alias_info.is_write]


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8) if tensor.is_contiguous() else tensor


def _ends(func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[torch.device, torch.device]:
    """Where a copy comes from, and where it goes to."""
    if str(func) == "aten.copy_.default":
        return args[1].device, args[0].device
    if str(func) == "aten.to.other":
        return args[0].device, args[1].device
    device = kwargs.get("device")
    if str(func) == "aten.to.device":
        device = args[1] if len(args) > 1 else device
    return args[0].device, torch.device(device) if device is not None else args[0].device


def _dtype_of(args: Any) -> torch.dtype | None:
    return next((arg for arg in args if isinstance(arg, torch.dtype)), None)


def _flag(func: Any, args: Any) -> bool:
    """``non_blocking``, if it is given by place."""
    names = [argument.name for argument in func._schema.arguments]
    at = names.index("non_blocking") if "non_blocking" in names else len(args)
    return bool(args[at]) if at < len(args) else False


class pretended:  # noqa: N801 - used like a function
    """Context: ``count`` devices instead of CUDA's, in this thread and in those that are started meanwhile."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, count: int = 1) -> None:
        self.patch, self.gpus = monkeypatch, Gpus(count)
        self.mode = _Mode(self.gpus)

    def __enter__(self) -> Gpus:
        patch, gpus, cuda = self.patch, self.gpus, torch.cuda
        torch._C._ensureCUDADeviceGuardSet()  # type: ignore[attr-defined]
        cudart = gpus.cudart(gpus._registers)
        for name, value in {
            "is_available": lambda: True,
            "device_count": lambda: gpus.count,
            "current_device": gpus.current_device,
            "set_device": gpus.set_device,
            "Stream": lambda device=None, priority=0: gpus.make_stream(device, priority),
            "Event": lambda *args, **options: Event(gpus, *args, **options),
            "stream": gpus.use,
            "current_stream": gpus.stream,
            "default_stream": lambda device=None: gpus._default[gpus.index_of(device)],
            "synchronize": gpus.synchronize,
            "empty_cache": lambda: None,
            "cudart": lambda: cudart,
            "check_error": checked,
            "get_device_name": lambda device=None: "pretended GPU",
            "get_device_properties": lambda device=None: SimpleNamespace(
                uuid=gpus.index_of(device), total_memory=2**36
            ),
        }.items():
            patch.setattr(cuda, name, value)
        patch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)  # would outlast the test
        patch.setattr(Tensor, "pin_memory", lambda self, device=None: gpus.pin(self.clone()))
        patch.setattr(Tensor, "is_pinned", lambda self, device=None: gpus.is_pinned(self))
        run = threading.Thread.run

        def in_mode(thread: threading.Thread) -> None:
            with _Mode(gpus):
                run(thread)

        patch.setattr(threading.Thread, "run", in_mode)
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        self.mode.__enter__()
        return gpus

    def __exit__(self, *error: Any) -> None:
        self.mode.__exit__(*error)
        torch.__future__.set_overwrite_module_params_on_conversion(False)
