"""Frozen image encoders whose features are the input of captioning models, each with its own preprocessing."""

from __future__ import annotations

import json
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy.typing as npt

from pipeline.config.schema import ConfigError
from pipeline.encoders.base import weights_digest
from pipeline.encoders.spec import ModelSpec
from pipeline.registry import vision_encoders

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from pipeline.encoders.preprocessing import Preprocessing

_RESOLUTION, _PATCH = 64, 8
_PREPROCESSING = "preprocessing.json"


class VisionEncoder(ABC):
    """Images to ``tokens`` features of ``width`` numbers each.

    Attributes:
        usage: how a setting names it if the name alone is not enough: ``clip:<repo or folder>``.
        resolution: edge r of the model's square input images.
        preprocessing: how these are made.
    """

    usage: ClassVar[str] = ""

    name: str
    tokens: int
    width: int
    resolution: int
    preprocessing: Preprocessing

    @classmethod
    @abstractmethod
    def from_spec(cls, spec: ModelSpec, features: str, device: str | torch.device, dtype: str) -> Self:
        """Create the encoder that a setting names; arguments as for :func:`vision_encoder`."""

    def preprocess(self, images: Sequence[npt.NDArray[Any]]) -> Tensor:
        """Images uint8 (h, w, 3) of any sizes → float32 (b, 3, r, r) on the CPU, preprocessed for the model."""
        return self.preprocessing(images, self.resolution, "cpu")

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """(b, 3, r, r) → float32 (b, tokens, width)."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Name, features, preprocessing and hash of the weights, as recorded in manifests and checkpoints."""


def vision_encoder(
    name: str, features: str = "patch", device: str | torch.device = "cpu", dtype: str = "float32"
) -> VisionEncoder:
    """Create the encoder ``name``: ``embedded`` (patches of pixels, no download), ``vit:<repo or folder>``,
    ``clip:<repo or folder>`` (of transformers), ``openclip:<model>[:<pretrained>]``, or ``program:<file>``, any network
    that :func:`save_program` has saved.

    Args:
        features: "patch": all tokens of the last layer; "pooled": one token for the whole image.
        dtype: precision of the network; features are float32.

    Raises:
        ConfigError: there is no such name, model or weights.
    """
    spec = ModelSpec.parse("encoder", name, options=False)
    found: VisionEncoder = spec.find(vision_encoders).from_spec(spec, features, device, dtype)
    return found


