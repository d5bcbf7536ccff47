"""A CUDA device that is not there: tensors that say ``cuda:0`` and compute on the CPU.

The programs under test run unchanged, with real values, real autograd, DDP, FSDP and optimizers. What goes wrong on a
GPU and not on a CPU goes wrong here, too:

- an operation on tensors of different devices raises the error that torch raises;
- whatever makes the host wait for the device is recorded with the line of the pipeline that did it: ``item()``,
  ``tolist()``, ``nonzero()``, boolean masks, blocking copies, copies from memory that is not pinned, ``synchronize()``;
- an asynchronous copy to the host has delivered *nothing* until its event, its stream or the device was waited for:
  whoever reads too early reads 0xA5 in every byte.

    with fake_cuda() as cuda:                   # or the fixture of the same name
        rank.device == torch.device("cuda", 0)
        with cuda.no_waits():                   # AssertionError that names the lines that wait
            step()
        cuda.waits                              # all of them so far

What differs from a real device: precision is the CPU's, autocast follows the CPU's list of operations, streams have no
order among each other, all kernels run at once, and a copy to the device takes its bytes at the time of the call.
Nothing here talks to a driver, so that it does not matter whether there is one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from waits import Waits, checked, place, reads_values

NAME = "NVIDIA H100 80GB HBM3"
_POISON = 0xA5
_DEVICE_INDEPENDENT = {"record_stream", "set_", "resize_", "is_pinned", "_pin_memory", "pin_memory"}
_LIKE = ("new_empty", "new_zeros", "new_ones", "new_full", "new_empty_strided")


class FakeCuda(Waits):
    """What is known of the devices that :func:`fake_cuda` pretends."""

    def __init__(self, devices: int) -> None:
        super().__init__()
        self.devices = devices
        self.copies = 0
        """Asynchronous copies to the host so far."""
        self.communicated: WeakValueDictionary[int, CudaTensor] = WeakValueDictionary()
        """By address: what a process group was given, and hands back as it got it, as a tensor of the CPU."""
        self._late: list[Callable[[], None]] = []
        self._of_thread = threading.local()
        self._lock = threading.Lock()

    @property
    def current(self) -> int:
        """Index of this thread's current device; CUDA starts every thread with 0."""
        return getattr(self._of_thread, "current", 0)

    @current.setter
    def current(self, index: int) -> None:
        if not 0 <= index < self.devices:
            raise RuntimeError(f"CUDA error: invalid device ordinal {index}")
        self._of_thread.current = index

    @property
    def assumed(self) -> int | None:
        """Where C++ means to make tensors that it says it makes on the CPU, in this thread."""
        return getattr(self._of_thread, "assumed", None)

    @assumed.setter
    def assumed(self, index: int | None) -> None:
        self._of_thread.assumed = index

    def waited(self, what: str, shape: tuple[int, ...] = ()) -> None:
        """The host waits here, until all copies have arrived."""
        self.note(what, shape)
        self.arrive()

    def later(self, deliver: Callable[[], None]) -> None:
        """A copy to the host was started."""
        with self._lock:
            self._late.append(deliver)
        self.copies += 1

    @property
    def started(self) -> int:
        """How many copies are in flight."""
        return len(self._late)

    def arrive(self, count: int | None = None) -> None:
        """Let the oldest ``count`` copies in flight arrive (default: all)."""
        with self._lock:
            some, self._late = self._late[:count], [] if count is None else self._late[count:]
        for deliver in some:
            deliver()


_ACTIVE: list[FakeCuda] = []


def _cuda() -> FakeCuda:
    if not _ACTIVE:
        raise RuntimeError("a tensor of fake_cuda() outlived it")
    return _ACTIVE[-1]


# ---- tensors


