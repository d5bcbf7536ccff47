"""Time and memory of our scans, forward and backward, against a loop under autograd and against other libraries.

    python benchmarks/scan.py [lengths=64,1024] [rounds=5] [batch=16] [width=192]

A ratio is the median over rounds of (loop's time / contestant's time), all taking turns in one process; memory is the
growth of a process's peak, measured in a separate process for each. float32, 16 states, one thread.

    loop            the recurrence, step by step over unbind, under autograd
    pscan           a parallel scan by Blelloch's tree in torch, as in mamba.py
    transformers    the steps of MambaModel's own path without kernels, from the discretisation on
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from torch import Tensor

from pipeline.models.ssm import selective_scan, ssd

STATES, HEAD = 16, 64


def loop(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    decay = torch.exp(dt[..., None] * a)
    into = (dt * x)[..., None] * b[:, :, None]
    state = x.new_zeros(x.shape[0], *a.shape)
    outputs = []
    for decay_t, into_t, c_t in zip(decay.unbind(1), into.unbind(1), c.unbind(1), strict=True):
        state = decay_t * state + into_t
        outputs.append((state @ c_t[..., None])[..., 0])
    return torch.stack(outputs, 1) + x * d


def pscan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """Up-sweep and down-sweep over a power of two steps, written with slices for autograd."""
    length = x.shape[1]
    size = 1 << (length - 1).bit_length()
    decay = torch.nn.functional.pad(torch.exp(dt[..., None] * a), (0, 0, 0, 0, 0, size - length))
    into = torch.nn.functional.pad((dt * x)[..., None] * b[:, :, None], (0, 0, 0, 0, 0, size - length))
    states = _tree(decay, into)[:, :length]
    return (states @ c[..., None])[..., 0] + x * d


def _tree(decay: Tensor, into: Tensor) -> Tensor:
    if decay.shape[1] == 1:
        return into
    even_decay, odd_decay = decay[:, 0::2], decay[:, 1::2]
    even, odd = into[:, 0::2], into[:, 1::2]
    after_odd = _tree(odd_decay * even_decay, odd_decay * even + odd)
    before_even = torch.cat([torch.zeros_like(after_odd[:, :1]), after_odd[:, :-1]], 1)
    return torch.stack([even_decay * before_even + even, after_odd], 2).flatten(1, 2)


def hugging_face(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """The scan of transformers' MambaModel, in its layout (n, d, l) and with its indexing of each step."""
    x, dt = x.transpose(1, 2), dt.transpose(1, 2)
    decay = torch.exp(a[None, :, None, :] * dt[..., None])
    into = dt[..., None] * b[:, None].float() * x[..., None].float()
    state = x.new_zeros(x.shape[0], *a.shape)
    outputs = []
    for t in range(x.shape[2]):
        state = decay[:, :, t, :] * state + into[:, :, t, :]
        outputs.append(torch.matmul(state, c[:, t, :, None])[:, :, 0])
    return (torch.stack(outputs, -1) + x * d[None, :, None]).transpose(1, 2)


CONTESTANTS: dict[str, Callable[..., Tensor]] = {
    "loop": loop,
    "Mamba-1, fused": selective_scan,
    "Mamba-2, SSD": ssd,
    "pscan": pscan,
    "transformers": hugging_face,
}


def inputs(name: str, batch: int, length: int, width: int) -> list[Tensor]:
    torch.manual_seed(0)
    heads = width // HEAD
    channels = (heads, HEAD) if "SSD" in name else (width,)
    few = (heads,) if "SSD" in name else (width,)
    rates = (heads,) if "SSD" in name else (width, STATES)
    x, b, c = (torch.randn(batch, length, *shape) for shape in (channels, (STATES,), (STATES,)))
    tensors = [x, torch.rand(batch, length, *few) * 0.1, -torch.rand(rates) * 4, b, c, torch.randn(few)]
    return [t.requires_grad_() for t in tensors]


def seconds(name: str, tensors: list[Tensor]) -> float:
    start = perf_counter()
    CONTESTANTS[name](*tensors).sum().backward()
    return perf_counter() - start


def peak_megabytes(arguments: tuple[str, int, int, int]) -> float:
    torch.set_num_threads(1)
    seconds(arguments[0], inputs(arguments[0], 1, 2, HEAD))  # loads code
    tensors = inputs(*arguments)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the current use
    before = memory("VmHWM")
    seconds(arguments[0], tensors)
    return memory("VmHWM") - before


def memory(name: str) -> float:
    """A line of /proc/self/status, in MiB."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) / 1024


def main() -> None:
    options = dict(argument.split("=", 1) for argument in sys.argv[1:])
    batch, width = int(options.get("batch", 16)), int(options.get("width", 192))
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    for length in map(int, options.get("lengths", "64,1024").split(",")):
        slow = ("transformers",) if length > 256 else ()  # their backward pass is quadratic in the length
        names = [name for name in CONTESTANTS if name not in slow]
        tensors = {name: inputs(name, batch, length, width) for name in names}
        times: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(int(options.get("rounds", 5)) + 1):
            for name in names:
                took = seconds(name, tensors[name])
                if turn:  # the first round is a warm-up
                    times[name].append(took)
        print(f"\nlength {length}, batch {batch}, width {width}, {STATES} states")
        print(f"{'':30}{'ms':>9}{'x loop':>9}{'MiB':>8}", flush=True)
        for name in names:
            ratio = median(other / own for other, own in zip(times["loop"], times[name], strict=True))
            with get_context("spawn").Pool(1) as pool:
                memory = pool.map(peak_megabytes, [(name, batch, length, width)])[0]
            print(f"{name:30}{1000 * median(times[name]):9.1f}{ratio:9.2f}{memory:8.0f}", flush=True)


if __name__ == "__main__":
    main()
