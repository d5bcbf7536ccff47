"""State space models: Mamba-2's SSD and Mamba-1's selective scan, in plain torch, or by mamba_ssm's kernels on CUDA.

Both compute, for each channel and along the sequence, h_t = exp(dt_t a) h_{t-1} + dt_t B_t x_t, y_t = C_t h_t + D x_t.
In Mamba-1 (Gu and Dao 2023) ``a`` has a value for each channel and state; in Mamba-2 (Dao and Gu 2024) one for each
head, so that a chunk of the sequence becomes matrix products. States are float32 under autocast, too, as bfloat16 is
not precise enough to accumulate them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config.schema import ConfigError
from pipeline.models.scan_kernels import CHUNK, backend_of, scan

_KEEP_EVERY = 8


# ---- Mamba-1


def selective_scan(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, keep_every: int = _KEEP_EVERY
) -> Tensor:
    """The scan of Mamba-1.

    Args:
        x: (n, l, d) input.
        dt: (n, l, d) positive time steps.
        a: (d, s) negative rates.
        b, c: (n, l, s) input and output projections of the state.
        d: (d,) weight of the skip connection from input to output.
        keep_every: interval of states that are saved for the backward pass, which recomputes the others.

    Returns:
        (n, l, d), with the dtype of ``x``.
    """
    with torch.autocast(x.device.type, enabled=False):
        out: Tensor = _SelectiveScan.apply(*_exact(x, dt, a, b, c, d), keep_every)
    return out.to(x.dtype)


def _exact(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Convert to at least float32, as the scan sums many small numbers."""
    return tuple(t if t.dtype == torch.float64 else t.float() for t in tensors)


class _SelectiveScan(torch.autograd.Function):
    """One loop over time forward and one backward, instead of a graph of thousands of small operations.

    Only what depends on the previous step is computed step by step, everything else at once for a segment that fits
    into the cache. Time is the first axis, and states are (t, n, s, d), so that each operation uses contiguous memory.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, keep_every: int) -> Tensor:
        at = a.t().contiguous()  # (s, d)
        x, dt, b, c = (t.transpose(0, 1).contiguous() for t in (x, dt, b, c))
        y = torch.empty_like(x)
        state = x.new_zeros(x.shape[1], *at.shape)
        kept = []
        room = [state.new_empty(keep_every, *state.shape) for _ in range(2)]
        for part in _segments(len(x), keep_every):
            kept.append(state)
            _, states = _states(state, x[part], dt[part], at, b[part], room)
            y[part] = (c[part, :, None] @ states)[:, :, 0]
            state = states[-1].clone()
        ctx.save_for_backward(x, dt, at, b, c, d, *kept)
        ctx.keep_every = keep_every
        return y.addcmul_(x, d).transpose(0, 1).contiguous()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, at, b, c, d, *kept = ctx.saved_tensors
        dy = dy.transpose(0, 1).contiguous()
        dx, ddt, db, dc = (torch.empty_like(t) for t in (x, dt, b, c))
        dat = torch.zeros_like(at)
        *room, more = [dat.new_empty(ctx.keep_every, *kept[0].shape) for _ in range(3)]
        later = torch.zeros_like(kept[0])  # gradient of a segment's last state through the next segment
        for part, before in reversed(list(zip(_segments(len(x), ctx.keep_every), kept, strict=True))):
            decay, states = _states(before, x[part], dt[part], at, b[part], room)
            dc[part] = (dy[part, :, None] @ states.mT)[:, :, 0]  # eight times as fast as states @ dy
            dstates = torch.mul(c[part, :, :, None], dy[part, :, None], out=more[: len(states)])
            dstates[-1] += later
            for i in reversed(range(len(dstates) - 1)):
                dstates[i].addcmul_(decay[i + 1], dstates[i + 1])
            into = dt[part] * x[part]
            db[part] = (into[:, :, None] @ dstates.mT)[:, :, 0]
            dinto = (b[part, :, None] @ dstates)[:, :, 0]
            dx[part] = dinto * dt[part]
            rate = dstates.mul_(decay)
            later = rate[0].clone()
            rate[1:] *= states[:-1]
            rate[0] *= before  # rate is now the gradient of dt a
            dat += torch.mul(rate, dt[part, :, None], out=states).sum((0, 1))
            ddt[part] = torch.addcmul(rate.mul_(at).sum(2), dinto, x[part])
        dd = (dy * x).sum((0, 1))
        dx.addcmul_(dy, d)
        dx, ddt, db, dc = (t.transpose(0, 1) for t in (dx, ddt, db, dc))
        return dx, ddt, dat.t(), db, dc, dd, None


def _segments(length: int, size: int) -> list[slice]:
    return [slice(first, min(first + size, length)) for first in range(0, length, size)]


def _states(state: Tensor, x: Tensor, dt: Tensor, at: Tensor, b: Tensor, room: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(t, n, s, d) twice, in ``room``: the decay of the state in each step, and the states after each step."""
    decay, states = (tensor[: len(x)] for tensor in room)
    torch.mul(dt[:, :, None], at, out=decay).exp_()
    torch.mul(b[..., None], (dt * x)[:, :, None], out=states)
    for i in range(len(states)):
        state = states[i].addcmul_(decay[i], state)
    return decay, states


