"""How near drawn pictures come to real ones (FID, KID) and to their captions (CLIP score).

Distances are torchmetrics'. The features are whatever a TorchScript file computes, so nothing is downloaded here.
Published FIDs are those of ``inception-2015-12-05.pt``; those of other features only compare runs with each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol
from warnings import catch_warnings, simplefilter

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config.cli import nearest
from pipeline.config.schema import ConfigError
from pipeline.imaging import transform

_BATCH = 32
_SUBSET = 1000  # pictures in each of KID's subsets, as in its paper
_GRID = 8


class Pictures(Protocol):
    """Random access to stored pictures."""

    def __len__(self) -> int: ...

    def rows(self, positions: Any) -> list[dict[str, Any]]: ...


def distances(real: Pictures, drawn: Pictures, features: str, seed: int = 0) -> dict[str, float]:
    """``fid`` and ``kid`` (with ``kid_std`` over subsets) between two sets of pictures, 2 or more each.

    Raises:
        ConfigError: the features are not there, or there are too few pictures.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    if min(len(real), len(drawn)) < 2:
        raise ConfigError("reference=, generated=: FID needs at least 2 pictures of each kind")
    extractor = feature_extractor(features)
    fid = FrechetInceptionDistance(feature=extractor, reset_real_features=False)
    with catch_warnings():
        simplefilter("ignore")  # that it keeps all features: so it must
        kid = KernelInceptionDistance(feature=extractor, subset_size=min(_SUBSET, len(real), len(drawn)))
    for pictures, are_real in ((real, True), (drawn, False)):
        for batch, _ in batches(pictures):
            vectors = _whole(extractor, batch)
            fid.update(vectors, real=are_real)
            kid.update(vectors, real=are_real)
    torch.manual_seed(seed)  # KID draws its subsets
    mean, deviation = kid.compute()
    return {"fid": float(fid.compute()), "kid": float(mean), "kid_std": float(deviation)}


def clip_score(drawn: Pictures, clip: str) -> float:
    """Mean of max(100 cos(picture, caption), 0) (Hessel et al. 2021, without its weight 2.5).

    Raises:
        ConfigError: the model or its weights are not there.
    """
    import open_clip

    name, _, weights = clip.partition(":")
    if name not in open_clip.list_models():
        raise ConfigError(f"clip={clip}: {nearest(name, open_clip.list_models())} (as <model>:<weights>)")
    if not weights:
        raise ConfigError(f"clip={clip}: give the weights as {name}:<path or tag>")
    try:
        model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=weights)
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"clip={clip}: the weights cannot be had: {str(error).splitlines()[0]}") from None
    model.eval()
    tokenize = open_clip.get_tokenizer(name)
    scores = []
    with torch.inference_mode():
        for pictures, captions in batches(drawn, preprocess):
            image = F.normalize(model.encode_image(pictures), dim=-1)
            text = F.normalize(model.encode_text(tokenize(captions)), dim=-1)
            scores.append((100 * (image * text).sum(-1)).clamp(min=0))
    return float(torch.cat(scores).mean())


def feature_extractor(features: str) -> nn.Module:
    """uint8 (b, 3, h, w) → (b, d).

    Raises:
        ConfigError: no such file, or it is no TorchScript.
    """
    if features == "pixels":
        return _Given(AverageColours(), 3 * _GRID * _GRID)
    if not features:
        raise ConfigError("features=: a TorchScript file, such as inception-2015-12-05.pt, or pixels")
    if not Path(features).is_file():
        raise ConfigError(f"features={features}: there is no such file")
    try:
        module = torch.jit.load(features, map_location="cpu").eval()
    except RuntimeError as error:
        raise ConfigError(f"features={features}: not a TorchScript file: {str(error).splitlines()[0]}") from None
    network = Scripted(module)
    width = network(torch.zeros(1, 3, 299, 299, dtype=torch.uint8)).shape[1]
    return _Given(network, width)


class AverageColours(nn.Module):
    """The mean colours of an 8 x 8 grid."""

    def forward(self, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(x.float() / 255, _GRID).flatten(1)


class Scripted(nn.Module):
    """A TorchScript module; if it takes ``return_features``, asked for them."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module
        known = [argument.name for argument in module.forward.schema.arguments]
        self.more = {"return_features": True} if "return_features" in known else {}

    @torch.inference_mode()
    def forward(self, x: Tensor) -> Tensor:
        return self.module(x.float(), **self.more).flatten(1).clone()  # type: ignore[no-any-return]


class _Given(nn.Module):
    """What torchmetrics takes for a network: passes features on that were computed before, once for all metrics."""

    def __init__(self, network: nn.Module, width: int) -> None:
        super().__init__()
        self.network, self.num_features = network, width

    def forward(self, x: Tensor) -> Tensor:
        return x


def _whole(extractor: nn.Module, batch: list[Tensor]) -> Tensor:
    """Features of pictures of any sizes, (b, d) float64."""
    return torch.cat([extractor.network(picture[None]) for picture in batch]).double()  # type: ignore[operator]


def batches(pictures: Pictures, preprocess: Any = None) -> Iterator[tuple[Any, list[str]]]:
    """Pictures, uint8 (3, h, w) each (or what ``preprocess`` makes of them, stacked), and their captions."""
    from PIL import Image

    for start in range(0, len(pictures), _BATCH):
        rows = pictures.rows(range(start, min(start + _BATCH, len(pictures))))
        arrays = [transform.decode(row["jpg"], transform.probe(row["jpg"], transform.Limits())) for row in rows]
        captions = [row["caption"] for row in rows]
        if preprocess is not None:
            yield torch.stack([preprocess(Image.fromarray(array)) for array in arrays]), captions
        else:
            yield [torch.from_numpy(np.ascontiguousarray(array)).permute(2, 0, 1) for array in arrays], captions
