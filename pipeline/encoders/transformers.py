"""CLIP and T5 of the transformers library."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from pipeline.config.schema import ConfigError
from pipeline.encoders.base import (
    ImageEncoder,
    TextEncoder,
    commit_of,
    repository,
    sent,
    weights_digest,
)
from pipeline.encoders.failures import UNLOADABLE, not_loaded
from pipeline.encoders.from_hub import expect_model
from pipeline.encoders.preprocessing import Preprocessing
from pipeline.encoders.spec import LAYERS, ModelSpec
from pipeline.registry import image_encoders, text_encoders

if TYPE_CHECKING:
    from torch import Tensor

_PART = re.compile(r"(.+)/(text_encoder(?:_\d)?)")
_SUBFOLDERS = ("", "text_encoder")
_VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model")


class Loaded:
    """A model in the requested precision, with its name and digest."""

    def __init__(
        self, kind: str, model: Any, place: str, device: str | torch.device, dtype: str, device_map: str = ""
    ) -> None:
        self.name = f"{kind}:{place}"
        self.device = torch.device(device)
        self.dtype = getattr(torch, dtype)
        self._place = place
        self._weights = weights_digest(model)
        model = model.to(dtype=self.dtype).eval().requires_grad_(False)
        self._model = _distributed(model) if device_map else model.to(self.device)

    def compile(self) -> None:
        self._model.compile(dynamic=True)

    def _said(self) -> dict[str, Any]:
        return {
            "name": self.name,
            **commit_of(*repository(_part(self._place)[0])),
            "dtype": str(self.dtype).removeprefix("torch."),
            "weights_xxh3": self._weights,
        }


@text_encoders.register("clip")
class ClipTextEncoder(Loaded, TextEncoder):
    """The text tower of CLIP: the states of all tokens; pooled, the state at the end of the text.

    Args:
        place: a repository (``owner/name[@revision]``) or folder, of CLIP itself or of a pipeline with
            ``text_encoder/`` and ``tokenizer/``; ``<pipeline>/text_encoder_2`` is its second text encoder, with
            ``tokenizer_2/``. If it has a projection, pooled embeddings are projected, as in Stable Diffusion XL.
        layer: ``last``, after the last layer norm (Stable Diffusion 1); ``penultimate``, the last block's input without
            a norm (Stable Diffusion XL).

    Raises:
        ConfigError: there is no such repository, folder or safetensors file.
    """

    takes = ("layer",)

    @classmethod
    def from_spec(cls, spec: ModelSpec, device: str | torch.device, dtype: str) -> Self:
        return cls(spec.place, device, dtype, spec.choice("layer", LAYERS))

    def __init__(
        self, place: str, device: str | torch.device = "cpu", dtype: str = "float32", layer: str = "last"
    ) -> None:
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

        def load(name: str, **where: Any) -> Any:
            """Load the model, with its projection if it was saved with one."""
            config = CLIPTextConfig.from_pretrained(name, **_places(where))
            projects = "CLIPTextModelWithProjection" in (config.architectures or ())
            return (CLIPTextModelWithProjection if projects else CLIPTextModel).from_pretrained(name, **where)

        model, self._tokenizer = load_text("clip", place, load, CLIPTokenizer.from_pretrained)
        super().__init__("clip", model.float(), place, device, dtype)
        self.layer = layer
        self.length = int(model.config.max_position_embeddings)
        self.width = int(model.config.hidden_size)
        self._projects = hasattr(model, "text_projection")
        self.pooled_width = int(model.config.projection_dim) if self._projects else self.width

    def encode(self, captions: Sequence[str]) -> Tensor:
        """Captions → float32 (b, length, width); the tokenizer truncates and pads."""
        return self.encode_pooled(captions)[0]

    @torch.no_grad()
    def encode_pooled(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Like :meth:`encode`, and also the pooled embeddings, float32 (b, pooled_width)."""
        tokens = self._tokenizer(
            list(captions), padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        )
        penultimate = self.layer == "penultimate"
        states = self._model(sent(tokens["input_ids"], self.device), output_hidden_states=penultimate)
        chosen: Tensor = states.hidden_states[-2] if penultimate else states.last_hidden_state
        pooled: Tensor = states.text_embeds if self._projects else states.pooler_output
        return chosen.float(), pooled.float()

    def tokens(self, captions: Sequence[str]) -> list[int]:
        ids = self._tokenizer(list(captions), max_length=self.length, truncation=True)["input_ids"]
        return [len(row) for row in ids]

    def describe(self) -> dict[str, Any]:
        return {**self._said(), "length": self.length, "width": self.width, "layer": self.layer}


