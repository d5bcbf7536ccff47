"""Image classifiers of bidirectional state space, attention and hybrid blocks, after Vision Mamba (Zhu et al. 2024).

Parameters in millions with 1,000 classes and patches of 16 (``sizes`` in tests/models/test_vision_mamba.py):
nano 0.5, tiny 6.4, small 23.5, base 89.5, large 313.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config.cli import nearest
from pipeline.config.schema import ConfigError
from pipeline.models.ssm import MIXERS, Bidirectional

BLOCKS = ("ssm", "attention", "hybrid")
POOLS = ("mean", "token")


@dataclass(frozen=True)
class VisionMambaConfig:
    """Everything that is needed to rebuild the network; stored in checkpoints."""

    classes: int
    height: int
    width: int
    channels: int = 3
    dim: int = 192
    depth: int = 12
    patch: int = 16
    stem: str = "patch"
    """patch: one convolution with the stride of a patch; conv: several of stride 2, better for small images."""
    blocks: str = "ssm"
    """Kinds of blocks, repeated up to ``depth``: "ssm", or "ssm,ssm,ssm,attention"."""
    mixer: str = "mamba2"
    d_state: int = 64
    d_conv: int = 4
    expand: int = 2
    directions: int = 2
    heads: int = 3
    mlp_ratio: float = 0.0
    """Width of an MLP after each mixer, in multiples of ``dim`` (0: none, as in Vision Mamba)."""
    pool: str = "mean"
    """mean over all tokens, or a class token in the middle of the sequence."""
    dropout: float = 0.0
    drop_path: float = 0.0
    """Drop probability in the last block; it increases linearly from 0."""
    scan_backend: str = "auto"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


SIZES: dict[str, dict[str, Any]] = {
    "nano": {"dim": 64, "depth": 4, "heads": 2, "d_state": 16, "patch": 4, "stem": "conv"},
    "tiny": {"dim": 192, "depth": 12, "heads": 3},
    "small": {"dim": 384, "depth": 12, "heads": 6},
    "base": {"dim": 768, "depth": 12, "heads": 12},
    "large": {"dim": 1024, "depth": 24, "heads": 16},
}


def vision_mamba_config(size: str, image: tuple[int, int, int], classes: int, **more: Any) -> VisionMambaConfig:
    """Configuration of the network ``size`` for images (channels, height, width).

    Raises:
        ConfigError: there is no such size, block, mixer or pooling, or patches do not divide the image.
    """
    if size not in SIZES:
        raise ConfigError(f"model={size}: {nearest(size, SIZES)}")
    channels, height, width = image
    config = VisionMambaConfig(classes, height, width, channels, **{**SIZES[size], **more})
    for name, value, known in (
        ("mixer", config.mixer, tuple(MIXERS)),
        ("pool", config.pool, POOLS),
        *(("blocks", block, BLOCKS) for block in config.blocks.split(",")),
    ):
        if value not in known:
            raise ConfigError(f"{name}={value}: {nearest(value, known)}")
    if height % config.patch or width % config.patch:
        raise ConfigError(f"patch={config.patch}: does not divide images of {height} x {width}")
    if config.stem == "conv" and config.patch & (config.patch - 1):
        raise ConfigError(f"patch={config.patch}: stem=conv halves the image repeatedly: give a power of 2")
    return config


class VisionMamba(nn.Module):
    """Images (b, c, h, w) → logits (b, classes)."""

    def __init__(self, config: VisionMambaConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        tokens = (config.height // config.patch) * (config.width // config.patch)
        self.stem = _stem(config)
        self.token = nn.Parameter(torch.zeros(1, 1, dim)) if config.pool == "token" else None
        self.positions = nn.Parameter(torch.zeros(1, tokens + (self.token is not None), dim))
        self.dropout = nn.Dropout(config.dropout)
        kinds = config.blocks.split(",")
        rates = [config.drop_path * number / max(1, config.depth - 1) for number in range(config.depth)]
        self.blocks = nn.ModuleList(
            Block(kinds[number % len(kinds)], config, rate) for number, rate in enumerate(rates)
        )
        self.norm = nn.RMSNorm(dim, eps=1e-5)
        self.head = nn.Linear(dim, config.classes)
        nn.init.trunc_normal_(self.positions, std=0.02)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        if self.token is not None:
            nn.init.trunc_normal_(self.token, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.stem(images).flatten(2).transpose(1, 2)
        middle = tokens.shape[1] // 2
        if self.token is not None:
            token = self.token.expand(len(tokens), -1, -1).to(tokens.dtype)
            tokens = torch.cat([tokens[:, :middle], token, tokens[:, middle:]], 1)
        tokens = self.dropout(tokens + self.positions)
        for block in self.blocks:
            tokens = block(tokens)
        tokens = self.norm(tokens)
        logits: Tensor = self.head(tokens.mean(1) if self.token is None else tokens[:, middle])
        return logits


class Block(nn.Module):
    """Norm and mixer, then optionally norm and MLP; residual, both with drop-path."""

    def __init__(self, kind: str, config: VisionMambaConfig, drop_path: float) -> None:
        super().__init__()
        dim, hidden = config.dim, int(config.dim * config.mlp_ratio)
        self.norm = nn.RMSNorm(dim, eps=1e-5)
        self.mixer = _mixer(kind, config)
        self.mlp_norm = nn.RMSNorm(dim, eps=1e-5) if hidden else None
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim)) if hidden else None
        self.dropout = nn.Dropout(config.dropout)
        self.drop_path = drop_path

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self._dropped(self.mixer(self.norm(tokens)))
        if self.mlp is not None and self.mlp_norm is not None:
            tokens = tokens + self._dropped(self.mlp(self.mlp_norm(tokens)))
        return tokens

    def _dropped(self, branch: Tensor) -> Tensor:
        """Drop the branch for some samples and scale up the others (Huang et al. 2016)."""
        branch = self.dropout(branch)
        if not self.training or not self.drop_path:
            return branch
        keep = torch.rand(len(branch), 1, 1, device=branch.device) >= self.drop_path
        return branch * keep / (1 - self.drop_path)


class Attention(nn.Module):
    """Multi-head self-attention over all tokens."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        if dim % heads:
            raise ConfigError(f"heads={heads}: does not divide a width of {dim}")
        self.heads, self.dropout = heads, dropout
        self.into = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        b, length, dim = tokens.shape
        q, k, v = self.into(tokens).view(b, length, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(b, length, dim))
        return out


