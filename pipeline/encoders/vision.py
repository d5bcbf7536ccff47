"""Frozen image encoders whose features captions are written from; each with its own preprocessing."""

from __future__ import annotations

import json
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from pipeline.cli import nearest
from pipeline.config import ConfigError
from pipeline.encoders.base import weights_digest

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from pipeline.encoders.preprocessing import Preprocessing

VISION_ENCODERS = ("embedded", "vit", "clip", "openclip", "program")
_RESOLUTION, _PATCH = 64, 8
_PREPROCESSING = "preprocessing.json"


class VisionEncoder(Protocol):
    """Pictures to ``tokens`` features of ``width`` numbers each."""

    name: str
    tokens: int
    width: int

    def preprocess(self, images: Sequence[np.ndarray]) -> Tensor:
        """Pictures uint8 (h, w, 3) of any sizes → float32 (b, 3, r, r) on the CPU, as the model takes them."""
        ...

    def encode(self, x: Tensor) -> Tensor:
        """(b, 3, r, r) → float32 (b, tokens, width)."""
        ...

    def describe(self) -> dict[str, Any]:
        """What manifests and checkpoints record: name, features, preprocessing, hash of the weights."""
        ...


def vision_encoder(name: str, features: str = "patch", device: str | torch.device = "cpu") -> VisionEncoder:
    """The encoder called ``name``: ``embedded`` (patches of pixels, no download), ``vit:<repo or folder>``,
    ``clip:<repo or folder>`` (of transformers), ``openclip:<model>[:<pretrained>]``, or ``program:<file>``, any network
    that :func:`save_program` wrote.

    Args:
        features: "patch", all tokens of the last layer; "pooled", the one that stands for the picture.

    Raises:
        ConfigError: no such name, model or weights.
    """
    kind, _, rest = name.partition(":")
    if name == "embedded":
        return _Patches(features)
    if kind not in VISION_ENCODERS or not rest:
        raise ConfigError(
            f"encoder={name}: {nearest(kind, VISION_ENCODERS)} "
            "(as vit:<repo or folder>, clip:<repo or folder>, openclip:<model>[:<pretrained>], program:<file>)"
        )
    if kind == "openclip":
        return _OpenClip(name, rest, features, device)
    return (_Program if kind == "program" else _Transformers)(name, rest, features, device)


