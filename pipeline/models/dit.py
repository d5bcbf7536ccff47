"""Text-conditioned diffusion transformers, from a CPU demo to micro-budget training with 1.16 billion parameters.

After Peebles and Xie, "Scalable diffusion models with transformers", and Sehwag et al., "Stretching each dollar:
diffusion training from scratch on a micro-budget" (2024). Options:

- *Deferred masking*: a light patch mixer sees all tokens, then the backbone processes a random subset of them. As each
  remaining token has already seen its neighbours, little is lost.
- *Layer-wise scaling*: attention and MLPs widen from the first block of the backbone to the last.
- *Scans*: some blocks use Mamba-2 in both directions along the tokens instead of attention.
- *Experts* in every second block: each expert chooses its tokens, so that all experts have the same load.
- A depthwise 3x3 convolution over the token grid, parallel to attention: with few tokens and little training, it helps
  to have locality built in.
- The text as one vector (all states concatenated), or also attended to in every block.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config.cli import nearest
from pipeline.config.schema import ConfigError
from pipeline.models.ssm import Bidirectional


@dataclass(frozen=True)
class DiTConfig:
    """Everything that is needed to rebuild the network; stored in checkpoints.

    Attributes:
        channels, height, width: of the image latents.
        text_length, text_width: of the text states.
        dim, depth, heads: of the backbone; all blocks have the same head width.
        patch: edge in latents of the patches that become tokens.
        mlp_ratio, qkv_ratio: widths of the last block's MLP and attention, in units of ``dim``.
        first_mlp_ratio, first_qkv_ratio: those of the first block, interpolated linearly in between (0: as the last).
        mixer_dim, mixer_depth: width and number of blocks that see all tokens before masking.
        attention_every: one in this many blocks of the backbone uses attention, the others scan (1: all use attention).
        experts, capacity: number of MLPs in every second block, and mean number of them per token (0: no experts).
        text: ``vector``: all states are combined into one vector; ``attention``: they are also attended to.
        local: whether blocks have a convolution.
        qk_norm, gated, bias: whether queries and keys are normalised, MLPs gated (SwiGLU), and linear layers biased.
        round_to: MLP widths are rounded up to a multiple of this.
        base: positions are scaled to a grid with this many rows, regardless of the resolution (0: not scaled).
        size_condition: whether the network is conditioned on the original size and the crop of an image.
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
    qkv_ratio: float = 1.0
    first_mlp_ratio: float = 0.0
    first_qkv_ratio: float = 0.0
    mixer_dim: int = 0
    mixer_depth: int = 0
    attention_every: int = 1
    experts: int = 0
    capacity: float = 2.0
    text: str = "vector"
    local: bool = True
    qk_norm: bool = False
    gated: bool = False
    bias: bool = True
    round_to: int = 1
    base: int = 0
    size_condition: bool = False

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return self.height // self.patch, self.width // self.patch

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


_MICRO: dict[str, Any] = {
    "first_mlp_ratio": 0.5,
    "first_qkv_ratio": 0.5,
    "experts": 8,
    "text": "attention",
    "local": False,
    "qk_norm": True,
    "gated": True,
    "bias": False,
    "round_to": 256,
    "base": 16,
}
SIZES: dict[str, dict[str, Any]] = {
    "nano": {"dim": 128, "depth": 4, "heads": 4},
    "nano_mixer": {"dim": 128, "depth": 3, "heads": 4, "mixer_dim": 128, "mixer_depth": 1},
    "nano_ssm": {"dim": 128, "depth": 4, "heads": 4, "attention_every": 2},
    "mini": {"dim": 192, "depth": 6, "heads": 6, "qk_norm": True},
    "tiny": {"dim": 256, "depth": 8, "heads": 4},
    "small": {"dim": 384, "depth": 12, "heads": 6},
    "base": {"dim": 768, "depth": 12, "heads": 12},
    "base_ssm": {"dim": 768, "depth": 12, "heads": 12, "attention_every": 4},
    "MicroDiT_Tiny_2": {"dim": 512, "depth": 16, "heads": 16, "mixer_dim": 512, "mixer_depth": 4, **_MICRO},
    "MicroDiT_XL_2": {"dim": 1024, "depth": 28, "heads": 16, "mixer_dim": 768, "mixer_depth": 6, **_MICRO},
}


