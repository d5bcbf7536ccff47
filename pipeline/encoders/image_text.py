"""The two towers of models that embed images and, if they have a text tower, captions as vectors in the same space:
``embedded``, ``openclip:<model>[:<pretrained>]``, ``hf:<repo or folder>``, ``program:<file>``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from pipeline.config.options import ConfigError
from pipeline.encoders.base import ImageEncoder, TextTower, image_encoder, sent
from pipeline.encoders.spec import ModelSpec
from pipeline.encoders.transformers import Loaded, load_image_model, load_image_processor, load_text, preprocessing_of
from pipeline.registry import image_encoders

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
_IMAGE_PARTS = ("vision_model", "visual_projection")
_TEXT_PARTS = ("text_model", "text_projection")
"""Names of the towers in transformers' two-tower models."""
_POOLER = "pooler"
_CLASS_TOKENS = 2  # at most: DeiT has one for its teacher, too
_UNMASKED = ("siglip", "siglip2")
"""Models that were trained on padded texts without an attention mask."""
_LENGTH = 77


def image_tower(spec: str, setting: str, device: str | torch.device = "cpu", dtype: str = "float32") -> ImageEncoder:
    """Create the image encoder ``spec``, see :func:`~pipeline.encoders.base.image_encoder`.

    Args:
        setting: the setting and its value, for messages.
        dtype: precision of the network.

    Raises:
        ConfigError: there is no such kind, model or weights.
    """
    return _for(setting, f"image_encoder={spec}", lambda: image_encoder(spec, device, dtype))


def text_tower(spec: str, setting: str, device: str | torch.device = "cpu", dtype: str = "float32") -> TextTower:
    """Create the text tower that belongs to the image tower ``spec``.

    Raises:
        ConfigError: the model has no text tower, or there is no such kind, model or weights.
    """
    kind, _, place = spec.partition(":")
    if kind == "openclip" and place:
        from pipeline.encoders.openclip import OpenClipTextTower

        return _for(setting, f"text_encoder={spec}", lambda: OpenClipTextTower(place, device, dtype))
    if kind in ("hf", "clip") and place:
        return HfTextTower(place, setting, device, dtype)
    raise ConfigError(f"{setting}: this model has no text tower: use openclip:<model>[:<pretrained>] or hf:<a CLIP>")


def _for(setting: str, other: str, make: Callable[[], T]) -> T:
    """Call ``make``; its errors name ``setting`` instead of ``other``."""
    try:
        return make()
    except ConfigError as error:
        raise ConfigError(str(error).replace(other, setting, 1)) from error


