"""What a run leaves for others: the averaged weights as safetensors, and how to use them."""

from __future__ import annotations

import uuid
from logging import Logger
from pathlib import Path

import safetensors.torch

from pipeline.config import TrainConfig
from pipeline.storage import Folder, json_bytes
from pipeline.training.checkpoint import FOLDER as CHECKPOINTS
from pipeline.training.checkpoint import open_checkpoint

FOLDER = "export"


def export(run: Folder, best_step: int, config: TrainConfig, log: Logger) -> Path:
    """Put the averaged weights of the checkpoint of ``best_step`` (if there is none, of the last) into ``export/``.

    model.safetensors, config.json (task, model, step), preprocessing.json. They replace an earlier export as one
    folder. ``hub_repo=`` uploads it to the Hugging Face Hub; that this fails is a warning, no error.
    """
    best = run.path / CHECKPOINTS / f"step_{best_step:06d}"
    found = open_checkpoint(best if best.is_dir() else run.path, parts=("ema",))
    preprocessing = found.facts.get("preprocessing", {})
    known = ("task", "model", "classes", "normalisation", "latents")
    about = {"step": found.step, **{name: found.facts[name] for name in known if name in found.facts}}
    files = {
        "model.safetensors": safetensors.torch.save(found.tensors["ema"]),
        "config.json": json_bytes(about),
        "preprocessing.json": json_bytes(preprocessing),
    }
    attempt = f".{FOLDER}.{uuid.uuid4().hex}"
    run.mkdir(attempt)
    with run.folder(attempt) as folder:
        for name, data in files.items():
            with folder.create(name) as file:
                file.write(data)
    run.trash(FOLDER)
    run.rename(attempt, FOLDER)
    place = run.path / FOLDER
    if config.hub_repo:
        upload(place, config.hub_repo, log)
    return place


def upload(folder: Path, repository: str, log: Logger) -> None:
    """Bring ``folder`` to the Hugging Face Hub, as a private repository if it is new (token: HF_TOKEN)."""
    try:
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder)
        log.info("uploaded %s to %s", folder, repository)
    except Exception as error:  # a trained model must not be lost to a network
        log.warning("hub_repo=%s: the upload failed (%s); %s is complete", repository, _line(error), folder)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
