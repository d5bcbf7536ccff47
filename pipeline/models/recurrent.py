"""Mamba-2 mixers as decoders: what was read is kept in a state of fixed size, and each token costs the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.decoding_cache import Cache
from pipeline.models.packed_linear import Packed, packed
from pipeline.models.ssm import Mamba2

if TYPE_CHECKING:
    from pipeline.models.captioner import Captioner, CaptionerConfig


class MambaBlock(nn.Module):
    """x + mixer(norm(x)); the mixer widens, gates and narrows, so there is no MLP next to it (Gu and Dao 2023)."""

    def __init__(self, config: CaptionerConfig) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(config.dim, eps=1e-5)
        self.mixer = Mamba2(config.dim, d_state=config.d_state)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(b, l, dim) → (b, l, dim)."""
        out: Tensor = x + self.drop(self.mixer(self.norm(x)))
        return out

    def read(self, x: Tensor) -> tuple[Callable[[], Tensor], Memory]:
        """What is left in memory of (b, l, dim), and :meth:`forward`'s result when it is called for."""
        mixer = self.mixer
        gate, xbc, step = mixer.projected(self.norm(x))
        inputs = mixer.mixed(xbc, step)
        memory = Memory(_window(xbc, mixer), _state(mixer.rates, *inputs[:3]))
        return (lambda: x + self.drop(mixer.scanned(gate, *inputs))), memory

    def advance(self, x: Tensor, memory: Memory) -> Tensor:
        """One token (n, dim) → (n, dim); ``memory`` takes it in."""
        mixer = self.mixer
        gate, xbc, step = mixer.projected(self.norm(x))
        window = torch.cat([memory.window, xbc[:, None]], 1)
        mixed = F.silu((window * mixer.conv.weight.t()).sum(1) + mixer.conv.bias)
        into, dt, b, c = mixer.parts(mixed, step)
        memory.window = window[:, 1:]
        with torch.autocast(x.device.type, enabled=False):  # states are float32
            into, b, c = into.float(), b.float(), c.float()
            memory.state.mul_(torch.exp(dt * mixer.rates)[:, None, :, None])
            memory.state.addcmul_(b[:, :, None, None], (into * dt[..., None])[:, None])
            y = torch.bmm(c[:, None], memory.state.flatten(2)).view_as(into) + into * mixer.skip[:, None]
        return x + mixer.gated(y.flatten(1), gate)


@dataclass
class Memory:
    """Of a mixer, after a token: the last inputs of its convolution (n, width - 1, channels), and its state
    (n, s, h, p)."""

    window: Tensor
    state: Tensor

    def select(self, index: Tensor) -> Memory:
        return Memory(self.window[index], self.state[index])

    def repeat(self, group: int) -> Memory:
        return Memory(self.window.repeat_interleave(group, 0), self.state.repeat_interleave(group, 0))


def _window(xbc: Tensor, mixer: Mamba2) -> Tensor:
    before = mixer.conv.weight.shape[1] - 1
    return F.pad(xbc, (0, 0, before, 0))[:, xbc.shape[1] :]


def _state(rates: Tensor, x: Tensor, dt: Tensor, b: Tensor) -> Tensor:
    """(n, s, h, p): what each token put into the state, less what has decayed since."""
    with torch.autocast(x.device.type, enabled=False):
        steps = dt * rates
        left = torch.exp(steps.flip(1).cumsum(1).flip(1) - steps)  # of what entered at each token
        into = x.float() * (dt * left)[..., None]
        found: Tensor = (b.float().mT @ into.flatten(2)).unflatten(-1, x.shape[2:])
        return found


class RecurrentCache(Cache):
    """Reads each image once, whatever the number of texts about it."""

    def __init__(self, model: Captioner, features: Tensor, group: int) -> None:
        self.model = model
        self.memories: list[Memory] = []
        x = model.look(features)
        for number, block in enumerate(model.blocks, 1):
            result, memory = block.read(x)
            self.memories.append(memory if group == 1 else memory.repeat(group))
            if number < len(model.blocks):  # nobody looks at what the last one says of the image
                x = result()
        rows = len(features) * group
        self.blocks = [packed(block, rows) for block in model.blocks]
        self.head = Packed(model.embed.weight, None, rows)

    def step(self, tokens: Tensor) -> Tensor:
        for token in tokens.unbind(1):
            x = self.model.embedded(token[:, None], 0)[:, 0]
            for block, memory in zip(self.blocks, self.memories, strict=True):
                x = block.advance(x, memory)
        found: Tensor = self.head(self.model.norm(x))
        return found

    def reorder(self, index: Tensor) -> None:
        self.memories = [memory.select(index) for memory in self.memories]
