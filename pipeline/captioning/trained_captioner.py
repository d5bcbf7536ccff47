"""Captions from a run of ``stage=train task=caption``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from pipeline.captioning.answers import Said
from pipeline.captioning.base import BatchCaptioner, Question
from pipeline.captioning.trained_run import load_writer
from pipeline.config.schema import ConfigError
from pipeline.models.text_generation import Decoding
from pipeline.randomness import keyed_seed
from pipeline.registry import captioners

if TYPE_CHECKING:
    from pipeline.distributed import Rank


@captioners.register("checkpoint")
class Run(BatchCaptioner):
    """The run at ``place``: its folder, a checkpoint, or an export. Prompts must be of the kind it was trained with.

    Raises:
        ConfigError: there is no such run, or it does not accept prompts but one is given.
    """

    def __init__(self, place: str, config: Any, rank: Rank) -> None:
        super().__init__(config)
        torch.set_num_threads(config.threads)
        precision = "float32" if config.model_dtype == "float32" else "bfloat16"
        self._place = place
        self._writer = load_writer(place, rank.device, precision)
        self.chats = self._writer.prompt == "question"
        if config.caption_prompt and not self.chats:
            raise ConfigError(
                f"caption_prompt={config.caption_prompt[0]}: the run {place} writes captions and takes no prompt"
            )

    def describe(self) -> dict[str, Any]:
        return {"name": "checkpoint", "step": self._writer.step, "encoder": self._writer.encoder.describe()}

    def generate(self, questions: Sequence[Question], attempt: int) -> list[Said]:
        prompts = [question.prompt for question in questions] if self.chats else []
        longest = max(map(len, self._writer.tokenizer.prompts(prompts or [None])))
        temperature = self.temperature(attempt)
        how = Decoding(
            top_p=1.0 if temperature else 0.0,
            temperature=temperature or 1.0,
            max_length=min(self.config.max_tokens, self._writer.longest - longest),
            seed=keyed_seed(self.config.seed, "recaption", attempt),
        )
        keys = [f"{question.key} {question.number}" for question in questions]
        texts = self._writer.write([question.image for question in questions], how, prompts, keys)
        return [Said(text) for text in texts]