class Hybrid(nn.Module):
    """Both mixers in parallel, averaged with learned weights per channel, initially one half."""

    def __init__(self, first: nn.Module, second: nn.Module, dim: int) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.balance = nn.Parameter(torch.zeros(dim))

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = torch.lerp(
            self.second(tokens).float(), self.first(tokens).float(), self.balance.float().sigmoid()
        )
        return out


def _mixer(kind: str, config: VisionMambaConfig) -> nn.Module:
    if kind == "attention":
        return Attention(config.dim, config.heads, config.dropout)
    scan = Bidirectional(
        config.mixer,
        config.dim,
        config.directions,
        d_state=config.d_state,
        d_conv=config.d_conv,
        expand=config.expand,
        backend=config.scan_backend,
    )
    return scan if kind == "ssm" else Hybrid(scan, _mixer("attention", config), config.dim)


def _stem(config: VisionMambaConfig) -> nn.Module:
    if config.stem == "patch":
        return nn.Conv2d(config.channels, config.dim, config.patch, stride=config.patch)
    layers: list[nn.Module] = [nn.Conv2d(config.channels, config.dim // 2, 3, padding=1), nn.GELU()]
    width, left = config.dim // 2, config.patch
    while left > 1:
        layers += [nn.Conv2d(width, config.dim, 3, stride=2, padding=1), nn.GELU()]
        width, left = config.dim, left // 2
    return nn.Sequential(*layers, nn.Conv2d(width, config.dim, 1))
