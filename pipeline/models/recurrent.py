"""Mamba-2 mixers as decoders: a state of fixed size holds the context, and each token has the same cost."""

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
    """x + mixer(norm(x)), without an MLP, as the mixer itself widens, gates and narrows (Gu and Dao 2023)."""

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
        """The memory after reading (b, l, dim), and a function that computes :meth:`forward`'s result on demand."""
        mixer = self.mixer
        gate, xbc, step = mixer.projected(self.norm(x))
        inputs = mixer.mixed(xbc, step)
        memory = Memory(_window(xbc, mixer), _state(mixer.rates, *inputs[:3]))
        return (lambda: x + self.drop(mixer.scanned(gate, *inputs))), memory

    def advance(self, x: Tensor, memory: Memory) -> Tensor:
        """Process one token, (n, dim) → (n, dim), and update ``memory``."""
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
    """A mixer's state after a token: the last inputs of its convolution (n, width - 1, channels), and the scan's state
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
    """Final state (n, s, h, p): the decayed sum of what each token added."""
    with torch.autocast(x.device.type, enabled=False):
        steps = dt * rates
        left = torch.exp(steps.flip(1).cumsum(1).flip(1) - steps)  # decay from each token to the end
        into = x.float() * (dt * left)[..., None]
        found: Tensor = (b.float().mT @ into.flatten(2)).unflatten(-1, x.shape[2:])
        return found


class RecurrentCache(Cache):
    """Reads each image once, regardless of the number of texts."""

    def __init__(self, model: Captioner, features: Tensor, group: int) -> None:
        self.model = model
        self.memories: list[Memory] = []
        x = model.look(features)
        for number, block in enumerate(model.blocks, 1):
            result, memory = block.read(x)
            self.memories.append(memory if group == 1 else memory.repeat(group))
            if number < len(model.blocks):  # the last block's output for the image is not used
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
