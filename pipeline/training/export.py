"""Export of a run: the EMA weights as safetensors, with what is needed to use them."""

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
from pipeline.stores import limit_waits
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
"""Facts of a checkpoint that are not needed to use its weights."""
_EPOCH = re.compile(r"epoch_(\d+)(-valid_loss_.*)?")


def export(run: Folder, best_step: int) -> Path:
    """Export the EMA weights of the checkpoint of ``best_step`` (of the last, if it does not exist) to ``export/``.

    Writes model.safetensors, config.json (task, step, and the task's facts), preprocessing.json, and a model card as
    README.md. An earlier export is replaced as a whole.
    """
    best = run.path / CHECKPOINTS / f"step_{best_step:06d}"
    return _write(run, FOLDER, best if best.is_dir() else run.path)


def export_epoch(run: Folder, epoch: int, step: int, best_step: int, loss: float | None, config: TrainConfig) -> Path:
    """Export the EMA weights of the checkpoint of ``step`` to ``exports/epoch_<n>-valid_loss_<loss>``; deletes older
    ones beyond ``keep_exports``, except that of ``best_step``. An existing export is not written again."""
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
    """Uploads folders to the Hugging Face Hub during training, to a private repository if it is new (token: HF_TOKEN).

    Failure is a warning, not an error: network problems must not cost a trained model. The result of the last upload is
    written to the run's ``upload.json``.

    Args:
        repository: name of the repository; empty: nothing is uploaded.
        run: the run's folder.
    """

    def __init__(self, repository: str, log: Logger, run: Path) -> None:
        self._repository, self._log, self._run = repository, log, run
        self._thread: threading.Thread | None = None

    def start(self, folder: Path) -> None:
        """Start to upload ``folder``, unless another upload is running."""
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
        """Wait for a running upload."""
        if self._thread is not None:
            self._thread.join()

    def _upload(self, folder: Path) -> None:
        try:
            from huggingface_hub import HfApi

            limit_waits()  # training waits for the upload at its end
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
