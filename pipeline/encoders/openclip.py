"""open_clip: the states of all tokens after the last layer norm, before pooling and projection; and image embeddings.

Text-to-image models are conditioned on these states; micro_diffusion's ``precompute.py`` stores the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

import torch

from pipeline.config.cli import nearest
from pipeline.config.schema import ConfigError
from pipeline.encoders.base import ImageEncoder, TextEncoder, TextTower, commit_of, sent, weights_digest
from pipeline.encoders.from_hub import expect_model
from pipeline.encoders.preprocessing import Preprocessing
from pipeline.encoders.spec import LAYERS, ModelSpec
from pipeline.registry import image_encoders, text_encoders

if TYPE_CHECKING:
    from torch import Tensor, nn

_SCHEMAS = ("hf-hub:", "local-dir:")
_RANDOM = "random"


@text_encoders.register("openclip")
class OpenClipTextEncoder(TextEncoder):
    """The text tower of ``<model>[:<pretrained>]``.

    Args:
        spec: ``ViT-H-14:laion2b_s32b_b79k`` (a model and a tag of its weights), ``ViT-H-14:/path/to/weights``,
            ``hf-hub:apple/DFN5B-CLIP-ViT-H-14-378`` or ``local-dir:/path`` (both include weights), or
            ``ViT-B-32:random`` (always the same random weights, for trials).
        dtype: precision of the network; states are float32.
        layer: ``last``; or ``penultimate``: without the last block, through the same layer norm (Stable Diffusion 2).

    Raises:
        ConfigError: there is no such model or weights, or the text tower is not open_clip's own.
    """

    takes = ("layer",)

    @classmethod
    def from_spec(cls, spec: ModelSpec, device: str | torch.device, dtype: str) -> Self:
        return cls(spec.place, device, dtype, spec.choice("layer", LAYERS))

    def __init__(
        self, spec: str, device: str | torch.device = "cpu", dtype: str = "float32", layer: str = "last"
    ) -> None:
        import open_clip

        self.name = f"openclip:{spec}"
        self.device = torch.device(device)
        self.dtype = getattr(torch, dtype)
        self.layer = layer
        model_name, pretrained = _split(spec)
        self._model_name = model_name
        model = _create(f"text_encoder={self.name}", model_name, pretrained)
        del model.visual
        self._tokenize = open_clip.get_tokenizer(model_name)
        norm = _final_norm(self.name, model)
        self.length = int(model.context_length)
        self.width = int(norm.weight.shape[0])
        self._weights = weights_digest(model)
        if layer == "penultimate":
            tower = getattr(model, "text", model)
            del tower.transformer.resblocks[-1]
        self._model = model.to(self.device, self.dtype).eval().requires_grad_(False)
        self._states: Tensor | None = None
        self.pooled_width = self._pooled_width()
        norm.register_forward_hook(self._keep)

    def compile(self) -> None:
        getattr(self._model, "text", self._model).transformer.compile(dynamic=True)

    def encode(self, captions: Sequence[str]) -> Tensor:
        """Captions → float32 (b, length, width); the tokenizer truncates and pads."""
        return self.encode_pooled(captions)[0]

    @torch.no_grad()
    def encode_pooled(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Like :meth:`encode`, and also the projected embedding at the end of each caption, from the chosen layer."""
        pooled = self._model.encode_text(sent(self._tokenize(list(captions)), self.device))
        states, self._states = self._states, None
        assert states is not None
        return states.float(), pooled.float()

    def tokens(self, captions: Sequence[str]) -> list[int]:
        ids = self._tokenize(list(captions))
        inner = getattr(self._tokenize, "tokenizer", None)
        if inner is None:  # CLIP's own tokenizer, whose end of text has the largest id
            return [int(end) + 1 for end in ids.argmax(1)]
        return [int(count) for count in (ids != (inner.pad_token_id or 0)).sum(1)]

    def _pooled_width(self) -> int:
        projection = getattr(self._model, "text", self._model).text_projection
        if projection is None:
            return self.width
        return int(projection.out_features if hasattr(projection, "out_features") else projection.shape[1])

    def _keep(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self._states = output

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            **_commit(self._model_name),
            "length": self.length,
            "width": self.width,
            "layer": self.layer,
            "dtype": str(self.dtype).removeprefix("torch."),
            "weights_xxh3": self._weights,
        }


def _split(spec: str) -> tuple[str, str]:
    """Split into model and weights; names with a schema include their weights."""
    if spec.startswith(_SCHEMAS):
        return spec, ""
    model, _, pretrained = spec.partition(":")
    return model, pretrained


