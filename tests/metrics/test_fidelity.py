"""FID and KID where they are known, and what is refused."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from pipeline.config.schema import ConfigError
from pipeline.imaging.decoder import ImageDecoder
from pipeline.metrics import fidelity
from pipeline.metrics.fidelity import feature_extractor
from pipeline.randomness import generator


class Noise:
    """Pictures of one colour each, around ``level``; stored as a dataset directory has them."""

    def __init__(self, level: float, count: int = 300, seed: int = 0) -> None:
        colours = generator(seed, "noise").normal(level, 8.0, (count, 3)).clip(0, 255).astype(np.uint8)
        self._rows = [self._row(colour) for colour in colours]

    def _row(self, colour: np.ndarray) -> dict[str, Any]:
        file = BytesIO()
        Image.fromarray(np.broadcast_to(colour, (16, 16, 3)).copy()).save(file, "PNG")
        return {"jpg": file.getvalue(), "caption": "a colour"}

    def __len__(self) -> int:
        return len(self._rows)

    def rows(self, positions: Any) -> list[dict[str, Any]]:
        return [self._rows[i] for i in positions]


_decoder = ImageDecoder()


def distances(*given: Any) -> dict[str, float]:
    failed: dict[str, str] = {}
    found = fidelity.distances(*given, decoder=_decoder, failed=failed)
    assert not failed
    return found


def clip_score(*given: Any) -> float:
    return fidelity.clip_score(*given, decoder=_decoder, failed={})


class Mean(nn.Module):
    """Features: the mean of each channel, in 0..255."""

    def forward(self, x: Tensor, return_features: bool = False) -> Tensor:
        if not return_features:
            return torch.zeros(len(x), 1000)
        return x.mean((2, 3))


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("features") / "mean.pt"
    torch.jit.script(Mean()).save(path)
    return str(path)


def test_fid_of_gaussians_is_their_distance(features: str) -> None:
    near, far = (distances(Noise(100), Noise(level, seed=1), features) for level in (100, 120))
    assert near["fid"] < 2
    assert far["fid"] == pytest.approx(3 * 20**2, rel=0.1)  # equal covariances: the squared distance of the means
    assert near["kid"] < 0.1 * far["kid"] and far["kid"] > 0


def test_scores_are_the_same_again_and_pixels_tell_colours_apart(features: str) -> None:
    real, near, far = Noise(90, 50), Noise(99, 50, seed=1), Noise(150, 50, seed=1)
    assert distances(real, near, features) == distances(real, near, features)
    assert distances(real, far, "pixels")["fid"] > distances(real, near, "pixels")["fid"]


def test_what_is_missing_is_named(features: str, tmp_path: Path) -> None:
    (tmp_path / "no.pt").write_bytes(b"nothing")
    for wrong, message in (
        ("", "features=: a TorchScript file"),
        ("x.pt", "no such file"),
        (str(tmp_path / "no.pt"), "not a T"),
    ):
        with pytest.raises(ConfigError, match=message):
            feature_extractor(wrong)
    with pytest.raises(ConfigError, match="at least 2 images"):
        distances(Noise(9, 1), Noise(9, 5), features)
    with pytest.raises(ConfigError, match="clip=ViT-B-33:x: did you mean ViT-B-32"):
        clip_score(Noise(9, 2), "ViT-B-33:x")
    with pytest.raises(ConfigError, match="give the weights as ViT-B-32:<path or tag>"):
        clip_score(Noise(9, 2), "ViT-B-32")
    with pytest.raises(ConfigError, match="clip=ViT-B-32:/nowhere.pt: the weights cannot be obtained"):
        clip_score(Noise(9, 2), "ViT-B-32:/nowhere.pt")