class CudaTensor(torch.Tensor):
    """Says that it is on a GPU. ``inner`` has its values, in the same memory."""

    inner: torch.Tensor
    index: int

    @staticmethod
    def __new__(cls, inner: torch.Tensor, index: int = 0) -> CudaTensor:
        tensor: CudaTensor = torch.Tensor._make_subclass(cls, inner.detach())  # type: ignore[assignment]
        tensor.inner, tensor.index = inner.detach(), index
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _spread(args, kwargs):
            return NotImplemented
        return _dispatch(func, args, kwargs or {})

    device = property(lambda self: torch.device("cuda", self.index))  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    def get_device(self) -> int:
        return self.index

    @property
    def data(self) -> torch.Tensor:  # type: ignore[override]
        return self.detach()

    # -- to the host

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return _to(self, *args, **kwargs)

    def cpu(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return _to(self, "cpu", **kwargs)

    def cuda(self, device: Any = None, non_blocking: bool = False, **kwargs: Any) -> torch.Tensor:
        return _to(self, torch.device("cuda", _index(device)), non_blocking=non_blocking)

    def _read(self, what: str) -> torch.Tensor:
        _cuda().waited(what, tuple(self.shape))
        return self.inner

    def item(self) -> Any:
        return self._read("item()").item()

    def tolist(self) -> Any:
        return self._read("tolist()").tolist()

    def __bool__(self) -> bool:
        return bool(self._read("bool()"))

    def __float__(self) -> float:
        return float(self._read("float()"))

    def __int__(self) -> int:
        return int(self._read("int()"))

    def __index__(self) -> int:
        return self._read("index()").__index__()

    def __repr__(self, **_: Any) -> str:
        return f"CudaTensor({self.inner!r}, device='{self.device}')"

    def __format__(self, spec: str) -> str:
        return format(self._read("format()").item(), spec) if not self.dim() else repr(self)

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first")

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.numpy()

    def __contains__(self, value: Any) -> bool:
        return bool((self == value).any())

    def new_tensor(self, data: Any, dtype: Any = None, device: Any = None, **kwargs: Any) -> torch.Tensor:
        return torch.tensor(data, dtype=dtype or self.dtype, device=device or self.device, **kwargs)

    def is_pinned(self, *_: Any) -> bool:
        return False

    def pin_memory(self, *_: Any) -> torch.Tensor:
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")

    def record_stream(self, stream: Any) -> None:
        return None

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        twin: torch.Tensor = CudaTensor(self.inner.clone(), self.index)
        twin = torch.nn.Parameter(twin, self.requires_grad) if isinstance(self, torch.nn.Parameter) else twin
        memo[id(self)] = twin.requires_grad_(self.requires_grad)
        return memo[id(self)]  # type: ignore[no-any-return]


def _new(name: str) -> Callable[..., Any]:
    plain = getattr(torch.Tensor, name)

    def new(self: CudaTensor, *args: Any, **kwargs: Any) -> Any:
        return plain(self, *args, **{"device": self.device, **kwargs})

    return new


for _name in _LIKE:
    setattr(CudaTensor, _name, _new(_name))


class _Move(torch.autograd.Function):
    """To another device, with a gradient that goes back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, index: int | None, non_blocking: bool) -> torch.Tensor:
        ctx.back = x.index if isinstance(x, CudaTensor) else None
        return _moved(x, index, non_blocking)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        return _moved(grad, ctx.back, False), None, None


def _moved(x: torch.Tensor, index: int | None, non_blocking: bool) -> torch.Tensor:
    """A copy of ``x`` on the GPU of this index, or on the CPU (None)."""
    cuda = _cuda()
    shape = tuple(x.shape)
    if not isinstance(x, CudaTensor):
        assert index is not None
        if not non_blocking or not x.is_pinned():
            cuda.waited(f"copy from {'memory that is not pinned' if non_blocking else 'the host'}", shape)
        return CudaTensor(x.detach().clone(), index)
    if index is not None:
        return CudaTensor(x.inner.clone(), index)
    if not non_blocking:
        cuda.waited("copy to the host", shape)
        return x.inner.clone()
    out = torch.empty_like(x.inner)
    cuda.pin(out)
    _deliver_later(cuda, out, x.inner)
    return out


def _deliver_later(cuda: FakeCuda, target: torch.Tensor, source: torch.Tensor) -> None:
    """Bytes arrive when they are waited for; they are those of now."""
    with torch._C._DisableTorchDispatch():
        now = _plain_to(source.detach(), target.dtype, copy=True)
        _poison(target.detach())
    cuda.later(lambda: _fill(target, now))


def _fill(target: torch.Tensor, values: torch.Tensor) -> None:
    with torch._C._DisableTorchDispatch(), torch.no_grad():
        target.copy_(values)


def _poison(target: torch.Tensor) -> None:
    if target.dim() and target.is_contiguous():
        target.view(-1).view(torch.uint8).fill_(_POISON)
    elif target.dtype.is_floating_point:
        target.fill_(float("nan"))
    else:
        target.fill_(True if target.dtype == torch.bool else -91)


def _to(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """``Tensor.to`` for tensors of either kind."""
    copy = kwargs.pop("copy", False)
    if args and isinstance(args[0], torch.Tensor):
        args = (args[0].device, args[0].dtype, *args[1:])
    device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    if isinstance(x, DTensor):
        assert device is None or device == x.device, "a tensor that is spread over ranks stays where it is"
        return _plain_to(x, dtype or x.dtype, copy=copy)
    index = _index(device) if device is not None and device.type == "cuda" else None
    here = x.index if isinstance(x, CudaTensor) else None
    if device is not None and device.type not in ("cuda", "cpu"):
        return _plain_to(x, *args, copy=copy, **kwargs)
    if device is not None and index != here:
        x = _Move.apply(x, index, non_blocking)
    same = dtype is None or x.dtype == dtype
    if same and memory_format is None and not copy:
        return x
    more = {} if memory_format is None else {"memory_format": memory_format}
    return _plain_to(x, dtype or x.dtype, copy=copy, **more)


def _index(device: Any) -> int:
    """Of a device, its name, its number, or None: the current one."""
    if isinstance(device, int):
        return device
    index = torch.device(device).index if device is not None else None
    return _cuda().current if index is None else index


_plain_to = torch.Tensor.to


def _pin_memory(tensor: torch.Tensor, *_: Any) -> torch.Tensor:
    return tensor if tensor.is_pinned() else _cuda().pin(tensor.clone())


# ---- operations


def _spread(args: Any, kwargs: Any) -> bool:
    """Whether one of the tensors is spread over ranks: those have rules of their own."""
    return any(isinstance(x, DTensor) for x in tree_leaves((args, kwargs)))


class _Factories(TorchDispatchMode):
    """Sees what makes tensors on a device from nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _spread(args, kwargs):
            return func(*args, **(kwargs or {}))
        return _dispatch(func, args, kwargs or {})


def _dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    found: dict[int, CudaTensor] = {}
    others: list[torch.Tensor] = []

    def unwrapped(x: Any) -> Any:
        if isinstance(x, CudaTensor):
            found[id(x.inner)] = x
            return x.inner
        if type(x) in (torch.Tensor, torch.nn.Parameter):  # another subclass has its own rules
            known = _cuda().communicated
            given = known.get(x.untyped_storage().data_ptr()) if known and x.layout == torch.strided else None
            if given is not None:
                found[id(x)] = CudaTensor(x, given.index)
            else:
                others.append(x)
        return x

    name = func.overloadpacket.__name__ if hasattr(func, "overloadpacket") else str(func)
    plain_args, plain_kwargs = tree_map(unwrapped, args), tree_map(unwrapped, kwargs)
    index: int | None = max((tensor.index for tensor in found.values()), default=None)
    if kwargs.get("device") is not None and torch.device(kwargs["device"]).type in ("cuda", "cpu"):
        index = _asked(name, torch.device(kwargs["device"]), index)
        plain_kwargs = {**plain_kwargs, "device": torch.device("cpu")}
        if name == "_to_copy" and index is not None and not found:  # from C++
            return _to(args[0], torch.device("cuda", index), kwargs.get("dtype"), bool(kwargs.get("non_blocking")))
    if func.namespace == "c10d":
        _cuda().communicated.update({t.inner.untyped_storage().data_ptr(): t for t in found.values()})
    if found:
        copied = _copied(name, func, args, plain_args, plain_kwargs)
        if copied is not None:
            return copied
        _check(name, args, found, others)
    out = func(*plain_args, **plain_kwargs)
    if index is None:
        return out

    def wrapped(x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or isinstance(x, CudaTensor):
            return x
        return found.get(id(x)) if id(x) in found else CudaTensor(x, index)

    return tree_map(wrapped, out)


def _copied(name: str, func: Any, args: Any, plain_args: Any, plain_kwargs: Any) -> Any:
    """The result of ``copy_`` between devices; None if it is none."""
    if name != "copy_" or _on_gpu(args[0]) == _on_gpu(args[1]):
        return None
    cuda, target, source = _cuda(), args[0], args[1]
    non_blocking = bool(plain_kwargs.get("non_blocking", args[2] if len(args) > 2 else False))
    shape = tuple(source.shape)
    if isinstance(target, CudaTensor):
        if source.dim() and not (non_blocking and source.is_pinned()):
            cuda.waited("copy from the host", shape)
        func(*plain_args, **plain_kwargs)
    elif non_blocking and target.is_pinned():
        _deliver_later(cuda, target, source.inner)
    else:
        cuda.waited("copy to the host", shape)
        func(*plain_args, **plain_kwargs)
    return target


def _asked(name: str, device: torch.device, index: int | None) -> int | None:
    """Where the result of an operation with ``device=`` lies, whose tensors are on the GPU ``index`` or on none.

    To C++ all tensors are on the CPU, which it asks for where it means the device of another tensor: in a gradient, or
    when it changes a type.
    """
    if device.type == "cuda":
        return _index(device)
    if name == "_to_copy":
        return index
    if _cuda().assumed is not None:
        return _cuda().assumed
    in_backward = torch._C._current_graph_task_id() != -1
    return (index if index is not None else _cuda().current) if in_backward else None


def _on_gpu(x: torch.Tensor) -> bool:
    return isinstance(x, CudaTensor) or x.untyped_storage().data_ptr() in _cuda().communicated


def _check(name: str, args: Any, found: dict[int, CudaTensor], others: list[torch.Tensor]) -> None:
    """Refuse tensors of several devices, and note what waits."""
    indices = {tensor.index for tensor in found.values()}
    shape = tuple(next(iter(found.values())).shape)
    if why := reads_values(name, args, CudaTensor):
        _cuda().waited(why, shape)
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        others = [x for x in others if all(x is not one for one in args[1])]
    strangers = [x for x in others if x.dim() > 0] if name not in _DEVICE_INDEPENDENT else []
    if strangers or len(indices) > 1:
        devices = [f"cuda:{index}" for index in sorted(indices)] + (["cpu"] if strangers else [])
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {devices[0]} and "
            f"{devices[1]}! ({name}, {place()})"
        )


# ---- torch.cuda


class Stream:
    """Takes everything that was started so far to be its own."""

    def __init__(self, device: Any = None, priority: int = 0, **_: Any) -> None:
        self.device = torch.device("cuda", _index(device))

    def synchronize(self) -> None:
        _cuda().waited("Stream.synchronize()")

    def wait_stream(self, stream: Any) -> None:
        return None

    def wait_event(self, event: Any) -> None:
        return None

    def record_event(self, event: Any = None) -> Event:
        event = event or Event()
        event.record(self)
        return event  # type: ignore[no-any-return]

    def query(self) -> bool:
        return not _cuda().started

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: Any) -> None:
        return None


