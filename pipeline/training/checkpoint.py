"""Checkpoints: folders ``checkpoints/step_<n>`` of a run that appear whole or not at all, and hold no pickle.

    checkpoint.json        facts (config, task, positions, counters) and each file's digest; written last; sealed
    model.safetensors      weights
    ema.safetensors        averaged weights, for sampling
    optimizer.safetensors  "<parameter>/<quantity>", for example "out.weight/exp_avg"

There is no random state: all randomness of a step is keyed by (seed, step), see :mod:`pipeline.training.loop`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from logging import Logger
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from pipeline.config import ConfigError
from pipeline.storage import Folder, StorageError, commit, digest, seal

FORMAT_VERSION = 1
FOLDER = "checkpoints"
_RECORD = "checkpoint.json"
_NAME = re.compile(r"step_(\d+)")
_ATTEMPT = re.compile(r"\.step_\d+\.(\w+)")


class Superseded(RuntimeError):
    """Another process trains the same run: it was first to commit this step, or removed our attempt."""


@dataclass(frozen=True)
class Checkpoint:
    """State after ``step`` optimizer steps.

    ``facts``: JSON-able. ``tensors``: by name of the file (model, ema, optimizer), then by name of the tensor.
    """

    step: int
    facts: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]


class Checkpoints:
    """The checkpoints of one run, as one life of the run writes them.

    Args:
        run: the run's folder.
        life: id of this life: no other process has it.
        keep: how many to keep; older ones are deleted after each save.
    """

    def __init__(self, run: Folder, life: str, keep: int) -> None:
        run.mkdir(FOLDER, exist_ok=True)
        self.folder = run.folder(FOLDER)
        self.life = life
        self.keep = keep

    def save(self, checkpoint: Checkpoint) -> None:
        """Write ``checkpoint`` and commit it by one rename.

        Raises:
            Superseded: another process has written this step.
            OSError: the disk is full, for example; nothing is left behind.
        """
        name = f"step_{checkpoint.step:06d}"
        attempt = f".{name}.{self.life}"
        try:
            self.folder.mkdir(attempt)
            with self.folder.folder(attempt) as folder:
                _write(folder, checkpoint, self.life)
            won = commit(self.folder, attempt, name, proof=_RECORD)
        except BaseException:
            with suppress(OSError):
                self.folder.trash(attempt)
            raise
        if not won:
            self.folder.trash(attempt)
            raise Superseded(f"{self.folder.path / name}: another process trains this run; this one ends")
        self._prune()

    def load_latest(self, log: Logger) -> Checkpoint | None:
        """The newest checkpoint whose bytes are as they were written; damaged ones are reported and deleted."""
        for name in reversed(names(self.folder)):
            try:
                with self.folder.folder(name) as folder:
                    return read(folder)
            except StorageError as error:
                log.warning("%s; going back to the checkpoint before it", error)
                self.folder.trash(name)
        return None

    def _prune(self) -> None:
        """Delete checkpoints beyond the newest ``keep`` and what other lives left unfinished."""
        for name in names(self.folder)[: -self.keep or None]:
            self.folder.trash(name)
        for name in self.folder.listdir():
            found = _ATTEMPT.fullmatch(name)
            if found and found[1] != self.life:
                self.folder.trash(name)


def names(folder: Folder) -> list[str]:
    """Names of committed checkpoints, oldest step first."""
    found = [match for name in folder.listdir() if (match := _NAME.fullmatch(name))]
    return [match[0] for match in sorted(found, key=lambda match: int(match[1]))]


def open_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint at ``path``, or the newest of the run at ``path``.

    Raises:
        ConfigError: there is none.
        StorageError: it is damaged.
    """
    place = Path(path)
    if (place / FOLDER).is_dir():
        with Folder.open(place / FOLDER) as folder:
            known = names(folder)
        if not known:
            raise ConfigError(f"checkpoint={path}: this run has no checkpoint yet")
        place = place / FOLDER / known[-1]
    if not (place / _RECORD).is_file():
        raise ConfigError(f"checkpoint={path}: neither a run folder nor a checkpoint")
    with Folder.open(place) as folder:
        return read(folder)


def _write(folder: Folder, checkpoint: Checkpoint, life: str) -> None:
    files = {}
    for stem, tensors in checkpoint.tensors.items():
        data = safetensors.torch.save({name: t.detach().cpu().contiguous() for name, t in tensors.items()})
        with folder.create(f"{stem}.safetensors") as file:
            file.write(data)
        files[stem] = {"bytes": file.bytes, "xxh3": file.digest}
    record = {
        "format_version": FORMAT_VERSION,
        "step": checkpoint.step,
        "life": life,
        "files": files,
        "facts": checkpoint.facts,
    }
    with folder.create(_RECORD) as file:
        file.write(seal(record))


def read(folder: Folder) -> Checkpoint:
    """The checkpoint in ``folder``.

    Raises:
        StorageError: a file is missing or not as it was written.
    """
    record = folder.read_sealed(_RECORD)
    if record is None:
        raise StorageError(f"{folder.path} has no {_RECORD}")
    if record["format_version"] != FORMAT_VERSION:
        raise ConfigError(
            f"{folder.path} has format_version {record['format_version']}, this program reads {FORMAT_VERSION}"
        )
    tensors = {}
    for stem, said in record["files"].items():
        try:
            data = folder.read(f"{stem}.safetensors")
            if digest(data) != said["xxh3"]:
                raise StorageError(f"{folder.path}/{stem}.safetensors is damaged: its content does not fit its digest")
            tensors[stem] = safetensors.torch.load(data)
        except (FileNotFoundError, SafetensorError) as error:
            raise StorageError(f"{folder.path}/{stem}.safetensors cannot be read: {error}") from None
    return Checkpoint(record["step"], record["facts"], tensors)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by names of parameters, which mean the same in every process: "<parameter>/<quantity>"."""
    state = optimizer.state
    return {
        f"{name}/{quantity}": value
        for name, parameter in model.named_parameters()
        for quantity, value in state.get(parameter, {}).items()
    }


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what :func:`optimizer_tensors` returned; rates and the like stay those of ``optimizer``."""
    names_of = {parameter: name for name, parameter in model.named_parameters()}
    listed = [names_of[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, quantity = key.rpartition("/")
        state.setdefault(listed.index(name), {})[quantity] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
