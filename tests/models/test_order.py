"""What state space blocks are for: telling in which order things come along the sequence, however far apart."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.models.vision_mamba import VisionMamba, vision_mamba_config

EDGE = 8


def textures(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noise with one red and one green cell: images (n, 3, 8, 8), and whether red comes first in reading order."""
    random = torch.Generator().manual_seed(seed)
    images = 0.3 * torch.randn(count, 3, EDGE * EDGE, generator=random)
    places = torch.rand(count, EDGE * EDGE, generator=random).topk(2).indices
    images[torch.arange(count), 0, places[:, 0]] += 3
    images[torch.arange(count), 1, places[:, 1]] += 3
    return images.view(count, 3, EDGE, EDGE), (places[:, 0] < places[:, 1]).long()


def trained(blocks: str, steps: int = 250) -> VisionMamba:
    """A model that is not told where its tokens are, after a short training."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    more = {"blocks": blocks, "dim": 32, "depth": 2, "d_state": 16, "patch": 1, "stem": "patch"}
    model = VisionMamba(vision_mamba_config("nano", (3, EDGE, EDGE), 2, **more))
    torch.nn.init.zeros_(model.positions.requires_grad_(False))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=4e-3)
    for step in range(steps):
        images, labels = textures(64, step)
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def accuracy(model: VisionMamba, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).float().mean())


def test_a_scan_knows_what_came_first_and_attention_alone_does_not() -> None:
    images, labels = textures(1000, seed=-1)
    scan = trained("ssm")
    assert accuracy(scan, images, labels) > 0.95
    assert accuracy(scan, images.flip(2, 3), 1 - labels) > 0.95  # read backwards, the order is the other one
    assert accuracy(trained("attention", 80), images, labels) < 0.6