class Event:
    """Copies that were started before :meth:`record` have arrived after :meth:`synchronize`."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self._copies = 0

    def record(self, stream: Any = None) -> None:
        self._copies = _cuda().copies

    def synchronize(self) -> None:
        cuda = _cuda()
        late = cuda.copies - self._copies
        cuda.note("Event.synchronize()")
        cuda.arrive(max(0, cuda.started - late))

    def wait(self, stream: Any = None) -> None:
        return None

    def query(self) -> bool:
        """False once, so that whoever polls has to come again; the copies arrive meanwhile."""
        cuda = _cuda()
        late = cuda.copies - self._copies
        if cuda.started > late:
            cuda.arrive(cuda.started - late)
            return False
        return True

    def elapsed_time(self, other: Any) -> float:
        return 1.0


class _DeviceContext:
    def __init__(self, device: Any = None) -> None:
        self._device = device

    def __enter__(self) -> None:
        self._before = _cuda().current
        if self._device is not None:
            _cuda().current = _index(self._device)

    def __exit__(self, *_: Any) -> None:
        _cuda().current = self._before


class _StreamContext:
    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __enter__(self) -> Any:
        return self._stream

    def __exit__(self, *_: Any) -> None:
        return None


_plain_autocast = torch.autocast


class _Autocast(_plain_autocast):
    """Of a GPU: that of the CPU."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)


