"""Checks the GPUs that this rank sees, and runs the kernels that networks use."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.doctor.finding import Finding

if TYPE_CHECKING:
    import torch

_HALF = 5e-2  # tolerance of results in bfloat16 against float32


def look(expected: int, thorough: bool) -> Iterator[Finding]:
    """Check GPUs and kernels.

    Args:
        expected: Number of GPUs requested on each node.
        thorough: Try each GPU and each kernel, which only one rank of a node needs to do.
    """
    import torch

    from pipeline.distributed.device import gpus_given, why_no_gpu

    built = f"torch {torch.__version__}" + (f" for CUDA {torch.version.cuda}" if torch.version.cuda else "")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    given = f"{expected} GPUs were requested on each node" if expected else gpus_given(os.environ)
    if not count:
        if not given and Path("/dev/nvidia0").exists():
            given = "this machine has GPUs (/dev/nvidia0)"
        if given:
            yield Finding("gpus", "fail", f"{given}, but torch sees none: {why_no_gpu(os.environ)}", _advice())
        else:
            yield Finding("gpus", "ok", f"no GPU, and none was requested: networks run on the CPU; {built}")
        if thorough:
            yield from kernels(torch.device("cpu"))
        return
    yield _seen(count, expected, built)
    if not thorough:
        return
    yield from _driver()
    for number in range(count):
        yield _works(number)
    yield from kernels(torch.device("cuda", int(os.environ.get("SLURM_LOCALID", "0")) % count))


def _advice() -> str:
    return "run nvidia-smi on that node; a container needs --nv; device=cpu uses the CPU"


def _driver() -> Iterator[Finding]:
    import pynvml

    try:
        pynvml.nvmlInit()
        version = pynvml.nvmlSystemGetDriverVersion()
        cuda = pynvml.nvmlSystemGetCudaDriverVersion()
    except pynvml.NVMLError as error:
        yield Finding("driver", "warn", f"NVML does not answer: {error}", "GPU load is not shown; run nvidia-smi")
        return
    version = version.decode() if isinstance(version, bytes) else version
    text = f"driver {version}, for CUDA up to {cuda // 1000}.{cuda % 1000 // 10}"
    yield Finding("driver", "ok", text, values={"driver": version})


def _seen(count: int, expected: int, built: str) -> Finding:
    import torch

    names = [torch.cuda.get_device_properties(number).name for number in range(count)]
    uuids = [str(torch.cuda.get_device_properties(number).uuid) for number in range(count)]
    kinds = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
    text = f"{kinds}; CUDA_VISIBLE_DEVICES {visible}; {built}"
    values = {"gpus": count, "uuids": uuids}
    per_task = "SLURM_GPUS_PER_TASK" in os.environ or os.environ.get("SLURM_GPU_BIND", "").startswith("single")
    if expected and count < expected and not per_task:
        return Finding("gpus", "fail", f"{expected} requested on each node, {count} visible: {text}", _advice(), values)
    return Finding("gpus", "ok", text, values=values)


def _works(number: int) -> Finding:
    """Check that a GPU computes, by comparing a matrix product in bfloat16 with the same on the CPU."""
    import torch

    properties = torch.cuda.get_device_properties(number)
    kind = f"sm_{properties.major}{properties.minor}"
    device = torch.device("cuda", number)
    x = torch.randn(256, 256)
    try:
        good = torch.allclose((x.to(device).bfloat16() @ x.to(device).bfloat16().T).float().cpu(), x @ x.T, 0.1, 1.0)
    except RuntimeError as error:
        first = str(error).partition("\n")[0]
        archs = " ".join(torch.cuda.get_arch_list())
        advice = f"this torch has kernels for {archs}, the GPU is {kind}: install a torch that fits"
        return Finding(f"gpu {number}", "fail", first, advice if kind not in archs else _advice())
    free, total = torch.cuda.mem_get_info(device)
    text = f"{kind}, {total / 2**30:.0f} GiB, {free / 2**30:.0f} free"
    if not good:
        return Finding(f"gpu {number}", "fail", f"computes wrongly ({text})", "exclude the node: exclude=")
    if free < 0.9 * total:
        return Finding(
            f"gpu {number}", "warn", text, "another process uses it (see nvidia-smi); request GPUs of your own"
        )
    return Finding(f"gpu {number}", "ok", text)


# ---- kernels


def kernels(device: torch.device) -> Iterator[Finding]:
    """Run attention, scans and ``torch.compile`` on ``device``, and compare each with a plain computation."""
    for name, run in (("attention", _attention), ("mamba_ssm", _mamba), ("compile", _compile)):
        try:
            yield from run(device)
        except Exception as error:  # kernels raise exceptions of any type
            first = str(error).partition("\n")[0][:200]
            yield Finding(f"kernels {name}", "warn", f"{type(error).__name__}: {first}", "torch's own are used instead")


def _attention(device: torch.device) -> Iterator[Finding]:
    """Find which of torch's attention backends work in bfloat16, with heads of size 64 as in all of our networks."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention as attention

    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 128, 64, device=device, dtype=torch.bfloat16) for _ in range(3))
    weights = (q.float() @ k.float().transpose(-1, -2) / math.sqrt(64)).softmax(-1)
    expected = weights @ v.float()
    works, fails = [], []
    for backend, name in (
        (SDPBackend.FLASH_ATTENTION, "flash"),
        (SDPBackend.EFFICIENT_ATTENTION, "memory-efficient"),
        (SDPBackend.CUDNN_ATTENTION, "cuDNN"),
        (SDPBackend.MATH, "plain"),
    ):
        try:
            with sdpa_kernel(backend):
                torch.testing.assert_close(attention(q, k, v).float(), expected, rtol=_HALF, atol=_HALF)
            works.append(name)
        except (RuntimeError, AssertionError):
            fails.append(name)
    text = f"attention on {device.type}: {', '.join(works)} work" + (f"; not {', '.join(fails)}" if fails else "")
    slow = device.type == "cuda" and not {"flash", "cuDNN"} & set(works)
    yield Finding(
        "kernels attention", "warn" if slow else "ok", text, "attention will be slow: update torch" if slow else "",
        {"attention": works},
    )  # fmt: skip


