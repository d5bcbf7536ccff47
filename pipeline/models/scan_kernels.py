"""mamba_ssm's kernels: which of them work here, and their use with torch.compile.

Mamba-2's scan is written in Triton; Mamba-1's is a CUDA extension, which mamba_ssm builds by default up to release 2.3
and later only on request. Each mixer is therefore checked separately, by an import: a package that was built without
CUDA is found, but fails when it is used.
"""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from pipeline.config.schema import ConfigError

BACKENDS = ("auto", "torch", "mamba_ssm")
CHUNK = 64


@dataclass(frozen=True)
class Kernel:
    """A scan of mamba_ssm, or the reason why it cannot be used."""

    reason: str = ""
    function: Callable[..., Tensor] | None = None
    state_dtype: bool = False
    """Whether the dtype of the states can be chosen."""


@cache
def kernel(mixer: str) -> Kernel:
    """The kernel for "mamba1" or "mamba2"."""
    try:
        if mixer == "mamba1":
            importlib.import_module("selective_scan_cuda")
            function = importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
        else:
            function = importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    except Exception as error:  # an extension built for another torch may raise anything
        lines = str(error).splitlines()
        return Kernel(f"{type(error).__name__}: {lines[0] if lines else ''}")
    return Kernel("", function, "state_dtype" in inspect.signature(function).parameters)


def backend_of(wanted: str, device: torch.device, mixer: str) -> str:
    """The backend for tensors on ``device``, torch or mamba_ssm; "auto" uses the kernels if they work.

    Raises:
        ConfigError: the kernels are requested but cannot be used.
    """
    if wanted == "torch" or (wanted == "auto" and device.type != "cuda"):
        return "torch"
    reason = "they need a CUDA device" if device.type != "cuda" else kernel(mixer).reason
    if not reason and torch.are_deterministic_algorithms_enabled():
        reason = "they are not deterministic (deterministic=true)"
    if wanted == "mamba_ssm" and reason:
        raise ConfigError(f"scan_backend=mamba_ssm: its kernels for {mixer} cannot be used: {reason}")
    if wanted == "auto":
        _report("torch" if reason else "mamba_ssm", mixer, reason)
    return "torch" if reason else "mamba_ssm"


@cache
def _report(choice: str, mixer: str, reason: str) -> None:
    log = logging.getLogger("pipeline")
    if reason:
        log.warning(
            "scan_backend=auto: %s for %s (%s). It gives the same results, more slowly; "
            "`pip install latentmill[mamba]` installs the kernels",
            choice,
            mixer,
            reason,
        )
    else:
        log.info("scan_backend=auto: %s for %s", choice, mixer)


def scan(mixer: str, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """Run the scan with mamba_ssm's kernel; see :func:`pipeline.models.ssm.selective_scan` and
    :func:`~pipeline.models.ssm.ssd` for shapes. States are float32.

    To torch.compile it is one opaque operation, whose backward pass recomputes the forward pass.
    """
    if torch.compiler.is_compiling():
        out: Tensor = _compiled(mixer, x, dt, a, b, c, d)
        return out
    return _scan(mixer, x, dt, a, b, c, d)


def _scan(mixer: str, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    found = kernel(mixer)
    assert found.function is not None, found.reason
    with torch.autocast(x.device.type, enabled=False):
        if mixer == "mamba1":  # (n, l, d) → (n, d, l)
            exact = [t.float().transpose(1, 2).contiguous() for t in (x, dt, b, c)]
            y = found.function(exact[0], exact[1], a.float(), exact[2], exact[3], d.float()).transpose(1, 2)
            return y.to(x.dtype)
        kind = x.dtype
        more = {"state_dtype": torch.float32} if found.state_dtype else {}
        if not more:  # states have the dtype of C then, and that of x in the backward pass
            x, b, c = x.float(), b.float(), c.float()
        y = found.function(
            x, dt.float(), a.float(), b[:, :, None], c[:, :, None], chunk_size=CHUNK, D=d.float(), **more
        )
        return y.to(kind)


@torch.library.custom_op("latentmill::scan", mutates_args=())
def _compiled(mixer: str, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    return _scan(mixer, x, dt, a, b, c, d).contiguous()


@_compiled.register_fake
def _(mixer: str, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("latentmill::scan_backward", mutates_args=())
def _compiled_backward(
    mixer: str, dy: Tensor, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor
) -> list[Tensor]:
    # operations run below autograd, which is needed here for the recomputed forward pass
    above = torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)
    with torch.enable_grad(), above:
        inputs = [t.detach().requires_grad_() for t in (x, dt, a, b, c, d)]
        grads = torch.autograd.grad(_scan(mixer, *inputs), inputs, dy)
    return [grad.contiguous() for grad in grads]


@_compiled_backward.register_fake
def _(mixer: str, dy: Tensor, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> list[Tensor]:
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, dt, a, b, c, d)]


def _save_inputs(ctx: object, inputs: tuple[object, ...], output: Tensor) -> None:
    ctx.mixer = inputs[0]  # type: ignore[attr-defined]
    ctx.save_for_backward(*inputs[1:])  # type: ignore[attr-defined]


def _gradients(ctx: object, dy: Tensor) -> tuple[Tensor | None, ...]:
    mixer, saved = ctx.mixer, ctx.saved_tensors  # type: ignore[attr-defined]
    return (None, *_compiled_backward(mixer, dy, *saved))


_compiled.register_autograd(_gradients, setup_context=_save_inputs)
