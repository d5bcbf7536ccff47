"""Text states of any model of transformers: encoders (T5, UMT5), language models (Gemma, Qwen), towers (SigLIP)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from pipeline.config.schema import ConfigError
from pipeline.encoders.base import TextEncoder, sent
from pipeline.encoders.spec import LAYERS, ModelSpec
from pipeline.encoders.transformers import Loaded, load_text
from pipeline.registry import text_encoders

if TYPE_CHECKING:
    from torch import Tensor

_CAPTION = "{caption}"
_UNMASKED = ("siglip_text_model", "siglip2_text_model")
"""Models that were trained on padded texts without an attention mask."""
_TOWERS = ("language_model", "text_model")
"""Attributes of multimodal models that hold the part that reads text."""
_LENGTH = 256
_LOGITS = 1 << 28
"""Numbers that a language model may say about tokens at once."""
_IGNORED = -100


@text_encoders.register("hf")
class LanguageModelEncoder(Loaded, TextEncoder):
    """The hidden states of a caption's tokens, from one or several layers.

    Captions are padded on the right. With a mask, padding does not influence the states, and states after the end of
    the caption are zeros. Without a mask, padding counts as tokens and has states.

    Args:
        place: a repository (``owner/name[@revision]``) or folder, of the model itself or of a pipeline with
            ``text_encoder/`` and ``tokenizer/``; ``<pipeline>/text_encoder_2`` is its second text encoder.
        layers: indices into transformers' ``hidden_states`` (0: the embeddings, -2: the last block's input). Several
            layers are concatenated, and their widths add up. None: the model's output, after its last norm.
        length: maximum number of tokens; None: the model's number of positions if it was trained on texts of fixed
            length, else 256.
        mask: None: as the model was trained, which is with a mask for all but SigLIP.
        template: text around the caption, with ``{caption}`` in its place; ``chat``: the tokenizer's chat template,
            with the caption as the user's message.
        drop_prefix: omit the states of the template's tokens before the caption; ``length`` counts the others.
        device_map: ``auto`` distributes the blocks over the GPUs visible to the rank, and the rest to the host.

    Raises:
        ConfigError: the model cannot be loaded, or has no such layer or chat template.
    """

    takes = ("layer", "length", "mask", "template", "drop_prefix", "device_map")

    @classmethod
    def from_spec(cls, spec: ModelSpec, device: str | torch.device, dtype: str) -> Self:
        """Create the encoder from its options.

        ``layer`` is ``last``, ``penultimate``, or a number, or several numbers joined by ``+``; ``template`` is
        ``chat`` or the name of a text file with ``{caption}`` in it; ``mask`` and ``drop_prefix`` are true or false;
        ``device_map`` is ``auto``.

        Raises:
            ConfigError: an option has another value, or the model cannot be loaded.
        """
        device_map = spec.options.get("device_map", "")
        if device_map not in ("", "auto"):
            raise spec.error(f"device_map={device_map}: expected auto")
        return cls(
            spec.place,
            device,
            dtype,
            layers=_layers(spec),
            length=spec.tokens("length"),
            mask=spec.flag("mask"),
            template=_template(spec),
            drop_prefix=bool(spec.flag("drop_prefix")),
            device_map=device_map,
        )

    def __init__(
        self,
        place: str,
        device: str | torch.device = "cpu",
        dtype: str = "float32",
        *,
        layers: tuple[int, ...] | None = None,
        length: int | None = None,
        mask: bool | None = None,
        template: str = "",
        drop_prefix: bool = False,
        device_map: str = "",
    ) -> None:
        from transformers import AutoTokenizer

        model, self._tokenizer = load_text("hf", place, _load_model, AutoTokenizer.from_pretrained)
        super().__init__("hf", model, place, device, dtype, device_map)
        config, kind = model.config, model.config.model_type
        self._tokenizer.padding_side = self._tokenizer.truncation_side = "right"
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self.mask = kind not in _UNMASKED if mask is None else mask
        self.length = length or (int(config.max_position_embeddings) if kind in _UNMASKED else _LENGTH)
        self._template = self._resolved(template)
        self._prefix = self._prefix_tokens() if drop_prefix else 0
        self.layers = layers
        states, pooled = self._states(["a"])
        self.width = int(states.shape[2])
        self.pooled_width = 0 if pooled is None else int(pooled.shape[1])

    def _resolved(self, template: str) -> str:
        """The text around the caption, with ``{caption}`` in its place."""
        if template != "chat":
            return template or _CAPTION
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    [{"role": "user", "content": _CAPTION}], tokenize=False, add_generation_prompt=True
                )
            )
        except ValueError as error:
            raise ConfigError(f"text_encoder={self.name}: template=chat: its tokenizer has no chat template") from error

    def _prefix_tokens(self) -> int:
        prefix = self._template.partition(_CAPTION)[0]
        return len(self._tokenizer(prefix)["input_ids"]) if prefix else 0

    def _tokens(self, captions: Sequence[str], padding: str | bool) -> Any:
        texts = [self._template.replace(_CAPTION, caption) for caption in captions]
        return self._tokenizer(
            texts,
            padding=padding,
            max_length=self._prefix + self.length,
            truncation=True,
            return_tensors="pt" if padding else None,
            add_special_tokens=self._template == _CAPTION or not self._has_special_tokens(),
        )

    def _has_special_tokens(self) -> bool:
        """Whether the template itself begins with a special token, as chat templates do."""
        return any(self._template.startswith(token) for token in self._tokenizer.all_special_tokens)

    def lengths(self, captions: Sequence[str]) -> list[int]:
        if not self.mask:
            return super().lengths(captions)
        return [len(row) for row in self._tokens(captions, False)["input_ids"]]

    def tokens(self, captions: Sequence[str]) -> list[int]:
        return [max(0, length - self._prefix) if self.mask else length for length in self.lengths(captions)]

    def encode(self, captions: Sequence[str]) -> Tensor:
        """Captions → float32 (b, length, width)."""
        return self._states(captions)[0]

    def encode_pooled(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Like :meth:`encode`, and also the model's pooled output, float32 (b, pooled_width)."""
        states, pooled = self._states(captions)
        if pooled is None:
            raise NotImplementedError(f"{self.name} has no pooled embeddings")
        return states, pooled

    @torch.no_grad()
    def _states(self, captions: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        tokens = self._tokens(captions, "longest" if self.mask else "max_length")
        mask = sent(tokens["attention_mask"], self.device)
        masked = {"attention_mask": mask} if self.mask else {}
        said = self._model(
            input_ids=sent(tokens["input_ids"], self.device), output_hidden_states=self.layers is not None, **masked
        )
        states = self._chosen(said).to(self.device)[:, self._prefix :].float()
        pooled = said.get("pooler_output")
        if self.mask:
            padded = states.new_zeros((len(captions), self.length, states.shape[2]))
            padded[:, : states.shape[1]] = states * mask[:, self._prefix :, None]
            states = padded
        return states, None if pooled is None else pooled.float()

    def _chosen(self, said: Any) -> Tensor:
        if self.layers is None:
            last: Tensor = said.last_hidden_state
            return last
        known = said.hidden_states
        wrong = [layer for layer in self.layers if not -len(known) <= layer < len(known)]
        if wrong:
            raise ConfigError(f"text_encoder={self.name}: layer={wrong[0]}: the model has 0 to {len(known) - 1}")
        return torch.cat([known[layer].to(self.device) for layer in self.layers], 2)

    def describe(self) -> dict[str, Any]:
        return {
            **self._said(),
            "class": type(self._model).__name__,
            "length": self.length,
            "width": self.width,
            "layers": list(self.layers) if self.layers else "last",
            "template": self._template,
            "prefix_tokens_dropped": self._prefix,
            "padding": "zeros" if self.mask else "states",
        }


class CausalLanguageModel(Loaded):
    """How well a model of transformers that predicts the next token predicts captions.

    Args:
        place: a repository (``owner/name[@revision]``) or folder.
        setting: the setting and its value, for messages.

    Attributes:
        length: captions are cut to this many tokens.

    Raises:
        ConfigError: the model cannot be loaded, or does not predict tokens.
    """

    def __init__(self, place: str, setting: str, device: str | torch.device = "cpu", dtype: str = "float32") -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        def load(name: str, **where: Any) -> Any:
            make: Any = AutoModelForCausalLM.from_pretrained
            found, about = make(name, output_loading_info=True, **where)
            if about["missing_keys"]:
                raise ConfigError(f"{setting}: {place} does not predict tokens: it has no {min(about['missing_keys'])}")
            return found

        try:
            model, self._tokenizer = load_text("hf", place, load, AutoTokenizer.from_pretrained)
        except ConfigError as error:
            raise ConfigError(str(error).replace(f"text_encoder=hf:{place}", setting, 1)) from error
        super().__init__("hf", model.float(), place, device, dtype)
        config = model.config.get_text_config()
        self._vocabulary = int(config.vocab_size)
        self.length = min(_LENGTH, int(getattr(config, "max_position_embeddings", _LENGTH)))
        self._tokenizer.padding_side = self._tokenizer.truncation_side = "right"
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token

    @torch.no_grad()
    def loss(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Sum of the negative log-likelihoods of each caption's tokens given those before, float32 (b,), and how many
        tokens these are, all but the first, int64 (b,)."""
        tokens = self._tokenizer(
            list(captions), padding="longest", max_length=self.length, truncation=True, return_tensors="pt"
        )
        count = tokens["attention_mask"].sum(1).sub(1).clamp(min=0)
        width = tokens["input_ids"].shape[1]
        if width < 2:
            return torch.zeros(len(captions), device=self.device), sent(count, self.device)
        ids, mask = (sent(tokens[name].long(), self.device) for name in ("input_ids", "attention_mask"))
        rows = max(1, _LOGITS // (width * self._vocabulary))
        sums = [self._losses(ids[at : at + rows], mask[at : at + rows]) for at in range(0, len(captions), rows)]
        return torch.cat(sums), sent(count, self.device)

    def _losses(self, ids: Tensor, mask: Tensor) -> Tensor:
        # no token looks at the padding behind it: a mask would only make the host wait for the device
        logits = self._model(input_ids=ids, use_cache=False).logits[:, :-1]
        labels = ids[:, 1:].masked_fill(mask[:, 1:] == 0, _IGNORED)
        losses = torch.nn.functional.cross_entropy(
            logits.float().transpose(1, 2), labels, ignore_index=_IGNORED, reduction="none"
        )
        total: Tensor = losses.sum(1)
        return total

    def describe(self) -> dict[str, Any]:
        return {**self._said(), "class": type(self._model).__name__, "length": self.length}


def _layers(spec: ModelSpec) -> tuple[int, ...] | None:
    given = spec.options.get("layer", LAYERS[0])
    if given in LAYERS:
        return None if given == "last" else (-2,)
    try:
        return tuple(int(number) for number in given.split("+"))
    except ValueError:
        raise spec.error(f"layer={given}: expected last, penultimate, a number, or several joined by +") from None


def _template(spec: ModelSpec) -> str:
    given = spec.options.get("template", "")
    if given in ("", "chat"):
        return given
    try:
        text = Path(given).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise spec.error(f"template={given}: expected chat, or the name of a text file: {error}") from error
    if text.count(_CAPTION) != 1:
        raise spec.error(f"template={given}: the file must have {_CAPTION} in it, once")
    return text


def _load_model(name: str, **where: Any) -> Any:
    """Load the part of the model ``name`` that reads text, in its stored precision."""
    from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding
    from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES

    places = {key: value for key, value in where.items() if key in ("subfolder", "revision")}
    config = AutoConfig.from_pretrained(name, **places)
    encoder = config.model_type in MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES
    loader = AutoModelForTextEncoding if encoder else AutoModel
    model = loader.from_pretrained(name, torch_dtype="auto", **where)
    if model.config.is_encoder_decoder and not encoder:
        model = model.get_encoder()
    for tower in _TOWERS:
        model = getattr(model, tower, model)
    return model