@image_encoders.register("hf")
class HfImageEncoder(Loaded, ImageEncoder):
    """The image side of any model of transformers, of unit length: the projection if the model has a text side, else
    the output of its pooler, else the state of its first token. Vision transformers also give the last
    states of patches.

    Raises:
        ConfigError: there is no such repository, folder or safetensors file, or images are not resized to a square.
    """

    @classmethod
    def from_spec(cls, spec: ModelSpec, device: str | torch.device, dtype: str) -> HfImageEncoder:
        return cls(spec.place, str(spec), device, dtype)

    def __init__(self, place: str, setting: str, device: str | torch.device = "cpu", dtype: str = "float32") -> None:
        from transformers import AutoModel

        model, steps, missing = load_image_model(
            setting,
            place,
            AutoModel.from_pretrained,
            load_image_processor,
            optional=_POOLER,
        )
        self._projects = hasattr(model, "get_image_features")
        self._pools = not missing  # transformers initialises a missing pooler randomly
        if missing:
            setattr(model, _POOLER, None)
        self.preprocessing, self.resolution = preprocessing_of(steps, setting)
        super().__init__("hf", _without(model, _TEXT_PARTS), place, device, dtype)
        self.width = int(self.encode(torch.zeros(1, 3, self.resolution, self.resolution)).shape[1])
        self._tower = getattr(self._model, "vision_model", self._model)
        sized = "interpolate_pos_encoding" in inspect.signature(self._tower.forward).parameters
        self._sized = {"interpolate_pos_encoding": True} if sized else {}
        self.patch_width = int(getattr(self._tower.config, "hidden_size", 0))

    def compile(self) -> None:
        self._tower.compile(dynamic=True)

    @cached_property
    def patch(self) -> int:
        """Edge of a patch; 0 if an image of 2 x 3 patches does not give 6 tokens, class and register tokens aside."""
        edge = getattr(self._tower.config, "patch_size", 0)
        if not isinstance(edge, int) or not edge:
            return 0
        try:
            states = self._states(torch.zeros(1, 3, 2 * edge, 3 * edge))
        except (ValueError, RuntimeError):  # the model takes images of one size only, or larger ones
            return 0
        most = _CLASS_TOKENS + int(getattr(self._tower.config, "num_register_tokens", 0))
        fits = states.ndim == 3 and 6 <= states.shape[1] <= 6 + most and states.shape[2] == self.patch_width
        return edge if fits else 0

    @torch.no_grad()
    def encode_patches(self, x: Tensor) -> Tensor:
        """float (b, 3, h, w) of whole patches → float32 (b, n, patch_width), the ``last_hidden_state`` of
        patches, which are the last tokens."""
        count = (x.shape[2] // self.patch) * (x.shape[3] // self.patch)
        return self._states(x)[:, -count:].float()

    @torch.no_grad()
    def _states(self, x: Tensor) -> Tensor:
        found: Tensor = self._tower(pixel_values=x.to(self.device, self.dtype), **self._sized).last_hidden_state
        return found

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """float (b, 3, resolution, resolution) → float32 (b, width)."""
        x = x.to(self.device, self.dtype)
        if self._projects:
            return _unit(self._model.get_image_features(pixel_values=x))
        said = self._model(pixel_values=x)
        pooled = getattr(said, "pooler_output", None) if self._pools else None
        return _unit(said.last_hidden_state[:, 0] if pooled is None else pooled)

    def describe(self) -> dict[str, Any]:
        said = {"width": self.width, "resolution": self.resolution, "preprocessing": self.preprocessing.describe()}
        return {**self._said(), **said}


class HfClassifier(Loaded):
    """An image classifier of transformers.

    Attributes:
        classes: names of the classes.

    Raises:
        ConfigError: there is no such repository, folder or safetensors file, the model is not a classifier, or images
            are not resized to a square.
    """

    def __init__(self, place: str, setting: str, device: str | torch.device = "cpu", dtype: str = "float32") -> None:
        from transformers import AutoModelForImageClassification

        model, steps, _ = load_image_model(
            setting,
            place,
            AutoModelForImageClassification.from_pretrained,
            load_image_processor,
        )
        self.preprocessing, self.resolution = preprocessing_of(steps, setting)
        super().__init__("hf", model, place, device, dtype)
        names = model.config.id2label
        self.classes = [str(names[number]) for number in range(model.config.num_labels)]

    @torch.no_grad()
    def probabilities(self, x: Tensor) -> Tensor:
        """float (b, 3, resolution, resolution) → float32 (b, classes)."""
        logits: Tensor = self._model(pixel_values=x.to(self.device, self.dtype)).logits
        return logits.float().softmax(-1)

    def describe(self) -> dict[str, Any]:
        return {**self._said(), "preprocessing": self.preprocessing.describe(), "classes": self.classes}


class HfTextTower(Loaded, TextTower):
    """The text side of a two-tower model of transformers (CLIP, SigLIP), of unit length.

    Raises:
        ConfigError: there is no such repository, folder or safetensors file, or the model has no text side.
    """

    def __init__(self, place: str, setting: str, device: str | torch.device = "cpu", dtype: str = "float32") -> None:
        from transformers import AutoModel, AutoTokenizer

        try:
            model, self._tokenizer = load_text("hf", place, AutoModel.from_pretrained, AutoTokenizer.from_pretrained)
        except ConfigError as error:
            raise ConfigError(str(error).replace(f"text_encoder=hf:{place}", setting, 1)) from error
        if not hasattr(model, "get_text_features"):
            raise ConfigError(f"{setting}: this model has no text tower: it is a {type(model).__name__}")
        text = model.config.get_text_config()
        self._masked = model.config.model_type not in _UNMASKED
        self._length = int(getattr(text, "max_position_embeddings", _LENGTH))
        super().__init__("hf", _without(model.float(), _IMAGE_PARTS), place, device, dtype)
        self.width = int(self.encode([""]).shape[1])

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> Tensor:
        """Captions → float32 (b, width), padded to the length that the model was trained with."""
        tokens = self._tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=self._length, return_tensors="pt"
        )
        masked = {"attention_mask": sent(tokens["attention_mask"], self.device)} if self._masked else {}
        return _unit(self._model.get_text_features(input_ids=sent(tokens["input_ids"], self.device), **masked))

    def describe(self) -> dict[str, Any]:
        return {**self._said(), "width": self.width, "length": self._length}


@image_encoders.register("program")
class ProgramImageEncoder(ImageEncoder):
    """The mean token of any network saved by :func:`~pipeline.encoders.vision.save_program`, of unit length.

    Raises:
        ConfigError: ``spec`` does not name such a file.
    """

    @classmethod
    def from_spec(cls, spec: ModelSpec, device: str | torch.device, dtype: str) -> ProgramImageEncoder:
        return _for(str(spec), f"encoder={spec.text}", lambda: cls(spec.text, device, dtype))

    def __init__(self, spec: str, device: str | torch.device = "cpu", dtype: str = "float32") -> None:
        from pipeline.encoders.vision import vision_encoder

        self._encoder = vision_encoder(spec, "pooled", device, dtype)
        self.name, self.device = spec, torch.device(device)
        self.width, self.resolution = self._encoder.width, self._encoder.resolution
        self.preprocessing = self._encoder.preprocessing

    def encode(self, x: Tensor) -> Tensor:
        """float (b, 3, resolution, resolution) → float32 (b, width)."""
        return _unit(self._encoder.encode(x)[:, 0])

    def describe(self) -> dict[str, Any]:
        return self._encoder.describe()


def _without(model: Any, parts: Sequence[str]) -> Any:
    """``model`` without the modules ``parts``: weights of the other side are not needed, and take memory."""
    for part in parts:
        if hasattr(model, part):
            delattr(model, part)
    return model


def _unit(x: Any) -> Tensor:
    """Normalise vectors, or the ``pooler_output`` that holds them, to unit length in float32."""
    return torch.nn.functional.normalize(getattr(x, "pooler_output", x).float(), dim=-1)
