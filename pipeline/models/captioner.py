"""Texts from image features: a transformer decoder with cross-attention, or a Mamba decoder with a feature prefix.

The transformer is pre-norm; each block is self-attention, cross-attention over the features, MLP (Vaswani et al. 2017).
The Mamba decoder has the features as a prefix of its sequence. Both are causal, so that padding at the end of a text
has no influence on it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config.cli import nearest
from pipeline.config.schema import ConfigError
from pipeline.models.decoding_cache import Cache as Cache
from pipeline.models.packed_linear import Packed, packed

DECODERS = ("transformer", "mamba")
POSITIONS = ("learned", "rotary")


@dataclass(frozen=True)
class CaptionerConfig:
    """Everything that is needed to rebuild the network; stored in checkpoints.

    Attributes:
        image_tokens, image_width: of the features.
        vocab: number of tokens of the tokenizer.
        max_length: longest text in tokens, including start and end.
        positions: of the transformer.
        d_state: of the Mamba decoder.
    """

    image_tokens: int
    image_width: int
    vocab: int
    max_length: int
    decoder: str = "transformer"
    dim: int = 128
    depth: int = 3
    heads: int = 4
    mlp_ratio: float = 4.0
    dropout: float = 0.0
    positions: str = "learned"
    d_state: int = 32

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


SIZES: dict[str, dict[str, int]] = {
    "nano": {"dim": 128, "depth": 3, "heads": 4},
    "tiny": {"dim": 256, "depth": 4, "heads": 4},
    "small": {"dim": 512, "depth": 6, "heads": 8},
    "base": {"dim": 768, "depth": 12, "heads": 12},
}
"""Parameters without embeddings, transformer: 0.8, 4.2, 25, 113 million (Mamba: 0.33, 1.7, 9.7, 43 million)."""


def captioner_config(size: str, **rest: Any) -> CaptionerConfig:
    """Configuration of the network ``size``.

    Raises:
        ConfigError: there is no such size, decoder or kind of positions.
    """
    for name, value, known in (
        ("model", size, tuple(SIZES)),
        ("decoder", rest.get("decoder", DECODERS[0]), DECODERS),
        ("positions", rest.get("positions", POSITIONS[0]), POSITIONS),
    ):
        if value not in known:
            raise ConfigError(f"{name}={value}: {nearest(value, known)}")
    settings: dict[str, Any] = {**rest, **SIZES[size]}
    return CaptionerConfig(**settings)


class Captioner(nn.Module):
    """Predicts logits of the next token from image features and the tokens so far."""

    config: CaptionerConfig
    blocks: Any

    def __init__(self, config: CaptionerConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.image = nn.Sequential(nn.LayerNorm(config.image_width), nn.Linear(config.image_width, dim))
        self.places = nn.Parameter(torch.randn(config.image_tokens, dim) * 0.02)
        self.embed = nn.Embedding(config.vocab, dim)
        nn.init.normal_(self.embed.weight, std=0.02)
        learned = config.decoder == "transformer" and config.positions == "learned"
        self.positions = nn.Parameter(torch.randn(config.max_length, dim) * 0.02) if learned else None
        block = _Block if config.decoder == "transformer" else _mamba_block()
        self.blocks = nn.ModuleList(block(config) for _ in range(config.depth))
        self.drop = nn.Dropout(config.dropout)
        self.norm = nn.LayerNorm(dim)

    def forward(self, features: Tensor, tokens: Tensor) -> Tensor:
        """features (b, m, image_width), tokens (n, l) int64 → logits (n, l, vocab).

        n is b or a multiple of it; the texts of each image are consecutive.
        """
        group = len(tokens) // len(features)
        image, x = self.look(features), self.drop(self.embedded(tokens, 0))
        if self.config.decoder == "mamba":
            x = torch.cat([image.repeat_interleave(group, 0), x], 1)
            for block in self.blocks:
                x = block(x)
            x = x[:, image.shape[1] :]
        else:
            turn = self.turns(0, tokens.shape[1], x)
            for block in self.blocks:
                x = block(x, image, turn, group)
        return self.logits(x)

    def begin(self, features: Tensor, group: int = 1, length: int = 0, cached: bool = True) -> Cache:
        """Start to generate ``group`` texts of at most ``length`` tokens for each image, (b, m, image_width).

        ``cached=False`` recomputes everything for each token, for tests and comparisons.
        """
        if not cached:
            return _Replay(self, features.repeat_interleave(group, 0))
        if self.config.decoder == "mamba":
            from pipeline.models.recurrent import RecurrentCache

            return RecurrentCache(self, features, group)
        return _KeyValueCache(self, features, group, length or self.config.max_length)

    # ---- parts

    def look(self, features: Tensor) -> Tensor:
        """Embed features: (b, m, image_width) → (b, m, dim)."""
        out: Tensor = self.image(features) + self.places[: features.shape[1]]
        return out

    def embedded(self, tokens: Tensor, start: int) -> Tensor:
        """Embed tokens (b, l), the first of them at position ``start`` of its text → (b, l, dim)."""
        x: Tensor = self.embed(tokens)
        return x if self.positions is None else x + self.positions[start : start + tokens.shape[1]]

    def logits(self, x: Tensor) -> Tensor:
        return F.linear(self.norm(x), self.embed.weight)

    def turns(self, start: int, length: int, like: Tensor) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines (l, d / 2) of rotary positions (Su et al. 2021); None if they are not used."""
        if self.config.positions != "rotary":
            return None
        half = self.config.dim // self.config.heads // 2
        rates = 10000.0 ** (-torch.arange(half, device=like.device, dtype=torch.float32) / half)
        angles = torch.arange(start, start + length, device=like.device, dtype=torch.float32)[:, None] * rates
        return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