def dit_config(size: str, image_shape: tuple[int, int, int], caption_shape: tuple[int, int]) -> DiTConfig:
    """Configuration of the network ``size`` for latents and text states of these shapes.

    Raises:
        ConfigError: there is no such size, or its patches do not divide the latents.
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
    """A diffusion transformer; its output is as defined by the process, see :mod:`pipeline.models.diffusion_process`.

    Height and width of the latents may differ between batches. Positions are centred on the middle of the configured
    grid, so that the centre of an image has the same position whatever its shape.
    """

    config: DiTConfig

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        dim, features = config.dim, config.channels * config.patch**2
        self.patches = nn.Linear(features, dim)
        self.register_buffer(
            "positions", _grid_positions(config.grid[0], config.grid[1], dim, config.base), persistent=False
        )
        self.attends = config.text == "attention"
        self.text: TextCondition | TextAttention
        if self.attends:
            self.text = TextAttention(config)
        else:
            self.text = TextCondition(config.text_length, config.text_width, dim)
        self.time = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.mixer = Mixer(config) if config.mixer_depth else None
        self.blocks = nn.ModuleList(_backbone_block(config, number) for number in range(config.depth))
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, features)
        for last in (self.modulation, self.out):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        self.sizes = SizeCondition(dim) if config.size_condition else None
        self._positions: dict[tuple[int, int], Tensor] = {}

    def positions_of(self, grid: tuple[int, int]) -> Tensor:
        """Positions of the tokens in a grid of (rows, columns): (rows * columns, dim)."""
        own: Tensor = self.positions  # type: ignore[assignment]
        if grid == self.config.grid:
            return own
        if grid not in self._positions or self._positions[grid].device != own.device:
            made = _grid_positions(*grid, self.config.dim, self.config.base, self.config.grid)
            self._positions[grid] = made.to(own)
        return self._positions[grid]

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        text: Tensor,
        drop: Tensor | None = None,
        keep: Tensor | None = None,
        sizes: Tensor | None = None,
    ) -> Tensor:
        """Evaluate the network.

        Args:
            x: (b, c, h, w) noisy latents; h and w are multiples of the patch.
            t: (b,) time, of the order of 1.
            text: (b, l, d) text states.
            drop: (b,) bool, True where the text is ignored; None: nowhere.
            keep: (b, m) int64, indices (row by row) of the tokens that pass through the backbone; None: all.
            sizes: (b, 6) or (1, 6), with ``size_condition``: see :class:`SizeCondition`.

        Returns:
            (b, c, h, w), or with ``keep`` only these tokens, (b, m, c * p * p), as from :func:`patchify`.
        """
        condition = self.time(time_embedding(t, self.config.dim).to(x.dtype))
        states: Tensor | None = None
        if self.attends:
            vector, states = self.text(text, drop)
        else:
            vector = self.text(text, drop)
        if self.sizes is not None:
            if sizes is None:
                raise ValueError("this network was trained with size_condition=true: it needs sizes")
            condition = condition + self.sizes(sizes).to(condition.dtype)
        condition = F.silu(condition + vector)
        grid = (x.shape[2] // self.config.patch, x.shape[3] // self.config.patch)
        tokens = self.patches(patchify(x, self.config.patch)) + self.positions_of(grid)
        if self.mixer is not None:
            tokens = self.mixer(tokens, condition, states, grid)
        if keep is not None:
            tokens = take(tokens, keep)
        for block in self.blocks:
            tokens = block(tokens, condition, states, keep, grid)
        shift, scale = self.modulation(condition).unsqueeze(1).chunk(2, dim=-1)
        out: Tensor = self.out(torch.addcmul(shift, self.norm(tokens), 1 + scale))
        return out if keep is not None else unpatchify(out, self.config.patch, grid)


class SizeCondition(nn.Module):
    """Conditions on an image's size, as SDXL (Podell et al. 2023, section 2.2), by six numbers in pixels: height and
    width of the original, top and left of the crop after resizing, height and width of the crop. Initially zero."""

    def __init__(self, dim: int, width: int = 64) -> None:
        super().__init__()
        self.width = width
        self.mlp = nn.Sequential(nn.Linear(6 * width, dim), nn.SiLU(), nn.Linear(dim, dim))
        nn.init.zeros_(self.mlp[2].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.mlp[2].bias)  # type: ignore[arg-type]

    def forward(self, sizes: Tensor) -> Tensor:
        """(b, 6) → (b, dim)."""
        told = time_embedding(sizes.float().flatten() / 1000, self.width).view(len(sizes), -1)
        out: Tensor = self.mlp(told)
        return out


class Mixer(nn.Module):
    """A few blocks with their own width that see all tokens."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        dim, width = config.dim, config.mixer_dim
        self.narrow = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, width))
        self.narrow_text = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, width)) if config.text != "vector" else None
        self.blocks = nn.ModuleList(
            Block(config, width, 1.0, 4.0, experts=number % 2 == 1) for number in range(config.mixer_depth)
        )
        self.widen = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, dim))

    def forward(self, tokens: Tensor, condition: Tensor, text: Tensor | None, grid: tuple[int, int]) -> Tensor:
        """tokens (b, n, dim), condition (b, dim), text (b, l, dim) or None, rows and columns → (b, n, dim)."""
        tokens = self.narrow(tokens)
        if self.narrow_text is not None:
            text = self.narrow_text(text)
        for block in self.blocks:
            tokens = block(tokens, condition, text, None, grid)
        widened: Tensor = self.widen(tokens)
        return widened