def _create(name: str, model_name: str, pretrained: str) -> Any:
    """Create the model in float32 on the CPU. ``name``: the setting and its value, for messages."""
    import open_clip

    if not model_name.startswith(_SCHEMAS):
        if model_name not in open_clip.list_models():
            raise ConfigError(f"{name}: {nearest(model_name, open_clip.list_models())}")
        if not pretrained:
            tags = open_clip.list_pretrained_tags_by_model(model_name)
            raise ConfigError(
                f"{name}: name the weights, as openclip:{model_name}:<pretrained>, with one of "
                f"{', '.join([*tags, _RANDOM])}, or a file"
            )
    if model_name.startswith("hf-hub:"):
        expect_model(name, model_name.removeprefix("hf-hub:"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            model = open_clip.create_model(
                model_name, pretrained if pretrained != _RANDOM else None, load_weights=pretrained != _RANDOM
            )
        except (OSError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ConfigError(f"{name}: cannot be loaded: {reason}") from error
    return model


def _commit(model_name: str) -> dict[str, str]:
    """The commit of a model that was loaded from the Hub."""
    schema, _, place = model_name.rpartition("hf-hub:")
    return {} if schema or place == model_name else commit_of(place, None, "open_clip_config.json")


@image_encoders.register("openclip")
class OpenClipImageEncoder(ImageEncoder):
    """open_clip's embedding of an image, of unit length; ``spec`` as for :class:`OpenClipTextEncoder`.

    Raises:
        ConfigError: there is no such model or weights, or it expects padded images.
    """

    @classmethod
    def from_spec(cls, spec: ModelSpec, device: str | torch.device, dtype: str) -> Self:
        return cls(spec.place, device, dtype)

    def __init__(self, spec: str, device: str | torch.device = "cpu", dtype: str = "float32") -> None:
        self.name = f"openclip:{spec}"
        self.device = torch.device(device)
        self.dtype = getattr(torch, dtype)
        self._model_name, pretrained = _split(spec)
        model = _create(f"image_encoder={self.name}", self._model_name, pretrained)
        self.preprocessing, self.resolution = preprocessing_of(model.visual, f"image_encoder={self.name}")
        self._weights = weights_digest(model.visual)
        self._model = model.visual.to(self.device, self.dtype).eval().requires_grad_(False)
        with torch.no_grad():
            self.width = int(self.encode(torch.zeros(1, 3, self.resolution, self.resolution)).shape[1])

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """float (b, 3, resolution, resolution) → float32 (b, width)."""
        return torch.nn.functional.normalize(self._model(x.to(self.device, self.dtype)).float(), dim=-1)

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            **_commit(self._model_name),
            "width": self.width,
            "resolution": self.resolution,
            "dtype": str(self.dtype).removeprefix("torch."),
            "preprocessing": self.preprocessing.describe(),
            "weights_xxh3": self._weights,
        }


class OpenClipTextTower(TextTower):
    """open_clip's embedding of a caption, of unit length; ``spec`` as for :class:`OpenClipTextEncoder`.

    Raises:
        ConfigError: there is no such model or weights.
    """

    def __init__(self, spec: str, device: str | torch.device = "cpu", dtype: str = "float32") -> None:
        import open_clip

        self.name = f"openclip:{spec}"
        self.device = torch.device(device)
        self.dtype = getattr(torch, dtype)
        self._model_name, pretrained = _split(spec)
        model = _create(f"text_encoder={self.name}", self._model_name, pretrained)
        del model.visual
        self._tokenize = open_clip.get_tokenizer(self._model_name)
        self._weights = weights_digest(model)
        self._model = model.to(self.device, self.dtype).eval().requires_grad_(False)
        self.width = int(self.encode([""]).shape[1])

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> Tensor:
        """Captions → float32 (b, width); the tokenizer truncates and pads."""
        embeds = self._model.encode_text(sent(self._tokenize(list(captions)), self.device))
        return torch.nn.functional.normalize(embeds.float(), dim=-1)

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            **_commit(self._model_name),
            "width": self.width,
            "dtype": str(self.dtype).removeprefix("torch."),
            "weights_xxh3": self._weights,
        }


def preprocessing_of(visual: Any, name: str) -> tuple[Preprocessing, int]:
    """An image tower's preprocessing, and the edge of its images. ``name``: the setting and its value, for messages.

    Raises:
        ConfigError: the tower expects images that are not square or are padded.
    """
    wants = visual.preprocess_cfg
    size = wants["size"]
    if wants["resize_mode"] == "longest" or not (isinstance(size, int) or size[0] == size[1]):
        raise ConfigError(f"{name}: it does not accept square images without borders")
    squash = wants["resize_mode"] == "squash"
    preprocessing = Preprocessing(tuple(wants["mean"]), tuple(wants["std"]), wants["interpolation"], squash)
    return preprocessing, int(size if isinstance(size, int) else size[0])


def _final_norm(name: str, model: Any) -> Any:
    """The text tower's last layer norm, if it sees all tokens: not in CoCa, which pools before it, or in HF models."""
    tower = getattr(model, "text", model)
    norm = getattr(tower, "ln_final", None)
    if norm is None or getattr(tower, "cls_emb", None) is not None:
        raise ConfigError(f"text_encoder={name}: this model's text tower does not provide the states of all tokens")
    return norm