@text_encoders.register("t5")
class T5TextEncoder(Loaded, TextEncoder):
    """T5's encoder: the states of a caption's tokens, with zeros after its end.

    Padding is masked, so that states do not depend on it; batches are padded to their longest caption only.

    Args:
        place: a repository (``owner/name[@revision]``) or folder, of T5 itself or of a pipeline with
            ``text_encoder/`` and ``tokenizer/``; ``<pipeline>/text_encoder_3`` is its third text encoder, with
            ``tokenizer_3/``.
        length: maximum number of tokens.
        mask: False: captions are padded to ``length``, and padding counts as tokens and has states, as in the pipelines
            of Stable Diffusion 3 and FLUX.

    Raises:
        ConfigError: there is no such repository, folder or safetensors file.
    """

    takes = ("length", "mask")

    @classmethod
    def from_spec(cls, spec: ModelSpec, device: str | torch.device, dtype: str) -> Self:
        return cls(spec.place, device, dtype, spec.tokens("length") or 256, spec.flag("mask") is not False)

    def __init__(
        self,
        place: str,
        device: str | torch.device = "cpu",
        dtype: str = "float32",
        length: int = 256,
        mask: bool = True,
    ) -> None:
        from transformers import AutoTokenizer, T5EncoderModel

        # float16 would overflow in the feed-forward layers of T5 v1.1; bfloat16 has float32's range
        model, self._tokenizer = load_text("t5", place, T5EncoderModel.from_pretrained, AutoTokenizer.from_pretrained)
        super().__init__("t5", model.float(), place, device, "float32" if dtype == "float16" else dtype)
        self.length, self.mask = length, mask
        self.width = int(model.config.d_model)

    def lengths(self, captions: Sequence[str]) -> list[int]:
        if not self.mask:
            return super().lengths(captions)
        ids = self._tokenizer(list(captions), max_length=self.length, truncation=True)["input_ids"]
        return [len(row) for row in ids]

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> Tensor:
        """Captions → float32 (b, length, width)."""
        padding = "longest" if self.mask else "max_length"
        tokens = self._tokenizer(
            list(captions), padding=padding, max_length=self.length, truncation=True, return_tensors="pt"
        )
        if not self.mask:
            whole: Tensor = self._model(sent(tokens["input_ids"], self.device)).last_hidden_state
            return whole.float()
        mask = sent(tokens["attention_mask"], self.device)
        states = self._model(sent(tokens["input_ids"], self.device), attention_mask=mask).last_hidden_state.float()
        padded: Tensor = states.new_zeros((len(captions), self.length, self.width))
        padded[:, : states.shape[1]] = states * mask[:, :, None]
        return padded

    def describe(self) -> dict[str, Any]:
        return {
            **self._said(),
            "length": self.length,
            "width": self.width,
            "padding": "zeros" if self.mask else "states",
        }


@image_encoders.register("clip")
class ClipImageEncoder(Loaded, ImageEncoder):
    """CLIP's embedding of an image: pooled, projected, of unit length.

    Raises:
        ConfigError: there is no such repository, folder or safetensors file.
    """

    @classmethod
    def from_spec(cls, spec: ModelSpec, device: str | torch.device, dtype: str) -> Self:
        return cls(spec.place, device, dtype)

    def __init__(self, place: str, device: str | torch.device = "cpu", dtype: str = "float32") -> None:
        from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

        setting = f"image_encoder=clip:{place}"
        model, steps, _ = load_image_model(
            setting, place, CLIPVisionModelWithProjection.from_pretrained, CLIPImageProcessor.from_pretrained
        )
        super().__init__("clip", model, place, device, dtype)
        self.width = int(model.config.projection_dim)
        self.preprocessing, self.resolution = preprocessing_of(steps, setting)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """float (b, 3, resolution, resolution) → float32 (b, width)."""
        embeds = self._model(x.to(self.device, self.dtype)).image_embeds.float()
        return torch.nn.functional.normalize(embeds, dim=-1)

    def describe(self) -> dict[str, Any]:
        said = {"width": self.width, "resolution": self.resolution, "preprocessing": self.preprocessing.describe()}
        return {**self._said(), **said}


_MODES = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box"}
"""Pillow's numeric codes of interpolations."""
_PLAIN = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)