def _properties(device: Any = None) -> Any:
    index = _index(device)
    return SimpleNamespace(
        name=NAME,
        uuid=f"GPU-{index:08d}",
        multi_processor_count=132,
        total_memory=80 << 30,
        major=9,
        minor=0,
        warp_size=32,
    )


def _set_device(device: Any) -> None:
    _cuda().current = _index(device)


def _grouped(tensors: Any, with_indices: bool = False) -> Any:
    """torch's own, which takes all devices for CPUs: these tensors are on one GPU, or none is."""
    groups = _plain_grouped(tensors, with_indices)
    first = next((x for some in tensors for x in some if isinstance(x, CudaTensor | DTensor) and x.is_cuda), None)
    return groups if first is None else {(first.device, dtype): group for (_, dtype), group in groups.items()}


_plain_grouped = torch._C._group_tensors_by_device_and_dtype


def _layer_norm(x: torch.Tensor, shape: Any, weight: Any = None, bias: Any = None, *more: Any, **kwargs: Any) -> Any:
    """Under autocast a GPU takes it in float32, whatever it is given; a CPU would refuse to."""
    if not isinstance(x, CudaTensor) or not torch.is_autocast_enabled("cuda"):
        return _plain_layer_norm(x, shape, weight, bias, *more, **kwargs)
    exact = [None if t is None else t.float() for t in (x, weight, bias)]
    return _plain_layer_norm(exact[0], shape, exact[1], exact[2], *more, **kwargs)


