"""A run of ``stage=train task=caption``, loaded to generate captions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
from safetensors.torch import load_file

from pipeline.config.schema import ConfigError
from pipeline.encoders.tokenizer import Tokenizer
from pipeline.encoders.vision import VisionEncoder, vision_encoder
from pipeline.models.captioner import Captioner, CaptionerConfig
from pipeline.models.text_generation import Decoding, write
from pipeline.training.checkpoint import open_checkpoint
from pipeline.training.parallel import autocast, set_matmul_precision
from pipeline.training.tasks.caption import marks_of


@dataclass(frozen=True)
class CaptionWriter:
    """A trained model with everything needed to generate texts; ``step`` is the training step of the weights."""

    model: Captioner
    encoder: VisionEncoder
    tokenizer: Tokenizer
    prompt: str
    step: int
    precision: str = "float32"

    @property
    def longest(self) -> int:
        return self.model.config.max_length

    @torch.no_grad()
    def write(
        self,
        images: Sequence[npt.NDArray[Any]],
        how: Decoding,
        questions: Sequence[str] = (),
        keys: Sequence[str] | None = None,
    ) -> list[str]:
        """Generate a text for each image, uint8 (h, w, 3), of any size, or an answer to each of ``questions``."""
        return self.describe(self.encoder.preprocess(images), how, questions, keys)

    @torch.no_grad()
    def describe(
        self,
        x: torch.Tensor,
        how: Decoding,
        questions: Sequence[str] = (),
        keys: Sequence[str] | None = None,
    ) -> list[str]:
        """Like :meth:`write`, for preprocessed images (b, 3, r, r)."""
        device = self.model.places.device
        prompts = self.tokenizer.prompts(list(questions) or [None] * len(x))
        with autocast(self.precision, device):
            features = self.encoder.encode(x.to(device)).float()
            texts = write(self.model, features, prompts, marks_of(self.tokenizer), how, keys)
        return self.tokenizer.decode(texts)


def load_writer(
    checkpoint: str | Path, device: str | torch.device = "cpu", precision: str = "float32"
) -> CaptionWriter:
    """Load a run from its folder (the best checkpoint), a checkpoint, or an export folder.

    Raises:
        ConfigError: it is none of these, or belongs to another task.
    """
    place, device = Path(checkpoint), torch.device(device)
    set_matmul_precision(precision, device)
    if (place / "model.safetensors").is_file():
        facts = json.loads((place / "config.json").read_text())
        facts["preprocessing"] = json.loads((place / "preprocessing.json").read_text())
        weights, step = load_file(place / "model.safetensors"), facts["step"]
    else:
        loaded = open_checkpoint(place, which="best", parts=("ema",))
        facts, weights, step = loaded.facts, loaded.tensors["ema"], loaded.step
    if facts["task"] != "caption":
        raise ConfigError(f"checkpoint={checkpoint}: its task is {facts['task']}, expected caption")
    about = facts["preprocessing"]
    model = Captioner(CaptionerConfig(**facts["model"]))
    model.load_state_dict(weights)
    encoder = vision_encoder(about["encoder"]["name"], about["encoder"]["features"], device)
    expected, found = about["encoder"].get("weights"), encoder.describe().get("weights")
    if expected != found:
        raise ConfigError(
            f"checkpoint={checkpoint}: trained with different weights of {encoder.name} than those found now"
        )
    return CaptionWriter(
        model.to(device).eval().requires_grad_(False),
        encoder,
        Tokenizer.from_json(about["tokenizer"]),
        about["prompt"],
        step,
        precision if device.type == "cuda" else "float32",
    )