# ---- Mamba-2


def ssd(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, chunk: int = 0) -> Tensor:
    """The scan of Mamba-2: a masked product like attention within chunks, and a recurrence of states between chunks.

    After Dao and Gu 2024, "Transformers are SSMs", section 6, with decays as sums of masked rates instead of
    differences of sums, which lose precision.

    Args:
        x: (n, l, h, p) input: heads of p channels.
        dt: (n, l, h) positive time steps.
        a: (h,) negative rates.
        b, c: (n, l, s), shared by all heads.
        d: (h,) weight of the skip connection from input to output.
        chunk: length of a chunk (0: chosen for speed); results are equal up to rounding.

    Returns:
        (n, l, h, p), with the dtype of ``x``.
    """
    kind = x.dtype
    x, dt, a, b, c, d = _exact(x, dt, a, b, c, d)
    with torch.autocast(x.device.type, enabled=False):
        return _ssd(x, dt, a, b, c, d, chunk or chunk_length(x.shape[1])).to(kind)


def chunk_length(length: int) -> int:
    """A chunk length that balances the work within chunks, which grows with their length, and between them. Chunks have
    about equal lengths, as the last one is padded."""
    chunks = math.ceil(length / (CHUNK // 2 if length > 2 * CHUNK else CHUNK))
    return math.ceil(length / max(1, chunks)) or 1


def _ssd(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, q: int) -> Tensor:
    n, length, h, p = x.shape
    s = b.shape[-1]
    pad = -length % q
    if pad:  # steps with dt = 0 have no effect
        x, dt, b, c = (F.pad(t, (0, 0) * (t.dim() - 2) + (0, pad)) for t in (x, dt, b, c))
    k = (length + pad) // q
    into = (x * dt[..., None]).view(n, k, q, h, p).permute(0, 1, 3, 2, 4)  # (n, k, h, q, p)
    rates = (dt * a).view(n, k, q, h).transpose(2, 3)  # (n, k, h, q)
    b, c = b.view(n, k, 1, q, s), c.view(n, k, 1, q, s)
    y = ((c @ b.transpose(-1, -2)) * _decays(rates)) @ into  # within chunks
    if k > 1:
        total = rates.cumsum(-1)
        until_end = torch.exp(rates.flip(-1).cumsum(-1).flip(-1) - rates)  # decay from step i to the chunk's end
        states = (b * until_end[..., None]).transpose(-1, -2) @ into  # (n, k, h, s, p): added by each chunk
        whole = torch.exp(total[..., -1])[..., None, None]
        state, before = torch.zeros_like(states[:, 0]), []
        for number in range(k):
            before.append(state)
            state = torch.addcmul(states[:, number], whole[:, number], state)
        y = y + (c * torch.exp(total)[..., None]) @ torch.stack(before, 1)
    y = y.permute(0, 1, 3, 2, 4).reshape(n, k * q, h, p)
    skip = d.expand(k * q, h)[..., None]  # the gradient of d is summed in two steps, as one would lose precision
    return (y + x * skip)[:, :length]


def _decays(rates: Tensor) -> Tensor:
    """(..., q) → (..., q, q): exp of the sum of rates j + 1 to i at [i, j], 0 above the diagonal."""
    q = rates.shape[-1]
    below = torch.ones(q, q, dtype=torch.bool, device=rates.device).tril(-1)
    sums = torch.where(below, rates[..., None], 0).cumsum(-2)
    return torch.where(below | torch.eye(q, dtype=torch.bool, device=rates.device), sums.exp(), 0)


# ---- mixers


class Mixer(nn.Module):
    """A sequence mixer; the implementation of its scan is chosen once, as torch.compile cannot trace the choice.

    Args:
        backend: a name in :data:`pipeline.models.scan_kernels.BACKENDS`.
        name: of the mixer, "mamba1" or "mamba2".
    """

    def __init__(self, backend: str, name: str) -> None:
        super().__init__()
        self.backend = backend_of(backend, torch.device("cuda" if torch.cuda.is_available() else "cpu"), name)

    def uses_kernel(self, x: Tensor) -> bool:
        """Whether ``x`` is processed by mamba_ssm's kernel."""
        return self.backend == "mamba_ssm" and x.is_cuda


class Mamba1(Mixer):
    """Sequence mixer of Mamba-1: causal depthwise convolution, selective scan, gate.

    Args:
        dim: width of the tokens.
        expand: inner width = expand * dim.
    """

    def __init__(self, dim: int, d_state: int = 16, d_conv: int = 4, expand: int = 2, backend: str = "auto") -> None:
        super().__init__(backend, "mamba1")
        self.inner, self.d_state = expand * dim, d_state
        self.rank = math.ceil(dim / 16)
        self.into = nn.Linear(dim, 2 * self.inner, bias=False)
        self.conv = CausalConv(self.inner, d_conv)
        self.select = nn.Linear(self.inner, self.rank + 2 * d_state, bias=False)
        self.step = nn.Linear(self.rank, self.inner)
        self.log_rate = nn.Parameter(torch.arange(1.0, d_state + 1).log().repeat(self.inner, 1))
        self.skip = nn.Parameter(torch.ones(self.inner))
        self.out = nn.Linear(self.inner, dim, bias=False)
        nn.init.uniform_(self.step.weight, -(self.rank**-0.5), self.rank**-0.5)
        with torch.no_grad():
            self.step.bias.copy_(_initial_steps(self.inner))

    def forward(self, tokens: Tensor) -> Tensor:
        """(b, l, dim) → (b, l, dim); token t sees tokens up to t."""
        x, gate = self.into(tokens).chunk(2, -1)
        x = F.silu(self.conv(x))
        step, b, c = self.select(x).split([self.rank, self.d_state, self.d_state], -1)
        dt = F.softplus(self.step(step).float())
        a = -self.log_rate.float().exp()
        if self.uses_kernel(x):
            y = scan("mamba1", x, dt, a, b, c, self.skip)
        else:
            y = selective_scan(x, dt, a, b, c, self.skip)
        out: Tensor = self.out(y * F.silu(gate))
        return out


class Mamba2(Mixer):
    """Sequence mixer of Mamba-2: causal depthwise convolution, SSD, gated norm.

    Args:
        dim: width of the tokens.
        expand: inner width = expand * dim, in heads of at most ``head_dim``.
    """

    def __init__(
        self,
        dim: int,
        d_state: int = 64,
        d_conv: int = 4,
        expand: int = 2,
        head_dim: int = 64,
        backend: str = "auto",
        chunk: int = 0,
    ) -> None:
        super().__init__(backend, "mamba2")
        self.inner, self.d_state, self.chunk = expand * dim, d_state, chunk
        self.heads = max(1, self.inner // head_dim)
        if self.inner % self.heads:
            raise ConfigError(f"a width of {self.inner} does not divide into heads of {head_dim}")
        self.into = nn.Linear(dim, 2 * self.inner + 2 * d_state + self.heads, bias=False)
        self.conv = CausalConv(self.inner + 2 * d_state, d_conv)
        self.step_bias = nn.Parameter(_initial_steps(self.heads))
        self.log_rate = nn.Parameter(torch.empty(self.heads).uniform_(1, 16).log())
        self.skip = nn.Parameter(torch.ones(self.heads))
        self.norm = nn.RMSNorm(self.inner, eps=1e-5)
        self.out = nn.Linear(self.inner, dim, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """(b, l, dim) → (b, l, dim); token t sees tokens up to t."""
        gate, xbc, step = self.projected(tokens)
        return self.scanned(gate, *self.mixed(xbc, step))

    def projected(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(..., dim) → gate (..., inner), input of the convolution (..., inner + 2 d_state), steps (..., h)."""
        gate, xbc, step = self.into(tokens).split([self.inner, self.inner + 2 * self.d_state, self.heads], -1)
        return gate, xbc, step

    def mixed(self, xbc: Tensor, step: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Inputs of the scan: x (b, l, h, p), dt (b, l, h), and projections of the state b, c (b, l, s)."""
        return self.parts(F.silu(self.conv(xbc)), step)

    def parts(self, xbc: Tensor, step: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Like :meth:`mixed`, from the output of the convolution."""
        x, b, c = xbc.split([self.inner, self.d_state, self.d_state], -1)
        return x.unflatten(-1, (self.heads, -1)), F.softplus(step.float() + self.step_bias), b, c

    @property
    def rates(self) -> Tensor:
        """Negative rates (h,)."""
        return -self.log_rate.float().exp()

    def scanned(self, gate: Tensor, x: Tensor, dt: Tensor, b: Tensor, c: Tensor) -> Tensor:
        """The mixer's output after the scan, (b, l, dim)."""
        if self.uses_kernel(x):
            y = scan("mamba2", x, dt, self.rates, b, c, self.skip)
        else:
            y = ssd(x, dt, self.rates, b, c, self.skip, self.chunk)
        return self.gated(y.flatten(2), gate)

    def gated(self, y: Tensor, gate: Tensor) -> Tensor:
        """y and gate (..., inner) → (..., dim)."""
        out: Tensor = self.out(self.norm(y * F.silu(gate)))
        return out


class CausalConv(nn.Module):
    """Causal depthwise convolution: token t depends on tokens t - width + 1 to t."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, width).uniform_(-(width**-0.5), width**-0.5))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(b, l, channels) → the same shape, as shifted sums: on CPUs faster than a convolution with few taps."""
        width, length = self.weight.shape[1], x.shape[1]
        padded = F.pad(x, (0, 0, width - 1, 0))
        y = self.bias.to(x.dtype).expand_as(x)
        for tap in range(width):
            y = torch.addcmul(y, padded[:, tap : tap + length], self.weight[:, tap].to(x.dtype))
        return y


def _initial_steps(count: int, low: float = 1e-3, high: float = 0.1) -> Tensor:
    """(count,) numbers whose softplus is log-uniform between ``low`` and ``high``, as in Mamba's reference."""
    dt = torch.exp(torch.rand(count) * (math.log(high) - math.log(low)) + math.log(low))
    return dt + torch.log(-torch.expm1(-dt))


class Bidirectional(nn.Module):
    """Two mixers, one in each direction along the sequence, averaged: (forward + flipped backward) / 2.

    Args:
        mixer: "mamba2" or "mamba1", with its ``options``.
        directions: 1: without the backward mixer, so that the result is causal.
    """

    def __init__(self, mixer: str, dim: int, directions: int = 2, **options: Any) -> None:
        super().__init__()
        self.scans = nn.ModuleList(MIXERS[mixer](dim, **options) for _ in range(directions))

    def forward(self, tokens: Tensor) -> Tensor:
        """(b, l, dim) → (b, l, dim)."""
        out: Tensor = self.scans[0](tokens)
        if len(self.scans) > 1:
            out = (out + self.scans[1](tokens.flip(1)).flip(1)) / 2
        return out


MIXERS: dict[str, type[nn.Module]] = {"mamba2": Mamba2, "mamba1": Mamba1}