_plain_layer_norm = torch.layer_norm


def _replacements(cuda: FakeCuda) -> list[tuple[Any, str, Any]]:
    """(owner, name, stand-in) of all that would ask the driver."""
    module = torch.cuda
    state = torch.get_rng_state
    autocast_enabled, autocast_dtype = torch.is_autocast_enabled, torch.get_autocast_dtype
    return [
        (torch.Tensor, "to", lambda x, *a, **k: _to(x, *a, **k)),
        (torch.Tensor, "cuda", lambda x, device=None, non_blocking=False: _moved_to(x, device, non_blocking)),
        (threading.Thread, "run", _in_mode),
        (torch.Tensor, "pin_memory", _pin_memory),
        (torch.Tensor, "is_pinned", lambda x, device=None: cuda.is_pinned(x)),
        (torch, "tensor", _from_data(torch.tensor)),
        (torch, "as_tensor", _from_data(torch.as_tensor)),
        (DTensor, "device", property(lambda x: x._local_tensor.device)),
        (DTensor, "is_cuda", property(lambda x: x._local_tensor.is_cuda)),
        (DTensor, "is_cpu", property(lambda x: x._local_tensor.is_cpu)),
        (torch, "layer_norm", _layer_norm),
        (torch._C, "_group_tensors_by_device_and_dtype", _grouped),
        (torch, "autocast", _Autocast),
        (torch.amp, "autocast", _Autocast),
        (torch, "is_autocast_enabled", lambda kind="cuda": autocast_enabled("cpu" if kind == "cuda" else kind)),
        (torch, "get_autocast_dtype", lambda kind: autocast_dtype("cpu" if kind == "cuda" else kind)),
        (torch, "Stream", Stream),
        (torch, "Event", Event),
        (torch.accelerator, "is_available", lambda: True),
        (torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda")),
        (torch.accelerator, "current_device_index", lambda: cuda.current),
        (torch.accelerator, "set_device_index", _set_device),
        (torch.accelerator, "device_count", lambda: cuda.devices),
        (F, "scaled_dot_product_attention", _there(F.scaled_dot_product_attention)),  # masks
        (torch.distributed, "Reducer", _there(torch.distributed.Reducer)),
        (DistributedDataParallel, "_pre_forward", _there(DistributedDataParallel._pre_forward)),
        (module, "_lazy_init", lambda: None),
        (module, "cudart", lambda: cuda.cudart(lambda: cuda.current)),
        (module, "check_error", checked),
        (module, "is_initialized", lambda: True),
        (module, "is_available", lambda: True),
        (module, "device_count", lambda: cuda.devices),
        (module, "current_device", lambda: cuda.current),
        (module, "set_device", _set_device),
        (module, "device", _DeviceContext),
        (module, "Stream", Stream),
        (module, "Event", Event),
        (module, "stream", _StreamContext),
        (module, "StreamContext", _StreamContext),
        (module, "current_stream", lambda device=None: Stream(device)),
        (module, "default_stream", lambda device=None: Stream(device)),
        (module, "synchronize", lambda device=None: cuda.waited("torch.cuda.synchronize()")),
        (module, "is_bf16_supported", lambda *_, **__: True),
        (module, "get_device_name", lambda device=None: NAME),
        (module, "get_device_capability", lambda device=None: (9, 0)),
        (module, "get_device_properties", _properties),
        (module, "mem_get_info", lambda device=None: (79 << 30, 80 << 30)),
        (module, "max_memory_allocated", lambda device=None: 1 << 30),
        (module, "memory_allocated", lambda device=None: 1 << 30),
        (module, "max_memory_reserved", lambda device=None: 1 << 30),
        (module, "memory_reserved", lambda device=None: 1 << 30),
        (module, "reset_peak_memory_stats", lambda device=None: None),
        (module, "empty_cache", lambda: None),
        (module, "manual_seed", lambda seed: None),
        (module, "manual_seed_all", lambda seed: None),
        (module, "get_rng_state", lambda device=None: state()),
        (module, "set_rng_state", lambda value, device=None: None),
        (module, "is_current_stream_capturing", lambda: False),
        (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
    ]


_plain_run = threading.Thread.run


def _in_mode(thread: threading.Thread) -> None:
    with _Factories():
        _plain_run(thread)


def _from_data(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """torch.tensor and the like; torch copies past everything that could see it."""

    def made(data: Any, *, device: Any = None, **kwargs: Any) -> torch.Tensor:
        if isinstance(data, CudaTensor):
            return _to(data, device or data.device, kwargs.get("dtype") or data.dtype)
        if device is None or torch.device(device).type != "cuda":
            return make(data, device=device, **kwargs)
        requires_grad = kwargs.pop("requires_grad", False)
        return _to(make(data, **kwargs), torch.device(device)).requires_grad_(requires_grad)

    return made


def _there(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, in which C++ makes further tensors: they lie where the first of those that it is given does."""

    def called(*args: Any, **kwargs: Any) -> Any:
        given = args[0].parameters() if isinstance(args[0], torch.nn.Module) else args[0]
        given = given if isinstance(given, torch.Tensor) else next(iter(given), None)
        cuda = _cuda()
        before, cuda.assumed = cuda.assumed, given.index if isinstance(given, CudaTensor) else None
        try:
            return function(*args, **kwargs)
        finally:
            cuda.assumed = before

    return called


def _moved_to(x: torch.Tensor, device: Any, non_blocking: bool) -> torch.Tensor:
    return _to(x, torch.device("cuda", _index(device)), non_blocking=non_blocking)


@contextmanager
def fake_cuda(devices: int = 1) -> Iterator[FakeCuda]:
    """Context in which torch has so many CUDA devices. They belong to this process alone."""
    torch._C._ensureCUDADeviceGuardSet()  # of a process without a GPU: DTensor asks it
    cuda = FakeCuda(devices)
    _ACTIVE.append(cuda)
    overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # a parameter cannot become one of a subclass
    try:
        with ExitStack() as stack:
            for owner, name, stand_in in _replacements(cuda):
                stack.enter_context(mock.patch.object(owner, name, stand_in))
            stack.enter_context(_Factories())
            yield cuda
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(overwrites)
        cuda.arrive()
        _ACTIVE.pop()