def _mamba(device: torch.device) -> Iterator[Finding]:
    """Check that mamba_ssm's scans are installed, run, and agree with our own."""
    if importlib.util.find_spec("mamba_ssm") is None:
        text = "mamba_ssm is not installed: scans run in torch"
        advice = "for Vision Mamba and decoder=mamba on GPUs: pip install -e .[mamba]" if device.type == "cuda" else ""
        yield Finding("kernels mamba_ssm", "warn" if device.type == "cuda" else "ok", text, advice)
        return
    if device.type != "cuda":
        yield Finding("kernels mamba_ssm", "skip", "mamba_ssm's kernels need a GPU")
        return
    import torch

    from pipeline.models.ssm import Mamba1, Mamba2

    for kind in (Mamba1, Mamba2):
        torch.manual_seed(0)
        mixer: Any = kind(64, d_state=16).to(device)
        tokens = torch.randn(2, 196, 64, device=device)
        outputs = []
        for backend in ("torch", "mamba_ssm"):
            mixer.backend = backend
            outputs.append(_with_gradients(mixer, tokens))
        try:
            for ours, theirs in zip(*outputs, strict=True):
                torch.testing.assert_close(theirs, ours, rtol=1e-2, atol=1e-2)
            yield Finding("kernels mamba_ssm", "ok", f"{kind.__name__}: forward and backward agree with torch's")
        except AssertionError as error:
            first = str(error).partition("\n")[0]
            advice = "install a mamba-ssm that fits this torch, or scan_backend=torch"
            yield Finding("kernels mamba_ssm", "fail", f"{kind.__name__}: {first}", advice)


def _with_gradients(mixer: Callable[[Any], Any], tokens: torch.Tensor) -> list[torch.Tensor]:
    import torch

    output = mixer(tokens)
    return [output, *torch.autograd.grad(output.square().sum(), list(mixer.parameters()))]  # type: ignore[attr-defined]


def _compile(device: torch.device) -> Iterator[Finding]:
    """Check that ``compile=true`` will work; Triton needs a C compiler."""
    import torch

    if device.type != "cuda":
        return
    function = torch.compile(lambda x: torch.nn.functional.gelu(x) * 2)
    x = torch.randn(1024, device=device)
    torch.testing.assert_close(function(x), torch.nn.functional.gelu(x) * 2, rtol=1e-3, atol=1e-3)
    yield Finding("kernels compile", "ok", "torch.compile works here (compile=true)")
