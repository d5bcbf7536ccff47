"""Captions from image-text-to-text models of the transformers library: LLaVA, Qwen-VL, Idefics, PaliGemma, BLIP, ..."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from pipeline.captioning.answers import Said
from pipeline.captioning.base import BatchCaptioner, Question
from pipeline.config.schema import ConfigError
from pipeline.encoders.base import commit_of, repository, weights_digest
from pipeline.encoders.failures import UNLOADABLE, not_loaded
from pipeline.encoders.from_hub import expect_model
from pipeline.randomness import keyed_seed
from pipeline.registry import captioners

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.distributed import Rank

_NEEDED = (
    "config.json",
    "preprocessor_config.json|processor_config.json",
    "model.safetensors|model.safetensors.index.json",
)


@captioners.register("transformers")
class VisionLanguageModel(BatchCaptioner):
    """A model that transformers' ``AutoModelForImageTextToText`` loads, from ``place``: ``owner/name[@revision]`` or a
    folder with the model and its processor.

    Prompts are formatted by the processor's chat template or, if it has none, appended to the image token. Without a
    temperature, decoding is greedy; with one, tokens are sampled with random numbers that depend only on the seed, the
    sample's key, and the numbers of the caption and the attempt, not on the rest of the batch.

    Raises:
        ConfigError: the model cannot be loaded.
    """

    def __init__(self, place: str, config: Any, rank: Rank) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        super().__init__(config)
        torch.set_num_threads(config.threads)
        expect_model(f"captioner=transformers:{place}", place)
        name, revision = repository(place)
        dtype = getattr(torch, config.model_dtype if rank.device.type == "cuda" else "float32")
        try:
            self._processor: Any = AutoProcessor.from_pretrained(name, revision=revision)
            model = AutoModelForImageTextToText.from_pretrained(
                name, revision=revision, torch_dtype=dtype, use_safetensors=True
            )
        except UNLOADABLE as error:
            raise not_loaded(f"captioner=transformers:{place}", place, error, *_NEEDED) from error
        self._place = place
        self._device = rank.device
        self._weights = weights_digest(model)
        self._model: Any = model.eval().requires_grad_(False)
        self._model.to(rank.device)
        self._tokenizer = getattr(self._processor, "tokenizer", self._processor)
        self._tokenizer.padding_side = "left"
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        if self._tokenizer.pad_token_id is None:
            raise ConfigError(f"captioner=transformers:{place}: its tokenizer has neither a padding nor an end token")
        self._ends = self._end_tokens()

    def _end_tokens(self) -> set[int]:
        ends: set[int] = set()
        for found in (self._model.generation_config.eos_token_id, self._tokenizer.eos_token_id):
            ends |= set(found) if isinstance(found, list) else {found} if found is not None else set()
        return ends

    def describe(self) -> dict[str, Any]:
        return {
            "name": f"transformers:{self._place}",
            **commit_of(*repository(self._place)),
            "class": type(self._model).__name__,
            "dtype": str(self._model.dtype).removeprefix("torch."),
            "weights_xxh3": self._weights,
        }

    @torch.no_grad()
    def generate(self, questions: Sequence[Question], attempt: int) -> list[Said]:
        inputs = self._inputs(questions)
        prompt = inputs["input_ids"]
        temperature = self.temperature(attempt)
        draws = [Draws(temperature, [self._seed(one, attempt) for one in questions])] if temperature else []
        tokens = self._model.generate(
            **inputs,
            max_new_tokens=self.config.max_tokens,
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            logits_processor=draws,
            pad_token_id=self._tokenizer.pad_token_id,
        )
        width = prompt.shape[1]
        if tokens.shape[1] >= width and bool((tokens[:, :width] == prompt).all()):
            tokens = tokens[:, width:]  # decoder-only models return the prompt, too
        counts = inputs["attention_mask"].sum(1).tolist()
        return [self._said(row, count) for row, count in zip(tokens.tolist(), counts, strict=True)]

    def _seed(self, question: Question, attempt: int) -> int:
        return keyed_seed(self.config.seed, "recaption", question.key, question.number, attempt)

    def _inputs(self, questions: Sequence[Question]) -> Any:
        images = [Image.fromarray(question.image) for question in questions]
        if getattr(self._processor, "chat_template", None):
            chats = [self._chat(question.prompt, image) for question, image in zip(questions, images, strict=True)]
            inputs = self._processor.apply_chat_template(
                chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", padding=True
            )
        else:
            token = getattr(self._processor, "image_token", "") or ""
            system = f"{self.config.system}\n" if self.config.system else ""
            texts = [f"{token}{system}{question.prompt}" for question in questions]
            inputs = self._processor(images=images, text=texts, padding=True, return_tensors="pt")
        return inputs.to(self._device, dtype=self._model.dtype)

    def _chat(self, prompt: str, image: Image.Image) -> list[dict[str, Any]]:
        system = [{"role": "system", "content": [{"type": "text", "text": self.config.system}]}]
        content = [{"type": "image", "image": image}, {"type": "text", "text": prompt}]
        return [*(system if self.config.system else []), {"role": "user", "content": content}]

    def _said(self, tokens: list[int], prompt_tokens: int) -> Said:
        end = next((place for place, token in enumerate(tokens) if token in self._ends), None)
        text = self._tokenizer.decode(tokens[:end], skip_special_tokens=True)
        written = len(tokens) if end is None else end + 1
        return Said(
            text,
            cut=end is None and written >= self.config.max_tokens,
            prompt_tokens=prompt_tokens,
            completion_tokens=written,
        )


class Draws:
    """A logits processor that turns greedy decoding into sampling by adding noise (Gumbel-max; Maddison et al., "A*
    sampling", 2014). Each row of a batch has its own random stream.

    Args:
        seeds: one for each row.
    """

    def __init__(self, temperature: float, seeds: Sequence[int]) -> None:
        self._temperature = temperature
        self._streams = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return ``scores`` (b, vocabulary) divided by the temperature, plus noise, as float32."""
        shape = scores.shape[1]
        uniform = torch.stack([torch.rand(shape, generator=stream) for stream in self._streams])
        noise = -torch.log(-torch.log(uniform.clamp(1e-20, 1 - 1e-7)))
        return scores.float() / self._temperature + noise.to(scores.device)
