"""The model card of an export: the weights, their training data, and how to use them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

_CLASSES = {
    "diffuse": "pipeline.models.dit.DiT",
    "classify": "pipeline.models.vision_mamba.VisionMamba",
    "caption": "pipeline.models.captioner.Captioner",
}
_PURPOSE = {"diffuse": "text to image", "classify": "image classification", "caption": "image to text"}
_PROCESSES = {
    "flow": "Rectified flow: `x_t = (1 - t) x + t n` with noise `n` and `t` from 0 (data) to 1; the network takes "
    "`x_t`, `t` and the text states, and predicts `n - x`.",
    "edm": "EDM (Karras et al. 2022) with `sigma_data` from config.json: `x_t = x + t n`; the network takes "
    "`x_t / sqrt(t^2 + sigma_data^2)`, `ln(t) / 4` and the text states; with its output `F`, the denoised image is "
    "`sigma_data^2 / (t^2 + sigma_data^2) x_t + t sigma_data / sqrt(t^2 + sigma_data^2) F`.",
}


def model_card(facts: Mapping[str, Any], step: int, parameters: int) -> str:
    """Markdown with a header for the Hugging Face Hub.

    Args:
        facts: of the checkpoint.
        parameters: number of parameters.
    """
    task = str(facts["task"])
    title = f"{_PURPOSE.get(task, task)}, {parameters / 1e6:.1f} million parameters"
    sections = [
        "---\nlibrary_name: pytorch\nlicense: other\ntags:\n- latentmill\n- safetensors\n---",
        f"# {title[0].upper()}{title[1:]}",
        f"Averaged weights after {step:,} optimizer steps (task={task}).",
        _section("Data", _data(facts.get("data") or {})),
        _section("Metrics", _table(_metrics(facts))),
        _section("Files", _FILES),
        _section("Use without Latentmill", _usage(task, facts)),
        _section("Settings", _table({name: f"`{value}`" for name, value in sorted(facts["config"].items())})),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


_FILES = """- `model.safetensors`: the weights, float32
- `config.json`: the network's shape and everything else that its use depends on
- `preprocessing.json`: how an input becomes what the network takes"""


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n{text}" if text else ""


def _data(about: Mapping[str, Any]) -> str:
    names = {
        "title": "Dataset",
        "dataset": "Name",
        "split": "Split",
        "home": "Publisher",
        "terms": "Terms of the data",
        "samples": "Samples trained on",
        "validation_samples": "Samples kept for validation",
        "digest": "Content digest",
    }
    rows = {label: about[name] for name, label in names.items() if about.get(name) not in (None, "")}
    rows.setdefault("Terms of the data", "not known: see to it that yours allow this use")
    return _table(rows)


def _metrics(facts: Mapping[str, Any]) -> dict[str, str]:
    metrics = (facts.get("progress") or {}).get("metrics") or {}
    return {name: f"{value:.6g}" for name, value in metrics.items() if value is not None and math.isfinite(value)}


def _table(rows: Mapping[str, Any]) -> str:
    if not rows:
        return ""
    lines = [f"| {name} | {str(value).replace('|', chr(92) + '|')} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def _usage(task: str, facts: Mapping[str, Any]) -> str:
    code = """```python
import json
from safetensors.torch import load_file

weights = load_file("model.safetensors")  # name → tensor
config = json.load(open("config.json"))
```"""
    network = _CLASSES.get(task)
    parts = [code]
    if network:
        parts.append(
            f'The names are those of `{network}`, whose module needs torch alone; `config["model"]` has the arguments '
            "of its configuration."
        )
    if task == "diffuse":
        parts += _diffusion(facts)
    elif task == "classify":
        parts.append(
            "Input: RGB, resized and cropped as preprocessing.json says, divided by 255, less `mean`, divided by "
            "`std`. Output: a logit for each entry of `classes` in config.json."
        )
    elif task == "caption":
        parts.append(
            "Input: the features of the encoder that preprocessing.json names, and the tokens so far; its `tokenizer` "
            "is a file of the library tokenizers. Output: logits of the next token."
        )
    return "\n\n".join(parts)


def _diffusion(facts: Mapping[str, Any]) -> list[str]:
    latents, process = facts["latents"], facts["process"]
    return [
        f"Autoencoder: `{latents['autoencoder']}`; text encoder: `{latents['text_encoder']}`; resolution "
        f"{latents['resolution']} px. The network works on `(z - mean) / scale` of the autoencoder's latents `z`, with "
        "`normalisation` from config.json.",
        _PROCESSES[process["name"]],
    ]