# ---- transformer


class _Block(nn.Module):
    def __init__(self, config: CaptionerConfig) -> None:
        super().__init__()
        dim, hidden = config.dim, int(config.dim * config.mlp_ratio)
        self.heads, self.dropout = config.heads, config.dropout
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.query, self.image, self.seen = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, image: Tensor, turn: tuple[Tensor, Tensor] | None, group: int) -> Tensor:
        """(n, l, dim), image features (n / group, m, dim) → (n, l, dim)."""
        q, k, v = self.own(x, turn)
        dropout = self.dropout if self.training else 0.0
        x = self.attended(x, F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True))
        return self.rest(x, self.project_image(image), group)

    def own(self, x: Tensor, turn: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (n, h, l, d) of self-attention."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return (_turned(q, turn), _turned(k, turn), v) if turn else (q, k, v)

    def attended(self, x: Tensor, attended: Tensor) -> Tensor:
        out: Tensor = x + self.drop(self.out(attended.transpose(1, 2).flatten(2)))
        return out

    def rest(self, x: Tensor, image: tuple[Tensor, Tensor], group: int) -> Tensor:
        """Cross-attention and MLP. All texts of an image are queries to the same keys, which are not repeated."""
        n, length, dim = x.shape
        q = self.query(self.norm2(x)).view(n // group, group * length, self.heads, -1).transpose(1, 2)
        dropout = self.dropout if self.training else 0.0
        seen = F.scaled_dot_product_attention(q, *image, dropout_p=dropout)
        x = x + self.drop(self.seen(seen.transpose(1, 2).reshape(n, length, dim)))
        out: Tensor = x + self.drop(self.mlp(self.norm3(x)))
        return out

    def project_image(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """(b, m, dim) → keys and values (b, h, m, d)."""
        k, v = self.image(image).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return k, v


def _turned(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = turn
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class _KeyValueCache(Cache):
    """Preallocated keys and values of all tokens so far; those of the image are computed once."""

    def __init__(self, model: Captioner, features: Tensor, group: int, length: int) -> None:
        config, self.model, self.group, self.length = model.config, model, group, 0
        rows = len(features) * group
        image = model.look(features)
        self.image = [tuple(map(torch.Tensor.contiguous, block.project_image(image))) for block in model.blocks]
        self.blocks = [packed(block, rows) for block in model.blocks]
        self.head = Packed(model.embed.weight, None, rows)
        self.own = image.new_empty(len(model.blocks), 2, rows, config.heads, length, config.dim // config.heads)

    def step(self, tokens: Tensor) -> Tensor:
        start, stop = self.length, self.length + tokens.shape[1]
        x = self.model.embedded(tokens, start)
        turn = self.model.turns(start, tokens.shape[1], x)
        for block, own, image in zip(self.blocks, self.own, self.image, strict=True):
            q, own[0, :, :, start:stop], own[1, :, :, start:stop] = block.own(x, turn)
            k, v = own[0, :, :, :stop], own[1, :, :, :stop]
            # only the first call may have several tokens, and none are cached then
            x = block.attended(x, F.scaled_dot_product_attention(q, k, v, is_causal=start == 0 and stop > 1))
            x = block.rest(x, image, self.group)
        self.length = stop
        found: Tensor = self.head(self.model.norm(x[:, -1]))
        return found

    def reorder(self, index: Tensor) -> None:
        used = self.own[..., : self.length, :]
        used.copy_(used.index_select(2, index))


class _Replay(Cache):
    def __init__(self, model: Captioner, features: Tensor) -> None:
        self.model, self.features = model, features
        self.tokens = torch.empty(len(features), 0, dtype=torch.int64, device=features.device)

    def step(self, tokens: Tensor) -> Tensor:
        self.tokens = torch.cat([self.tokens, tokens], 1)
        out: Tensor = self.model(self.features, self.tokens)[:, -1]
        return out

    def reorder(self, index: Tensor) -> None:
        self.tokens = self.tokens[index]


# ---- Mamba


def _mamba_block() -> type[nn.Module]:
    from pipeline.models.recurrent import MambaBlock

    return MambaBlock