class _Patches:
    """The pixels of each patch in [-1, 1], side by side; pooled: their mean."""

    def __init__(self, features: str) -> None:
        self.name, self.features = "embedded", features
        self.tokens = 1 if features == "pooled" else (_RESOLUTION // _PATCH) ** 2
        self.width = 3 * _PATCH * _PATCH

    def preprocess(self, images: Sequence[np.ndarray]) -> Tensor:
        from pipeline.encoders.preprocessing import Preprocessing

        return Preprocessing()(images, _RESOLUTION, "cpu")

    def encode(self, x: Tensor) -> Tensor:
        import torch.nn.functional as F

        patches = F.unfold(x, _PATCH, stride=_PATCH).transpose(1, 2)
        return patches.mean(1, keepdim=True) if self.features == "pooled" else patches

    def describe(self) -> dict[str, Any]:
        from pipeline.encoders.preprocessing import Preprocessing

        preprocessing = {"resolution": _RESOLUTION, "patch": _PATCH, **Preprocessing().describe()}
        return {"name": self.name, "features": self.features, "preprocessing": preprocessing}


def save_program(network: nn.Module, file: str | Path, resolution: int, preprocessing: Preprocessing) -> None:
    """Make an encoder of any network: (b, 3, resolution, resolution) → (b, tokens, width), without its code.

    Args:
        file: what ``program:<file>`` names; it holds the weights, the operations, and the preprocessing.
    """
    import torch

    example = torch.zeros(2, 3, resolution, resolution)
    program = torch.export.export(network.eval(), (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    about = json.dumps({"resolution": resolution, **asdict(preprocessing)})
    torch.export.save(program, file, extra_files={_PREPROCESSING: about})


class _Network(ABC):
    """A network in evaluation mode, without gradients."""

    model: Any
    tokens: int
    width: int

    def __init__(self, name: str, features: str, device: str | torch.device) -> None:
        self.name, self.features, self.device = name, features, device

    def _freeze(self, resolution: int) -> None:
        import torch

        self.model.to(self.device).eval().requires_grad_(False)
        _, self.tokens, self.width = self.encode(torch.zeros(1, 3, resolution, resolution)).shape

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """Preprocessed pictures (b, 3, h, w) → features (b, tokens, width)."""

    @abstractmethod
    def _preprocessing(self) -> Any:
        """What the manifest says of it; JSON-able."""

    def describe(self) -> dict[str, Any]:
        about = {"name": self.name, "features": self.features, "weights": weights_digest(self.model)}
        return {**about, "preprocessing": self._preprocessing()}


class _Transformers(_Network):
    """A ViT, or the picture's side of a CLIP, with the image processor that it was saved with."""

    def __init__(self, name: str, place: str, features: str, device: str | torch.device) -> None:
        super().__init__(name, features, device)
        from transformers import AutoImageProcessor, CLIPVisionModel, ViTModel

        cls = CLIPVisionModel if name.startswith("clip:") else ViTModel
        options = {} if cls is CLIPVisionModel else {"add_pooling_layer": False}
        try:
            self.model = cls.from_pretrained(place, **options)
            self._processor = AutoImageProcessor.from_pretrained(place, use_fast=False)
        except (OSError, ValueError) as error:
            raise ConfigError(f"encoder={name}: cannot be loaded: {str(error).splitlines()[0]}") from None
        self._freeze(int(self.model.config.image_size))

    def preprocess(self, images: Sequence[np.ndarray]) -> Tensor:
        pixels: Tensor = self._processor(images=list(images), return_tensors="pt", input_data_format="channels_last")[
            "pixel_values"
        ]
        return pixels

    def encode(self, x: Tensor) -> Tensor:
        import torch

        with torch.no_grad():
            out = self.model(x.to(self.device))
        pooled = getattr(out, "pooler_output", None)
        if self.features == "pooled":
            return (pooled if pooled is not None else out.last_hidden_state[:, 0])[:, None].float()
        states: Tensor = out.last_hidden_state.float()
        return states

    def _preprocessing(self) -> Any:
        return self._processor.to_dict()


class _OpenClip(_Network):
    """The picture's side of an open_clip model; patches are the states of its last layer."""

    def __init__(self, name: str, place: str, features: str, device: str | torch.device) -> None:
        super().__init__(name, features, device)
        import open_clip

        scheme = "hf-hub:" if place.startswith("hf-hub:") else ""
        model, _, pretrained = place[len(scheme) :].partition(":")
        try:
            whole, _, self._transform = open_clip.create_model_and_transforms(
                scheme + model, pretrained=pretrained or None, require_pretrained=True
            )
        except (RuntimeError, OSError, ValueError) as error:
            raise ConfigError(f"encoder={name}: cannot be loaded: {str(error).splitlines()[0]}") from None
        self.model = whole.visual
        self.model.output_tokens = True
        self._freeze(self.model.image_size[0] if isinstance(self.model.image_size, tuple) else self.model.image_size)

    def preprocess(self, images: Sequence[np.ndarray]) -> Tensor:
        import torch
        from PIL import Image

        return torch.stack([self._transform(Image.fromarray(image)) for image in images])

    def encode(self, x: Tensor) -> Tensor:
        import torch

        with torch.no_grad():
            pooled, tokens = self.model(x.to(self.device))
        chosen: Tensor = pooled[:, None].float() if self.features == "pooled" else tokens.float()
        return chosen

    def _preprocessing(self) -> Any:
        return str(self._transform)


class _Program(_Network):
    """What :func:`save_program` wrote; pooled: the mean of the tokens."""

    def __init__(self, name: str, place: str, features: str, device: str | torch.device) -> None:
        super().__init__(name, features, device)
        import torch

        from pipeline.encoders.preprocessing import Preprocessing

        if not zipfile.is_zipfile(place):
            raise ConfigError(f"encoder={name}: cannot be loaded: no file that save_program() wrote")
        extra = {_PREPROCESSING: ""}
        try:
            program = torch.export.load(place, extra_files=extra)
            about = json.loads(extra[_PREPROCESSING])
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(f"encoder={name}: cannot be loaded: {str(error).splitlines()[0]}") from None
        self.model = program.module().to(device).requires_grad_(False)
        self._resolution = int(about.pop("resolution"))
        for channels in ("mean", "std"):
            about[channels] = tuple(about[channels])
        self._prepared = Preprocessing(**about)
        _, self.tokens, self.width = self.encode(torch.zeros(2, 3, self._resolution, self._resolution)).shape

    def preprocess(self, images: Sequence[np.ndarray]) -> Tensor:
        return self._prepared(images, self._resolution, "cpu")

    def encode(self, x: Tensor) -> Tensor:
        import torch

        with torch.no_grad():
            tokens: Tensor = self.model(x.to(self.device)).float()
        return tokens.mean(1, keepdim=True) if self.features == "pooled" else tokens

    def _preprocessing(self) -> Any:
        return {"resolution": self._resolution, **self._prepared.describe()}
