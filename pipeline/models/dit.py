"""A small text-conditioned diffusion transformer, after Peebles and Xie, "Scalable diffusion models with transformers".

Besides attention, each block has a depthwise 3x3 convolution over the grid of tokens: with few tokens and little
training, neighbourhood is worth being told. The text conditions every block through adaptive layer norms.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.cli import nearest
from pipeline.config import ConfigError


@dataclass(frozen=True)
class DiTConfig:
    """Everything that is needed to build the network again; a checkpoint holds it.

    ``channels``, ``height``, ``width``: of the image latents. ``text_length``, ``text_width``: of the text states.
    """

    channels: int
    height: int
    width: int
    text_length: int
    text_width: int
    dim: int = 128
    depth: int = 4
    heads: int = 4
    patch: int = 2
    mlp_ratio: float = 4.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


SIZES: dict[str, dict[str, int]] = {
    "nano": {"dim": 128, "depth": 4, "heads": 4},
    "tiny": {"dim": 256, "depth": 8, "heads": 4},
    "small": {"dim": 384, "depth": 12, "heads": 6},
    "base": {"dim": 768, "depth": 12, "heads": 12},
}


def dit_config(size: str, image_shape: tuple[int, int, int], caption_shape: tuple[int, int]) -> DiTConfig:
    """The network called ``size`` for latents of these shapes.

    Raises:
        ConfigError: no such size, or latents that its patches do not cover.
    """
    if size not in SIZES:
        raise ConfigError(f"model={size}: {nearest(size, SIZES)}")
    config = DiTConfig(*image_shape, *caption_shape, **SIZES[size])
    if config.height % config.patch or config.width % config.patch:
        raise ConfigError(
            f"model={size}: latents of {config.height} x {config.width} do not divide into patches of {config.patch}"
        )
    return config


class DiT(nn.Module):
    """Predicts the velocity of flow matching."""

    config: DiTConfig

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        dim, patch = config.dim, config.patch
        self.grid = (config.height // patch, config.width // patch)
        self.patches = nn.Linear(config.channels * patch * patch, dim)
        self.register_buffer("positions", _grid_positions(*self.grid, dim), persistent=False)
        self.text = TextCondition(config.text_length, config.text_width, dim)
        self.time = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.blocks = nn.ModuleList(Block(dim, config.heads, config.mlp_ratio, self.grid) for _ in range(config.depth))
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, config.channels * patch * patch)
        for last in (self.modulation, self.out):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, x: Tensor, t: Tensor, text: Tensor, drop: Tensor | None = None) -> Tensor:
        """One evaluation.

        Args:
            x: (b, c, h, w) noisy latents.
            t: (b,) time in [0, 1].
            text: (b, l, d) text states.
            drop: (b,) bool, True where the text is to be ignored; None means nowhere.

        Returns:
            (b, c, h, w) velocity.
        """
        condition = F.silu(self.time(time_embedding(t, self.config.dim)) + self.text(text, drop))
        tokens = self.patches(patchify(x, self.config.patch)) + self.positions
        for block in self.blocks:
            tokens = block(tokens, condition)
        shift, scale = self.modulation(condition).unsqueeze(1).chunk(2, dim=-1)
        return unpatchify(self.out(self.norm(tokens) * (1 + scale) + shift), self.config.patch, self.grid)


class Block(nn.Module):
    """Attention and depthwise convolution, then an MLP; residual, modulated by the condition, gated from zero."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, grid: tuple[int, int]) -> None:
        super().__init__()
        self.heads = heads
        self.grid = grid
        hidden = int(dim * mlp_ratio)
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.project = nn.Linear(dim, dim)
        self.local = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.expand = nn.Linear(dim, hidden)
        self.contract = nn.Linear(hidden, dim)
        self.modulation = nn.Linear(dim, 6 * dim)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        """tokens (b, n, dim), condition (b, dim) → (b, n, dim)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).unsqueeze(1).chunk(6, dim=-1)
        inner = self.norm1(tokens) * (1 + scale1) + shift1
        tokens = tokens + gate1 * (self.attend(inner) + self.convolve(inner))
        inner = self.norm2(tokens) * (1 + scale2) + shift2
        return tokens + gate2 * self.contract(F.gelu(self.expand(inner), approximate="tanh"))

    def attend(self, tokens: Tensor) -> Tensor:
        b, n, dim = tokens.shape
        q, k, v = self.qkv(tokens).view(b, n, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.project(attended.transpose(1, 2).reshape(b, n, dim))
        return out

    def convolve(self, tokens: Tensor) -> Tensor:
        b, _, dim = tokens.shape
        grid = tokens.transpose(1, 2).reshape(b, dim, *self.grid)
        return self.local(grid).flatten(2).transpose(1, 2)


class TextCondition(nn.Module):
    """All text states → one vector: each is projected, they are laid side by side, and an MLP reads them.

    Side by side, not averaged: which word stands where is what tells "a red circle above a blue square" from its
    opposite. A learned vector takes the place of a dropped text.
    """

    def __init__(self, length: int, width: int, dim: int, narrow: int = 64) -> None:
        super().__init__()
        self.project = nn.Linear(width, narrow)
        self.mlp = nn.Sequential(nn.Linear(length * narrow, 2 * dim), nn.SiLU(), nn.Linear(2 * dim, dim))
        self.nothing = nn.Parameter(torch.zeros(dim))

    def forward(self, text: Tensor, drop: Tensor | None = None) -> Tensor:
        """text (b, l, d), drop (b,) bool or None → (b, dim)."""
        vector: Tensor = self.mlp(self.project(text).flatten(1))
        return vector if drop is None else torch.where(drop[:, None], self.nothing, vector)


def patchify(x: Tensor, patch: int) -> Tensor:
    """(b, c, h, w) → (b, h/p * w/p, c * p * p)."""
    b, c, h, w = x.shape
    grid = x.view(b, c, h // patch, patch, w // patch, patch).permute(0, 2, 4, 1, 3, 5)
    return grid.reshape(b, (h // patch) * (w // patch), c * patch * patch)


def unpatchify(tokens: Tensor, patch: int, grid: tuple[int, int]) -> Tensor:
    """(b, n, c * p * p) → (b, c, h, w); the inverse of :func:`patchify`."""
    b, _, features = tokens.shape
    cells = tokens.view(b, *grid, features // (patch * patch), patch, patch).permute(0, 3, 1, 4, 2, 5)
    return cells.reshape(b, features // (patch * patch), grid[0] * patch, grid[1] * patch)


def time_embedding(t: Tensor, dim: int) -> Tensor:
    """(b,) in [0, 1] → (b, dim): cosines and sines of 1000 t (Ho et al. 2020)."""
    half = dim // 2
    frequencies = torch.exp(-math.log(10000.0) / half * torch.arange(half, device=t.device, dtype=torch.float32))
    angles = 1000.0 * t.float()[:, None] * frequencies[None, :]
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=1)


def _grid_positions(height: int, width: int, dim: int) -> Tensor:
    """(height * width, dim): half of the features tell the row, half the column, by sinusoids."""
    quarter = dim // 4
    frequencies = 100.0 ** (-torch.arange(quarter) / quarter)
    rows, columns = (torch.arange(n)[:, None] * frequencies for n in (height, width))
    row = torch.cat([rows.sin(), rows.cos()], 1)[:, None].expand(height, width, -1)
    column = torch.cat([columns.sin(), columns.cos()], 1)[None].expand(height, width, -1)
    return torch.cat([row, column], -1).reshape(height * width, -1)
