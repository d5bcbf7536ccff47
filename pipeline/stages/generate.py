"""stage=generate: pictures for prompts, drawn with a trained run, into ``samples/`` of its folder."""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pipeline.cli import config_for, errors_as_one_line
from pipeline.config import ConfigError, EvaluateConfig, GenerateConfig, run_folder
from pipeline.encoders.base import Autoencoder, TextEncoder, autoencoder, text_encoder, to_pixels
from pipeline.models.dit import DiT, DiTConfig
from pipeline.models.processes import Process, process_of
from pipeline.models.sampling import sample
from pipeline.partitions.dataset import RandomAccess
from pipeline.partitions.stage import open_input
from pipeline.randomness import normals
from pipeline.storage import Folder
from pipeline.training.checkpoint import FOLDER, open_checkpoint
from pipeline.training.tasks.diffuse import Normalisation

_BATCH = 32
_DEFAULT_PROMPTS = 16
_RUNS = ("diffuse", "classify")  # names that runs have by default
_LOOKED_AT = 400  # samples whose captions the default prompts are taken from


@dataclass(frozen=True)
class Painter:
    """All that it takes to turn prompts into pictures; ``step`` of training that the weights are from."""

    model: DiT
    process: Process
    normalisation: Normalisation
    autoencoder: Autoencoder
    text_encoder: TextEncoder
    step: int


def load_painter(checkpoint: str | Path, device: str | torch.device = "cpu") -> Painter:
    """The averaged weights of ``checkpoint`` (of a run's folder, the newest), and the encoders it was trained with.

    Raises:
        ConfigError: no checkpoint there, or one of another task.
    """
    loaded = open_checkpoint(checkpoint)
    if loaded.facts["task"] != "diffuse":
        raise ConfigError(f"checkpoint={checkpoint}: its task is {loaded.facts['task']}, expected diffuse")
    model = DiT(DiTConfig(**loaded.facts["model"]))
    model.load_state_dict(loaded.tensors["ema"])
    normalisation = Normalisation(tuple(loaded.facts["normalisation"]["mean"]), loaded.facts["normalisation"]["scale"])
    latents = loaded.facts["latents"]
    return Painter(
        model.to(device).eval().requires_grad_(False),
        process_of(loaded.facts["process"]),
        normalisation,
        autoencoder(latents["autoencoder"], device),
        text_encoder(latents["text_encoder"], device),
        loaded.step,
    )


def sample_images(
    painter: Painter, prompts: Sequence[str], seed: int = 0, steps: int = 20, guidance: float = 1.5
) -> np.ndarray:
    """Pictures uint8 (n, h, w, 3), one for each prompt; picture i starts from noise keyed by (seed, i) alone."""
    if not prompts:
        raise ConfigError("prompts=: there is nothing to draw")
    config = painter.model.config
    shape = (config.channels, config.height, config.width)
    device = next(painter.model.parameters()).device
    pictures = []
    for start in range(0, len(prompts), _BATCH):
        some = prompts[start : start + _BATCH]
        noise = np.stack([normals(shape, seed, "picture", start + i) for i in range(len(some))])
        latents = sample(
            painter.model, torch.from_numpy(noise).to(device), painter.text_encoder.encode(some), steps, guidance
        )
        pictures.append(to_pixels(painter.autoencoder.decode(painter.normalisation.invert(latents))))
    return np.concatenate(pictures)


def main(config: GenerateConfig) -> None:
    with errors_as_one_line():
        run = run_of(config)
        set_threads(config.threads)
        painter = load_painter(config.checkpoint or run)
        prompts = prompts_of(config)
        pictures = sample_images(painter, prompts, config.seed, config.steps, config.guidance)
        place = write_samples(run, prompts, pictures, config.seed)
    print(f"{len(prompts)} pictures: {place}")


def run_of(config: GenerateConfig | EvaluateConfig) -> Path:
    """The folder of the run that is asked for.

    Raises:
        ConfigError: it is not there.
    """
    if config.checkpoint:
        checkpoint = Path(config.checkpoint).absolute()
        run = checkpoint.parent.parent if checkpoint.parent.name == FOLDER else checkpoint
    else:
        folders = [run_folder(config, name).absolute() for name in ([config.name] if config.name else _RUNS)]
        run = next((folder for folder in folders if folder.is_dir()), folders[0])
    if not run.is_dir():
        raise ConfigError(f"{run}: there is no such training run; checkpoint= names one")
    return run


def set_threads(threads: int) -> None:
    torch.set_num_threads(threads or len(os.sched_getaffinity(0)))


def prompts_of(config: GenerateConfig) -> list[str]:
    """The prompts as given, the lines of a file, or some captions of the data set."""
    given = list(config.prompts)
    if len(given) == 1 and Path(given[0]).is_file():
        given = [line.strip() for line in Path(given[0]).read_text(encoding="utf-8").splitlines() if line.strip()]
    if given or not config.data_dir:
        return given
    stored = RandomAccess(open_input(config, "train"))
    spread = np.linspace(0, len(stored) - 1, min(len(stored), _LOOKED_AT)).astype(int)
    captions = dict.fromkeys(row["caption"] for row in stored.rows(spread) if row["caption"])
    return list(captions)[:_DEFAULT_PROMPTS]


def write_samples(run: Path, prompts: Sequence[str], pictures: np.ndarray, seed: int) -> Path:
    """Put pictures, a grid of them and a listing into ``samples/`` of the run, in place of earlier ones."""
    attempt = f".samples.{uuid.uuid4().hex}"
    with Folder.open(run) as folder:
        folder.mkdir(attempt)
        with folder.folder(attempt) as inside:
            listing = []
            for number, (prompt, picture) in enumerate(zip(prompts, pictures, strict=True)):
                name = f"{number:05d}.png"
                _write_png(inside, name, picture)
                listing.append({"prompt": prompt, "seed": seed, "file": name})
            _write_png(inside, "grid.png", grid(pictures))
            inside.write_json("samples.json", {"samples": listing})
        folder.trash("samples")
        folder.rename(attempt, "samples")
    return run / "samples"


def _write_png(folder: Folder, name: str, picture: np.ndarray) -> None:
    file = BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    with folder.create(name) as target:
        target.write(file.getvalue())


def grid(pictures: np.ndarray) -> np.ndarray:
    """(n, h, w, 3) → one picture, about square, with two white pixels between."""
    n, h, w, _ = pictures.shape
    columns = int(np.ceil(np.sqrt(n)))
    rows = -(-n // columns)
    sheet = np.full((rows * (h + 2) - 2, columns * (w + 2) - 2, 3), 255, np.uint8)
    for number, picture in enumerate(pictures):
        top, left = number // columns * (h + 2), number % columns * (w + 2)
        sheet[top : top + h, left : left + w] = picture
    return sheet


if __name__ == "__main__":
    main(config_for("generate"))