@vision_encoders.register("embedded")
class _Patches(VisionEncoder):
    """The pixels of each patch in [-1, 1], concatenated; pooled: the mean over patches."""

    def __init__(self, features: str) -> None:
        from pipeline.encoders.preprocessing import Preprocessing

        self.name, self.features, self.resolution = "embedded", features, _RESOLUTION
        self.preprocessing = Preprocessing()
        self.tokens = 1 if features == "pooled" else (_RESOLUTION // _PATCH) ** 2
        self.width = 3 * _PATCH * _PATCH

    @classmethod
    def from_spec(cls, spec: ModelSpec, features: str, device: str | torch.device, dtype: str) -> Self:
        return cls(features)

    def encode(self, x: Tensor) -> Tensor:
        import torch.nn.functional as F

        patches = F.unfold(x, _PATCH, stride=_PATCH).transpose(1, 2)
        return patches.mean(1, keepdim=True) if self.features == "pooled" else patches

    def describe(self) -> dict[str, Any]:
        preprocessing = {"resolution": _RESOLUTION, "patch": _PATCH, **self.preprocessing.describe()}
        return {"name": self.name, "features": self.features, "preprocessing": preprocessing}


def save_program(network: nn.Module, file: str | Path, resolution: int, preprocessing: Preprocessing) -> None:
    """Save a network (b, 3, resolution, resolution) → (b, tokens, width) as an encoder that does not need its code.

    Args:
        file: for use as ``program:<file>``; it holds the weights, the operations and the preprocessing.
    """
    import torch

    example = torch.zeros(2, 3, resolution, resolution)
    program = torch.export.export(network.eval(), (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    about = json.dumps({"resolution": resolution, **asdict(preprocessing)})
    torch.export.save(program, file, extra_files={_PREPROCESSING: about})


class _Network(VisionEncoder):
    """A network in evaluation mode, without gradients."""

    model: Any

    @classmethod
    def from_spec(cls, spec: ModelSpec, features: str, device: str | torch.device, dtype: str) -> Self:
        return cls(spec.text, spec.place, features, device, dtype)

    def __init__(self, name: str, place: str, features: str, device: str | torch.device, dtype: str) -> None:
        import torch

        self.name, self.features, self.device = name, features, torch.device(device)
        self.dtype = getattr(torch, dtype)

    def _freeze(self, resolution: int) -> None:
        import torch

        self._weights = weights_digest(self.model)  # before precision is reduced
        self.model.to(self.device, self.dtype).eval().requires_grad_(False)
        self.resolution = resolution
        _, self.tokens, self.width = self.encode(torch.zeros(1, 3, resolution, resolution)).shape

    def describe(self) -> dict[str, Any]:
        about = {"name": self.name, "features": self.features, "weights": self._weights}
        precision = {} if self.dtype.itemsize == 4 else {"dtype": str(self.dtype).removeprefix("torch.")}
        return {
            **about,
            **precision,
            "preprocessing": {"resolution": self.resolution, **self.preprocessing.describe()},
        }


@vision_encoders.register("vit")
@vision_encoders.register("clip")
class _Transformers(_Network):
    """A ViT, or the image side of CLIP, with the preprocessing of its image processor."""

    def __init__(self, name: str, place: str, features: str, device: str | torch.device, dtype: str) -> None:
        super().__init__(name, place, features, device, dtype)
        from transformers import CLIPVisionModel, ViTModel

        from pipeline.encoders.transformers import load_image_model, load_image_processor, preprocessing_of

        load = (
            CLIPVisionModel.from_pretrained
            if name.startswith("clip:")
            else partial(ViTModel.from_pretrained, add_pooling_layer=False)
        )
        self.model, processor, _ = load_image_model(f"encoder={name}", place, load, load_image_processor)
        self.preprocessing, resolution = preprocessing_of(processor, f"encoder={name}")
        self._freeze(resolution)

    def encode(self, x: Tensor) -> Tensor:
        import torch

        with torch.no_grad():
            out = self.model(x.to(self.device, self.dtype))
        pooled = getattr(out, "pooler_output", None)
        if self.features == "pooled":
            found: Tensor = (pooled if pooled is not None else out.last_hidden_state[:, 0])[:, None].float()
            return found
        states: Tensor = out.last_hidden_state.float()
        return states


@vision_encoders.register("openclip")
class _OpenClip(_Network):
    """The image side of an open_clip model; patch features are the states of its last layer."""

    def __init__(self, name: str, place: str, features: str, device: str | torch.device, dtype: str) -> None:
        super().__init__(name, place, features, device, dtype)
        import open_clip

        from pipeline.encoders.openclip import preprocessing_of

        scheme = "hf-hub:" if place.startswith("hf-hub:") else ""
        model, _, pretrained = place[len(scheme) :].partition(":")
        try:
            whole = open_clip.create_model(scheme + model, pretrained=pretrained or None, require_pretrained=True)
        except (RuntimeError, OSError, ValueError) as error:
            raise ConfigError(f"encoder={name}: cannot be loaded: {str(error).splitlines()[0]}") from None
        self.preprocessing, resolution = preprocessing_of(whole.visual, f"encoder={name}")
        self.model = whole.visual
        self.model.output_tokens = True
        self._freeze(resolution)

    def encode(self, x: Tensor) -> Tensor:
        import torch

        with torch.no_grad():
            pooled, tokens = self.model(x.to(self.device, self.dtype))
        chosen: Tensor = pooled[:, None].float() if self.features == "pooled" else tokens.float()
        return chosen


@vision_encoders.register("program")
class _Program(_Network):
    """A network saved by :func:`save_program`, in its stored precision; pooled: the mean of the tokens."""

    def __init__(self, name: str, place: str, features: str, device: str | torch.device, dtype: str) -> None:
        super().__init__(name, place, features, device, "float32")
        import torch

        from pipeline.encoders.preprocessing import Preprocessing

        if not zipfile.is_zipfile(place):
            raise ConfigError(f"encoder={name}: cannot be loaded: it was not written by save_program()")
        extra = {_PREPROCESSING: ""}
        try:
            program = torch.export.load(place, extra_files=extra)
            about = json.loads(extra[_PREPROCESSING])
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(f"encoder={name}: cannot be loaded: {str(error).splitlines()[0]}") from None
        self.model = program.module().to(device).requires_grad_(False)
        self._weights = weights_digest(self.model)
        self.resolution = int(about.pop("resolution"))
        for channels in ("mean", "std"):
            about[channels] = tuple(about[channels])
        self.preprocessing = Preprocessing(**about)
        _, self.tokens, self.width = self.encode(torch.zeros(2, 3, self.resolution, self.resolution)).shape

    def encode(self, x: Tensor) -> Tensor:
        import torch

        with torch.no_grad():
            tokens: Tensor = self.model(x.to(self.device)).float()
        return tokens.mean(1, keepdim=True) if self.features == "pooled" else tokens