def _backbone_block(config: DiTConfig, number: int) -> Block:
    """A block of the backbone: wider from first to last; every second one has experts, but not the last."""
    along = number / max(1, config.depth - 1)
    qkv, mlp = (
        (first or last) + along * (last - (first or last))
        for first, last in ((config.first_qkv_ratio, config.qkv_ratio), (config.first_mlp_ratio, config.mlp_ratio))
    )
    experts = number % 2 == 1 and number < config.depth - 1
    return Block(config, config.dim, qkv, mlp, experts, scans=(number + 1) % config.attention_every > 0)


class Block(nn.Module):
    """Attention or scan (optionally convolution, and attention to the text), then an MLP; residual and modulated.

    Initially the identity.
    """

    def __init__(
        self, config: DiTConfig, dim: int, qkv_ratio: float, mlp_ratio: float, experts: bool, scans: bool = False
    ) -> None:
        super().__init__()
        head = config.dim // config.heads
        width = dim if qkv_ratio == 1 else _round_up(int(dim * qkv_ratio), 2 * head)
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.scan: nn.Module = Bidirectional("mamba2", dim, expand=1) if scans else nn.Identity()
        self.attention = None if scans else Attention(dim, width, head, qk_norm=config.qk_norm, bias=config.bias)
        self.local = nn.Conv2d(dim, dim, 3, padding=1, groups=dim) if config.local else None
        self.norm_text: nn.Module | None = None
        self.text: Attention | None = None
        if config.text == "attention":
            self.norm_text = nn.LayerNorm(dim, eps=1e-6)
            self.text = Attention(dim, dim, head, qk_norm=config.qk_norm, bias=config.bias)
            nn.init.zeros_(self.text.project.weight)
        hidden = int(dim * mlp_ratio)
        self.mlp: Mlp | Experts
        if experts and config.experts:
            self.mlp = Experts(dim, _round_up(hidden, config.round_to), config.experts, config.capacity)
        else:
            self.mlp = Mlp(dim, hidden, gated=config.gated, bias=config.bias, round_to=config.round_to)
        self.modulation = nn.Linear(config.dim, 6 * dim)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(
        self, tokens: Tensor, condition: Tensor, text: Tensor | None, keep: Tensor | None, grid: tuple[int, int]
    ) -> Tensor:
        """tokens (b, n, dim), condition (b, d), text (b, l, dim) or None, keep (b, n) or None → (b, n, dim).

        ``grid``: rows and columns of all tokens, kept or not.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).unsqueeze(1).chunk(6, dim=-1)
        inner = torch.addcmul(shift1, self.norm1(tokens), 1 + scale1)
        attended: Tensor = self.scan(inner) if self.attention is None else self.attention(inner, inner)
        if self.local is not None:
            attended = attended + self.convolve(inner, keep, grid)
        tokens = torch.addcmul(tokens, gate1, attended)
        if self.text is not None and self.norm_text is not None:
            tokens = tokens + self.text(self.norm_text(tokens), text)
        inner = torch.addcmul(shift2, self.norm2(tokens), 1 + scale2)
        return torch.addcmul(tokens, gate2, self.mlp(inner))

    def convolve(self, tokens: Tensor, keep: Tensor | None, grid: tuple[int, int]) -> Tensor:
        """(b, n, dim) → (b, n, dim); tokens that are not kept are treated as zeros."""
        assert self.local is not None
        b, _, dim = tokens.shape
        if keep is not None:
            places = keep[:, :, None].expand(-1, -1, dim)
            tokens = tokens.new_zeros(b, grid[0] * grid[1], dim).scatter(1, places, tokens)
        laid = tokens.view(b, *grid, dim).permute(0, 3, 1, 2)  # already in channels-last layout: no copy
        whole = self.local(laid).permute(0, 2, 3, 1).flatten(1, 2)
        return whole if keep is None else take(whole, keep)


class Attention(nn.Module):
    """Multi-head attention; ``qk_norm`` normalises queries and keys in each head (Dehghani et al. 2023)."""

    def __init__(self, dim: int, width: int, head: int, *, qk_norm: bool, bias: bool) -> None:
        super().__init__()
        if width % head:
            raise ConfigError(f"attention of width {width} does not divide into heads of {head}")
        self.head, self.width = head, width
        self.query = nn.Linear(dim, width, bias=bias)
        self.key_value = nn.Linear(dim, 2 * width, bias=bias)
        self.project = nn.Linear(width, dim, bias=bias)
        self.query_norm = nn.RMSNorm(head, eps=1e-6) if qk_norm else nn.Identity()
        self.key_norm = nn.RMSNorm(head, eps=1e-6) if qk_norm else nn.Identity()

    def forward(self, tokens: Tensor, others: Tensor) -> Tensor:
        """Attend from tokens (b, n, dim) to others (b, m, dim) → (b, n, dim)."""
        q = self._heads(self.query(tokens))
        key, value = self.key_value(others).chunk(2, dim=-1)
        k, v = self._heads(key), self._heads(value)
        attended = F.scaled_dot_product_attention(self.query_norm(q).to(v.dtype), self.key_norm(k).to(v.dtype), v)
        out: Tensor = self.project(attended.transpose(1, 2).flatten(2))
        return out

    def _heads(self, x: Tensor) -> Tensor:
        """(b, n, width) → (b, heads, n, head)."""
        found: Tensor = x.unflatten(2, (-1, self.head)).transpose(1, 2)
        return found


class Mlp(nn.Module):
    """Two layers with GELU, or gated (SwiGLU, Shazeer 2020) with two thirds of the width for as many parameters."""

    def __init__(self, dim: int, hidden: int, *, gated: bool = False, bias: bool = True, round_to: int = 1) -> None:
        super().__init__()
        hidden = _round_up(2 * hidden // 3 if gated else hidden, round_to)
        self.expand = nn.Linear(dim, hidden, bias=bias)
        self.gate = nn.Linear(dim, hidden, bias=bias) if gated else None
        self.contract = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.expand(x)
        inner = F.gelu(inner) if self.gate is None else F.silu(inner) * self.gate(x)
        out: Tensor = self.contract(inner)
        return out


class Experts(nn.Module):
    """A mixture of MLPs in which experts choose tokens (Zhou et al. 2022): each takes the :meth:`chosen` number of
    tokens with its highest weights, so that all have the same load. The output is zero for tokens chosen by none."""

    def __init__(self, dim: int, hidden: int, experts: int, capacity: float) -> None:
        super().__init__()
        self.experts, self.capacity = experts, capacity
        self.router = nn.Linear(dim, experts, bias=False)
        self.expand = nn.Parameter(torch.empty(experts, dim, hidden))
        self.contract = nn.Parameter(torch.empty(experts, hidden, dim))
        for weight in (self.router.weight, self.expand, self.contract):
            nn.init.trunc_normal_(weight, std=0.02)

    def chosen(self, tokens: int) -> int:
        """Number of a sample's tokens that each expert takes: capacity * tokens / experts, at least 1."""
        return min(tokens, max(1, int(self.capacity * tokens / self.experts)))

    def choices(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens (b, n, dim) → weights (b, experts, k) and indices (b, experts, k) of each expert's tokens."""
        weights = self.router(tokens).softmax(dim=-1, dtype=torch.float32)
        highest = weights.transpose(1, 2).topk(self.chosen(tokens.shape[1]), dim=-1)
        return highest.values, highest.indices

    def forward(self, tokens: Tensor) -> Tensor:
        """(b, n, dim) → (b, n, dim)."""
        b, _, dim = tokens.shape
        weights, places = self.choices(tokens)
        index = places.flatten(1)[:, :, None].expand(-1, -1, dim)
        inner = tokens.gather(1, index).view(b, self.experts, -1, dim)
        inner = F.gelu(torch.einsum("bekd,edf->bekf", inner, self.expand))
        inner = torch.einsum("bekf,efd->bekd", inner, self.contract)
        changed = (weights.to(inner.dtype)[..., None] * inner).flatten(1, 2)
        return torch.zeros_like(tokens).scatter_add(1, index, changed.to(tokens.dtype))


class TextCondition(nn.Module):
    """All text states → one vector: each is projected, they are concatenated, and an MLP reads them.

    They are concatenated, not averaged: word order distinguishes "a red circle above a blue square" from its opposite.
    A learned vector replaces a dropped text.
    """

    def __init__(self, length: int, width: int, dim: int, narrow: int = 64) -> None:
        super().__init__()
        self.project = nn.Linear(width, narrow)
        self.mlp = nn.Sequential(nn.Linear(length * narrow, 2 * dim), nn.SiLU(), nn.Linear(2 * dim, dim))
        self.nothing = nn.Parameter(torch.zeros(dim))

    def forward(self, text: Tensor, drop: Tensor | None = None) -> Tensor:
        """text (b, l, d), drop (b,) bool or None → (b, dim)."""
        vector: Tensor = self.mlp(self.project(text).flatten(1))
        return vector if drop is None else torch.where(drop[:, None], self.nothing.to(vector.dtype), vector)


class TextAttention(nn.Module):
    """Text states → states of the network's width after one block of self-attention, and their mean as one vector.

    A learned state replaces each state of a dropped text.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        dim = config.dim
        self.nothing = nn.Parameter(torch.zeros(config.text_width))
        self.project = nn.Sequential(
            nn.Linear(config.text_width, dim), nn.GELU("tanh"), nn.LayerNorm(dim), nn.Linear(dim, dim)
        )
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = Attention(dim, dim, dim // config.heads, qk_norm=config.qk_norm, bias=config.bias)
        self.mlp = Mlp(dim, 4 * dim, gated=config.gated, bias=config.bias, round_to=config.round_to)
        self.pooled = nn.Sequential(nn.Linear(dim, dim), nn.GELU("tanh"), nn.LayerNorm(dim), nn.Linear(dim, dim))

    def forward(self, text: Tensor, drop: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """text (b, l, d), drop (b,) bool or None → (b, dim), (b, l, dim)."""
        if drop is not None:
            text = torch.where(drop[:, None, None], self.nothing.to(text.dtype), text)
        states = self.project(text)
        inner = self.norm1(states)
        states = states + self.attention(inner, inner)
        states = states + self.mlp(self.norm2(states))
        return self.pooled(states.mean(1)), states


def take(tokens: Tensor, keep: Tensor) -> Tensor:
    """Select from tokens (b, n, d) those with indices keep (b, m) → (b, m, d)."""
    return tokens.gather(1, keep[:, :, None].expand(-1, -1, tokens.shape[2]))


def kept_tokens(tokens: int, mask_ratio: float) -> int:
    """Number of ``tokens`` that pass through the backbone: a fraction 1 - mask_ratio, at least 1.

    Raises:
        ConfigError: ``mask_ratio`` is not in [0, 1).
    """
    if not 0 <= mask_ratio < 1:
        raise ConfigError(f"mask_ratio={mask_ratio}: must be at least 0 and below 1")
    return max(1, round(tokens * (1 - mask_ratio)))


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


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


def _centred(count: int, of: int) -> Tensor:
    """Positions 0 to ``of`` - 1, or ``count`` positions with the same centre."""
    return torch.arange(count) if count == of else torch.arange(count) + (of - count) / 2


def _grid_positions(
    height: int, width: int, dim: int, base: int = 0, configured: tuple[int, int] | None = None
) -> Tensor:
    """Sinusoidal positions, (height * width, dim): half of the features encode the row, half the column.

    ``configured``: the grid that this one is centred in.
    """
    quarter = dim // 4
    frequencies = 100.0 ** (-torch.arange(quarter) / quarter)
    whole = configured or (height, width)
    scale = base / whole[0] if base else 1.0
    places = (_centred(n, of) for n, of in zip((height, width), whole, strict=True))
    rows, columns = (scale * place[:, None] * frequencies for place in places)
    row = torch.cat([rows.sin(), rows.cos()], 1)[:, None].expand(height, width, -1)
    column = torch.cat([columns.sin(), columns.cos()], 1)[None].expand(height, width, -1)
    return torch.cat([row, column], -1).reshape(height * width, -1)