def preprocessing_of(processor: Any, name: str) -> tuple[Preprocessing, int]:
    """Convert an image processor of transformers to our preprocessing and the edge of its images, with equal sizes and
    offsets. ``name``: the setting and its value, for messages.

    Raises:
        ConfigError: it does anything but resize, center-crop and normalise.
    """
    given = processor.to_dict()
    size, cut = given.get("size") or {}, given.get("crop_size") or {}
    if given.get("do_center_crop"):
        edge, shorter = int(cut.get("height", 0)), int(size.get("shortest_edge", 0))
        square = edge == cut.get("width") and shorter >= edge
    else:
        edge, shorter = int(size.get("height", 0)), 0
        square = edge == size.get("width")
    mode = _MODES.get(given.get("resample", 2), "")
    scaled = given.get("do_rescale", True) and abs(255 * given.get("rescale_factor", 1 / 255) - 1) < 1e-6
    if not (edge and square and mode and scaled and given.get("do_resize", True)) or given.get("do_pad"):
        kind = type(processor).__name__
        raise ConfigError(f"{name}: its {kind} does more than resize, cut out a centred square and normalise")
    mean, std = (tuple(given["image_mean"]), tuple(given["image_std"])) if given.get("do_normalize", True) else _PLAIN
    return Preprocessing(mean, std, mode, not shorter, 0 if shorter == edge else shorter, floor=True), edge


def _distributed(model: Any) -> Any:
    """``model`` with as many blocks as fit on the GPUs visible to this process, and the others on the host."""
    from accelerate import dispatch_model, infer_auto_device_map

    blocks = getattr(model, "_no_split_modules", None) or []
    return dispatch_model(model, infer_auto_device_map(model, no_split_module_classes=blocks))


def _part(place: str) -> tuple[str, str]:
    """Split off the name of a pipeline's text encoder: ``a/text_encoder_2`` → ``a``, ``text_encoder_2``."""
    match = _PART.fullmatch(place.rstrip("/"))
    if match is None or (Path(place) / "tokenizer_config.json").is_file():
        return place, ""
    return match[1], match[2]


def load_text(kind: str, place: str, load: Any, load_tokenizer: Any) -> tuple[Any, Any]:
    """Load the model on the CPU, and its tokenizer; from a pipeline, its first text encoder unless another is named."""
    whole, part = _part(place)
    expect_model(f"text_encoder={kind}:{place}", whole)
    name, revision = repository(whole)
    error, within = Exception(), ""
    for subfolder in (part,) if part else _SUBFOLDERS:
        tokens = subfolder.replace("text_encoder", "tokenizer")
        try:
            model = load(name, subfolder=subfolder, revision=revision, use_safetensors=True)
            return model, load_tokenizer(name, subfolder=tokens, revision=revision)
        except UNLOADABLE as failed:
            if not str(error) or (Path(name) / subfolder).is_dir():  # otherwise the subfolder was only a guess
                error, within = failed, subfolder and f"{subfolder}/"
    tokens = within.replace("text_encoder", "tokenizer")
    needed = [*_needed(within), "|".join(f"{tokens}{file}" for file in _VOCABULARIES)]
    raise not_loaded(f"text_encoder={kind}:{place}", whole, error, *needed) from error


def load_image_model(
    setting: str, place: str, load: Any, load_processor: Any, optional: str = ""
) -> tuple[Any, Any, list[str]]:
    """Load a model in float32 on the CPU, its image processor, and the names of weights missing from the file.

    Args:
        setting: the setting and its value, for messages.
        place: a repository (``owner/name[@revision]``) or folder.
        load: ``from_pretrained`` of the model's class.
        optional: name of a module whose weights may be missing from the file; they are random then.

    Raises:
        ConfigError: there is no such repository, folder or safetensors file, or weights are missing, which transformers
            would initialise randomly.
    """
    expect_model(setting, place)
    name, revision = repository(place)
    try:
        model, said = load(name, revision=revision, use_safetensors=True, output_loading_info=True)
        processor = load_processor(name, revision=revision)
    except UNLOADABLE as error:
        raise not_loaded(setting, place, error, *_needed(), "preprocessor_config.json") from error
    missing = sorted(said["missing_keys"])
    wrong = [key for key in missing if not optional or not key.startswith(f"{optional}.")]
    if wrong or said["mismatched_keys"]:
        lacks = wrong or [key for key, *_ in said["mismatched_keys"]]
        raise ConfigError(
            f"{setting}: {place} holds another kind of model: it has no {lacks[0]}"
            f"{f', nor {len(lacks) - 1} other weights' if lacks[1:] else ''} for {type(model).__name__}"
        )
    return model.float(), processor, missing


def load_image_processor(name: str, **where: Any) -> Any:
    """The image processor of a model, without torchvision if possible: only its settings are used."""
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(name, use_fast=False, **where)
    except ValueError as error:
        if "does not have a slow version" not in str(error):
            raise
        return AutoImageProcessor.from_pretrained(name, use_fast=True, **where)


def _needed(folder: str = "") -> list[str]:
    """Files of a model, whose weights may be split over several."""
    return [f"{folder}config.json", f"{folder}model.safetensors|{folder}model.safetensors.index.json"]


def _places(where: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in where.items() if name in ("subfolder", "revision")}
