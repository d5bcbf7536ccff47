"""Similarity of generated images to real ones (FID, KID) and to their captions (CLIP score).

Distances are computed by torchmetrics, from the features of any TorchScript file, so that nothing is downloaded here.
Published FIDs use ``inception-2015-12-05.pt``; values from other features are only comparable among themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol
from warnings import catch_warnings, simplefilter

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config.cli import nearest
from pipeline.config.schema import ConfigError
from pipeline.encoders.base import sent
from pipeline.imaging.decoder import ImageDecoder

_BATCH = 32
_SUBSET = 1000  # images in each of KID's subsets, as in the paper
_GRID = 8


Failed = dict[str, str]
"""Keys of images that could not be decoded, with the reasons."""


class ImageRows(Protocol):
    """Random access to stored images."""

    def __len__(self) -> int: ...

    def rows(self, positions: Any) -> list[dict[str, Any]]: ...


def distances(
    real: ImageRows,
    drawn: ImageRows,
    features: str,
    seed: int = 0,
    *,
    decoder: ImageDecoder,
    failed: Failed,
    device: str | torch.device = "cpu",
) -> dict[str, float]:
    """``fid`` and ``kid`` (with ``kid_std`` over subsets) between two sets of at least 2 images.

    Images that cannot be decoded are skipped and recorded in ``failed``. Features are computed on ``device``, distances
    on the CPU.

    Raises:
        ConfigError: the features cannot be found, or there are too few images.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    extractor = feature_extractor(features, device)
    vectors = [
        torch.cat([_whole(extractor, batch) for batch, _ in batches(images, decoder, failed)]).cpu().double()
        for images in (real, drawn)
    ]
    count = min(map(len, vectors))
    if count < 2:
        raise ConfigError("reference=, generated=: FID needs at least 2 images of each kind that can be decoded")
    fid = FrechetInceptionDistance(feature=extractor, reset_real_features=False)
    with catch_warnings():
        simplefilter("ignore")  # the warning that it stores all features, as intended
        kid = KernelInceptionDistance(feature=extractor, subset_size=min(_SUBSET, count))
    for those, are_real in zip(vectors, (True, False), strict=True):
        fid.update(those, real=are_real)
        kid.update(those, real=are_real)
    torch.manual_seed(seed)  # KID draws its subsets
    mean, deviation = kid.compute()
    return {"fid": float(fid.compute()), "kid": float(mean), "kid_std": float(deviation)}


def clip_score(
    drawn: ImageRows, clip: str, *, decoder: ImageDecoder, failed: Failed, device: str | torch.device = "cpu"
) -> float:
    """Mean of max(100 cos(image, caption), 0) (Hessel et al. 2021, without its weight 2.5).

    Images that cannot be decoded are skipped and recorded in ``failed``.

    Raises:
        ConfigError: the model or its weights cannot be found.
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
        raise ConfigError(f"clip={clip}: the weights cannot be obtained: {str(error).splitlines()[0]}") from None
    device = torch.device(device)
    model.to(device).eval()
    tokenize = open_clip.get_tokenizer(name)
    scores = []
    with torch.inference_mode():
        for images, captions in batches(drawn, decoder, failed, preprocess):
            image = F.normalize(model.encode_image(sent(images, device)), dim=-1)
            text = F.normalize(model.encode_text(sent(tokenize(captions), device)), dim=-1)
            scores.append((100 * (image * text).sum(-1)).clamp(min=0))
    return float(torch.cat(scores).mean())


def feature_extractor(features: str, device: str | torch.device = "cpu") -> _Given:
    """Load a feature extractor: uint8 (b, 3, h, w) → (b, d), on ``device``.

    Raises:
        ConfigError: there is no such file, or it is not TorchScript.
    """
    if features == "pixels":
        return _Given(AverageColours(), 3 * _GRID * _GRID, device)
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
    return _Given(network, width, device)


class AverageColours(nn.Module):
    """The mean colours of an 8 x 8 grid."""

    def forward(self, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(x.float() / 255, _GRID).flatten(1)


class Scripted(nn.Module):
    """A TorchScript module, called with ``return_features`` if it takes this argument."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module
        known = [argument.name for argument in module.forward.schema.arguments]
        self.more = {"return_features": True} if "return_features" in known else {}

    @torch.inference_mode()
    def forward(self, x: Tensor) -> Tensor:
        return self.module(x.float(), **self.more).flatten(1).clone()  # type: ignore[no-any-return]


class _Given(nn.Module):
    """Stands in for torchmetrics' network: passes on features that were computed once for all metrics."""

    def __init__(self, network: nn.Module, width: int, device: str | torch.device) -> None:
        super().__init__()
        self.num_features = width
        self.device = torch.device(device)
        self.network = network.to(self.device)

    def forward(self, x: Tensor) -> Tensor:
        return x

    def compute(self, x: Tensor) -> Tensor:
        """Compute features of images."""
        features: Tensor = self.network(x)
        return features


def _whole(extractor: _Given, batch: list[Tensor]) -> Tensor:
    """Features of images of any sizes, (b, d); adjacent images of equal size are processed together."""
    groups = (torch.stack(list(same)) for _, same in groupby(batch, key=lambda image: image.shape))
    return torch.cat([extractor.compute(sent(images, extractor.device)) for images in groups])


def batches(
    images: ImageRows, decoder: ImageDecoder, failed: Failed, preprocess: Any = None
) -> Iterator[tuple[Any, list[str]]]:
    """Yield images, uint8 (3, h, w) each (or stacked outputs of ``preprocess``), and their captions.

    Images that cannot be decoded are skipped; their keys and the reasons are added to ``failed``.

    Raises:
        ConfigError: no image can be decoded.
    """
    from PIL import Image

    none = True
    for start in range(0, len(images), _BATCH):
        rows = images.rows(range(start, min(start + _BATCH, len(images))))
        arrays, captions = [], []
        for row, pixels in decoder.pixels((row, row["jpg"]) for row in rows):
            if isinstance(pixels, np.ndarray):
                arrays.append(pixels)
                captions.append(row["caption"])
            else:
                failed[str(row.get("key", ""))] = str(pixels)
        if not arrays:
            continue
        none = False
        if preprocess is not None:
            yield torch.stack([preprocess(Image.fromarray(array)) for array in arrays]), captions
        else:
            yield [torch.from_numpy(array.copy()).permute(2, 0, 1) for array in arrays], captions
    if none:
        raise ConfigError(
            f"none of {len(images)} images can be decoded: {next(iter(failed.values()), 'there is none')}"
        )
