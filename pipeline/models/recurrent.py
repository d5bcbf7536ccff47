"""Mamba-2 mixers as decoders: what was read is kept in a state of fixed size, and each token costs the same."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.captioner import Cache, Captioner, CaptionerConfig
from pipeline.models.ssm import Mamba2


class MambaBlock(nn.Module):
    """x + mixer(norm(x)); the mixer widens, gates and narrows, so there is no MLP beside it (Gu and Dao 2023)."""

    def __init__(self, config: CaptionerConfig) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(config.dim, eps=1e-5)
        self.mixer = Mamba2(config.dim, d_state=config.d_state)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(b, l, dim) → (b, l, dim)."""
        out: Tensor = x + self.drop(self.mixer(self.norm(x)))
        return out

    def read(self, x: Tensor) -> tuple[Tensor, Memory]:
        """:meth:`forward`, and what it leaves in memory."""
        return self(x), remembered(self.mixer, self.norm(x))

    def advance(self, x: Tensor, memory: Memory) -> Tensor:
        """One token (n, dim) → (n, dim); ``memory`` takes it in."""
        return x + advance(self.mixer, self.norm(x), memory)


@dataclass
class Memory:
    """Of a mixer, after a token: the last inputs of its convolution (n, width - 1, channels), and its state
    (n, h, s, p)."""

    window: Tensor
    state: Tensor

    def select(self, index: Tensor) -> Memory:
        return Memory(self.window[index], self.state[index])


def remembered(mixer: Mamba2, tokens: Tensor) -> Memory:
    """The memory after ``tokens`` (n, l, dim): what each put into the state, less what has decayed since."""
    _, xbc, step = _projected(mixer, tokens)
    x, b, _ = F.silu(mixer.conv(xbc)).split([mixer.inner, mixer.d_state, mixer.d_state], -1)
    dt = F.softplus(step.float() + mixer.step_bias)
    rates = dt * -mixer.log_rate.float().exp()
    left = torch.exp(rates.flip(1).cumsum(1).flip(1) - rates)  # of what entered at each token
    into = x.unflatten(-1, (mixer.heads, -1)) * (dt * left)[..., None]
    state = torch.einsum("nls,nlhp->nhsp", b.float(), into.float())
    width = mixer.conv.weight.shape[1]
    return Memory(F.pad(xbc, (0, 0, width - 1, 0))[:, xbc.shape[1] :], state)


def advance(mixer: Mamba2, token: Tensor, memory: Memory) -> Tensor:
    """One token (n, dim) → (n, dim), as the mixer gives it at that place; ``memory`` takes it in."""
    gate, xbc, step = _projected(mixer, token)
    window = torch.cat([memory.window, xbc[:, None]], 1)
    mixed = F.silu((window * mixer.conv.weight.t()).sum(1) + mixer.conv.bias)
    x, b, c = mixed.split([mixer.inner, mixer.d_state, mixer.d_state], -1)
    x = x.unflatten(-1, (mixer.heads, -1))
    dt = F.softplus(step.float() + mixer.step_bias)
    decay = torch.exp(dt * -mixer.log_rate.float().exp())
    memory.window = window[:, 1:]
    memory.state = memory.state * decay[..., None, None] + b[:, None, :, None] * (x * dt[..., None])[:, :, None]
    y = (c[:, None, None] @ memory.state)[:, :, 0] + x * mixer.skip[:, None]
    out: Tensor = mixer.out(mixer.norm(y.flatten(1) * F.silu(gate)))
    return out


def _projected(mixer: Mamba2, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gate, input of the convolution, and time steps."""
    return mixer.into(tokens).split([mixer.inner, mixer.inner + 2 * mixer.d_state, mixer.heads], -1)


class RecurrentCache(Cache):
    """Reads the picture once, at the first step together with the beginning of the texts."""

    def __init__(self, model: Captioner, features: Tensor, group: int) -> None:
        self.model = model
        self.image = model.look(features).repeat_interleave(group, 0)
        self.memories: list[Memory] = []

    def step(self, tokens: Tensor) -> Tensor:
        if not self.memories:
            x = torch.cat([self.image, self.model.embedded(tokens, 0)], 1)
            for block in self.model.blocks:
                x, memory = block.read(x)
                self.memories.append(memory)
            return self.model.logits(x[:, -1])
        for token in tokens.unbind(1):
            x = self.model.embedded(token[:, None], 0)[:, 0]
            for block, memory in zip(self.model.blocks, self.memories, strict=True):
                x = block.advance(x, memory)
        return self.model.logits(x)

    def reorder(self, index: Tensor) -> None:
        self.memories = [memory.select(index) for memory in self.memories]
