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
from pipeline.encoders.preprocessing import Preprocessing
from pipeline.encoders.spec import LAYERS, ModelSpec
from pipeline.registry import image_encoders, text_encoders

if TYPE_CHECKING:
    from torch import Tensor

_PART = re.compile(r"(.+)/(text_encoder(?:_\d)?)")
_SUBFOLDERS = ("", "text_encoder")
_VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model")


class Loaded:
    """A model in the precision asked for, what it is called, and its digest."""

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
    """The text tower of CLIP: the states of all tokens; pooled, the state of the end of the text.

    Args:
        place: a repository (``owner/name[@revision]``) or folder, of CLIP itself or of a pipeline with
            ``text_encoder/`` and ``tokenizer/``; ``<pipeline>/text_encoder_2`` is its second one, with
            ``tokenizer_2/``. One with a projection pools as Stable Diffusion XL does: projected.
        layer: ``last``, after the last layer norm (Stable Diffusion 1); ``penultimate``, what the last block takes, as
            it is (Stable Diffusion XL).

    Raises:
        ConfigError: no such repository or folder, or no safetensors.
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
            """With its projection, if it was saved with one as a model of its own."""
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
        """Captions → float32 (b, length, width); the tokenizer cuts and pads."""
        return self.encode_pooled(captions)[0]

    @torch.no_grad()
    def encode_pooled(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """The same, and float32 (b, pooled_width)."""
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
    """T5's encoder: the states of a caption's tokens, zeros after its end.

    Padding is masked, so states do not depend on it; batches are padded to their longest caption only.

    Args:
        place: a repository (``owner/name[@revision]``) or folder, of T5 itself or of a pipeline with
            ``text_encoder/`` and ``tokenizer/``; ``<pipeline>/text_encoder_3`` is its third one, with ``tokenizer_3/``.
        length: captions are cut to this many tokens.
        mask: False: captions are padded to ``length``, padding counts as tokens and has states, as the pipelines of
            Stable Diffusion 3 and FLUX have it.

    Raises:
        ConfigError: no such repository or folder, or no safetensors.
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

        # bfloat16 has float32's range; in float16 the feed-forward layers of T5 v1.1 overflow
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
        ConfigError: no such repository or folder, or no safetensors.
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
"""Pillow's numbers of interpolations."""
_PLAIN = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)


def preprocessing_of(processor: Any, name: str) -> tuple[Preprocessing, int]:
    """What an image processor of transformers does, done by us, and the edge of its images: sizes and offsets are the
    same. ``name``: the setting and its value, for messages.

    Raises:
        ConfigError: it does something else than to resize, to cut out the centre and to normalise.
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
    """``model`` with its blocks on the GPUs that this process sees, as far as they fit, and the others on the host."""
    from accelerate import dispatch_model, infer_auto_device_map

    blocks = getattr(model, "_no_split_modules", None) or []
    return dispatch_model(model, infer_auto_device_map(model, no_split_module_classes=blocks))


def _part(place: str) -> tuple[str, str]:
    """Repository or folder, and the text encoder of a pipeline that is meant: ``a/text_encoder_2`` is of ``a``."""
    match = _PART.fullmatch(place.rstrip("/"))
    if match is None or (Path(place) / "tokenizer_config.json").is_file():
        return place, ""
    return match[1], match[2]


def load_text(kind: str, place: str, load: Any, load_tokenizer: Any) -> tuple[Any, Any]:
    """Model on the CPU, and tokenizer; of a pipeline, the first text encoder unless another is named."""
    whole, part = _part(place)
    name, revision = repository(whole)
    error, within = Exception(), ""
    for subfolder in (part,) if part else _SUBFOLDERS:
        tokens = subfolder.replace("text_encoder", "tokenizer")
        try:
            model = load(name, subfolder=subfolder, revision=revision, use_safetensors=True)
            return model, load_tokenizer(name, subfolder=tokens, revision=revision)
        except UNLOADABLE as failed:
            if not str(error) or (Path(name) / subfolder).is_dir():  # else a pipeline's folder is only a guess
                error, within = failed, subfolder and f"{subfolder}/"
    tokens = within.replace("text_encoder", "tokenizer")
    needed = [*_needed(within), "|".join(f"{tokens}{file}" for file in _VOCABULARIES)]
    raise not_loaded(f"text_encoder={kind}:{place}", whole, error, *needed) from error


def load_image_model(
    setting: str, place: str, load: Any, load_processor: Any, optional: str = ""
) -> tuple[Any, Any, list[str]]:
    """Model in float32 on the CPU, image processor, and names of weights that the file does not have.

    Args:
        setting: the setting and its value, for messages.
        place: a repository (``owner/name[@revision]``) or folder.
        load: ``from_pretrained`` of the model's class.
        optional: the name of a module whose weights the file need not have; they are random then.

    Raises:
        ConfigError: no such repository or folder, no safetensors, or weights are missing: transformers would make them
            up.
    """
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


def _needed(folder: str = "") -> list[str]:
    """Files of a model, whose weights may lie in several."""
    return [f"{folder}config.json", f"{folder}model.safetensors|{folder}model.safetensors.index.json"]


def _places(where: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in where.items() if name in ("subfolder", "revision")}
