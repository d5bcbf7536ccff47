"""The export of a run: the averaged weights as safetensors, and how to use them."""

from __future__ import annotations

import math
import re
import threading
import uuid
from logging import Logger
from pathlib import Path

import safetensors.torch

from pipeline.config.schema import TrainConfig
from pipeline.storage import Folder, json_bytes
from pipeline.training.checkpoint import FOLDER as CHECKPOINTS
from pipeline.training.checkpoint import open_checkpoint
from pipeline.training.model_card import model_card
from pipeline.training.uploads import note

FOLDER = "export"


EPOCHS = "exports"
_OF_TRAINING = {
    "config",
    "world_size",
    "sampler",
    "ema_updates",
    "skipped",
    "skipped_ever",
    "progress",
    "best_step",
    "meter",
    "preprocessing",
}
"""Facts of a checkpoint that say nothing of how to use its weights."""
_EPOCH = re.compile(r"epoch_(\d+)(-valid_loss_.*)?")


def export(run: Folder, best_step: int) -> Path:
    """Put the averaged weights of the checkpoint of ``best_step`` (if there is none, of the last) into ``export/``.

    model.safetensors, config.json (task, step, and what the task says of its use), preprocessing.json, and a model card
    as README.md. They replace an earlier export as one folder.
    """
    best = run.path / CHECKPOINTS / f"step_{best_step:06d}"
    return _write(run, FOLDER, best if best.is_dir() else run.path)


def export_epoch(run: Folder, epoch: int, step: int, best_step: int, loss: float | None, config: TrainConfig) -> Path:
    """Put the averaged weights of the checkpoint of ``step`` into ``exports/epoch_<n>-valid_loss_<loss>``; older ones
    beyond ``keep_exports`` go, but for that of ``best_step``. What is there already is left as it is."""
    name = epoch_name(epoch, loss)
    run.mkdir(EPOCHS, exist_ok=True)
    with run.folder(EPOCHS) as folder:
        if name not in folder.listdir():
            _write(folder, name, run.path / CHECKPOINTS / f"step_{step:06d}")
        names = sorted((n for n in folder.listdir() if _EPOCH.fullmatch(n)), key=_epoch_of)
        for old in names[: -config.keep_exports] if config.keep_exports else ():
            with folder.folder(old) as one:
                about = one.read_json("config.json")
            if about is None or about["step"] != best_step:
                folder.trash(old)
    return run.path / EPOCHS / name


def epoch_name(epoch: int, loss: float | None) -> str:
    """``epoch_003-valid_loss_1.2345``; without a validation set ``epoch_003``."""
    return f"epoch_{epoch:03d}" + (f"-valid_loss_{loss:.4f}" if loss is not None and math.isfinite(loss) else "")


def _epoch_of(name: str) -> int:
    found = _EPOCH.fullmatch(name)
    return int(found[1]) if found else -1


def _write(parent: Folder, name: str, checkpoint: Path) -> Path:
    found = open_checkpoint(checkpoint, parts=("ema",))
    preprocessing = found.facts.get("preprocessing", {})
    about = {"step": found.step, **{name: value for name, value in found.facts.items() if name not in _OF_TRAINING}}
    weights = found.tensors["ema"]
    files = {
        "README.md": model_card(found.facts, found.step, sum(t.numel() for t in weights.values())).encode(),
        "model.safetensors": safetensors.torch.save(weights),
        "config.json": json_bytes(about),
        "preprocessing.json": json_bytes(preprocessing),
    }
    attempt = f".{name}.{uuid.uuid4().hex}"
    parent.mkdir(attempt)
    with parent.folder(attempt) as folder:
        for file_name, data in files.items():
            with folder.create(file_name) as file:
                file.write(data)
    parent.trash(name)
    parent.rename(attempt, name)
    return parent.path / name


class Uploads:
    """Brings folders to the Hugging Face Hub next to training, as a private repository if it is new (token: HF_TOKEN).
    That it fails is a warning, no error: a trained model must not be lost to a network.

    How the last upload ended stands in ``upload.json`` of the run, for those who do not read logs.

    Args:
        repository: empty: nothing is uploaded.
        run: the run's folder.
    """

    def __init__(self, repository: str, log: Logger, run: Path) -> None:
        self._repository, self._log, self._run = repository, log, run
        self._thread: threading.Thread | None = None

    def start(self, folder: Path) -> None:
        """Upload ``folder``, unless another is under way."""
        if not self._repository:
            return
        if self._thread is not None and self._thread.is_alive():
            self._log.warning(
                "hub_repo=%s: %s is not uploaded: the previous upload is still running", self._repository, folder
            )
            return
        self._thread = threading.Thread(target=self._upload, args=(folder,), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until what is under way is uploaded."""
        if self._thread is not None:
            self._thread.join()

    def _upload(self, folder: Path) -> None:
        try:
            from huggingface_hub import HfApi

            api = HfApi()
            api.create_repo(self._repository, private=True, exist_ok=True)
            api.upload_folder(repo_id=self._repository, folder_path=folder, commit_message=folder.name)
            self._log.info("uploaded %s to %s", folder, self._repository)
            note(self._run, self._repository, folder, "")
        except Exception as error:
            note(self._run, self._repository, folder, _line(error))
            self._log.warning(
                "hub_repo=%s: the upload failed (%s); %s is complete", self._repository, _line(error), folder
            )


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
