"""Loggers of a run (JSON lines, optionally TensorBoard and Weights & Biases), and the values that they log."""

from __future__ import annotations

import json
import math
import resource
import time
import uuid
from abc import ABC, abstractmethod
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from pipeline.config.schema import ConfigError, TrainConfig, identity
from pipeline.storage import Folder

LOGS = "logs"
MERGED = "training_log.jsonl"
_WANDB_ID = "wandb_id"

_PEAK_FLOPS = {
    "H200": (989e12, 495e12, 67e12),
    "H100": (989e12, 495e12, 67e12),
    "A100": (312e12, 156e12, 19.5e12),
    "L40S": (362e12, 183e12, 91.6e12),
    "B200": (2250e12, 1125e12, 75e12),
    "V100": (125e12, 15.7e12, 15.7e12),
}
"""Peak dense FLOP/s in bfloat16 (V100: float16), TF32 and float32, from the vendors' data sheets (SXM)."""


class Logger(ABC):
    """Receives the values of a step."""

    @abstractmethod
    def write(self, step: int, values: dict[str, Any]) -> None: ...

    def close(self) -> None:  # noqa: B027 - most have nothing to close
        """Called after the last write."""


class TrainingLog(Logger):
    """``logs/<life>.jsonl`` in a run's folder: one JSON object per line, one file for each life of the run.

    If lives overlap (one was killed after its last checkpoint), the lines of the later life count; the merged log
    ``logs/training_log.jsonl`` is written when a life begins and ends.
    """

    def __init__(self, run: Folder, life: str) -> None:
        run.mkdir(LOGS, exist_ok=True)
        self._run = run
        self._folder = run.folder(LOGS)
        self._name = f"{life}.jsonl"

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Append a line; values that JSON cannot represent (NaN, infinity) become null."""
        line = {name: _said(value) for name, value in {"time": round(time.time(), 3), "step": step, **values}.items()}
        self._folder.append(self._name, (json.dumps(line) + "\n").encode())

    def merge(self) -> None:
        """Update ``training_log.jsonl``."""
        lines = [json.dumps(line) for line in read_log(self._run.path)]
        self._folder.write_atomic(MERGED, "".join(line + "\n" for line in lines).encode())

    def close(self) -> None:
        self.merge()


def read_log(run: Path) -> list[dict[str, Any]]:
    """The lines of all lives of ``run``, by step; for steps in several lives, those of the last."""
    lives: list[list[dict[str, Any]]] = []
    for path in (run / LOGS).glob("*.jsonl"):
        lines = [] if path.name == MERGED else [line for text in path.read_text().splitlines() if (line := _read(text))]
        if lines:
            lives.append(lines)
    merged: list[dict[str, Any]] = []
    for lines in sorted(lives, key=lambda lines: float(lines[0]["time"])):
        # a life that resumes after step n logs its first line later; lines of earlier lives beyond n are void
        resumed = lines[0].get("resumed_after", lines[0]["step"] - 1)
        merged = [line for line in merged if line["step"] <= resumed] + lines
    return [line for line in merged if "resumed_after" not in line]


def _read(text: str) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None  # truncated by a kill
    return line if isinstance(line, dict) and "step" in line and "time" in line else None


def _said(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


class TensorBoard(Logger):
    """Writes to ``tensorboard/`` in the run's folder."""

    def __init__(self, run: Path, step: int) -> None:
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError:
            raise ConfigError("loggers=tensorboard: install it with pip install tensorboard") from None
        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, step: int, values: dict[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(_group(name), value, step)

    def close(self) -> None:
        self._writer.close()


def _group(name: str) -> str:
    """Tag of a value in TensorBoard: ``valid_accuracy`` → ``valid/accuracy``."""
    return name.replace("_", "/", 1) if name.startswith("valid_") else f"train/{name}"


class Wandb(Logger):
    """One run of Weights & Biases, which all lives of our run resume."""

    def __init__(self, run: Folder, config: TrainConfig) -> None:
        try:
            import wandb
        except ImportError:
            raise ConfigError("loggers=wandb: install it with pip install wandb") from None
        with suppress(FileExistsError):
            run.write_new(_WANDB_ID, uuid.uuid4().hex[:16].encode())
        self._run = wandb.init(
            project=config.wandb_project,
            name=run.path.name,
            id=run.read(_WANDB_ID).decode(),
            resume="allow",
            dir=run.path,
            config=identity(config),
        )

    def write(self, step: int, values: dict[str, Any]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


def open_loggers(run: Folder, config: TrainConfig, life: str, step: int) -> list[Logger]:
    """Open the log that is always written, and the ``loggers=`` of the config.

    Raises:
        ConfigError: a logger is not installed.
    """
    log = TrainingLog(run, life)
    loggers: list[Logger] = [log]
    for name in config.loggers:
        if name == "tensorboard":
            loggers.append(TensorBoard(run.path, step))
        else:
            loggers.append(Wandb(run, config))
    if step:
        log.write(step, {"resumed_after": step})
    log.merge()
    return loggers


class Meter:
    """Mean loss and speed between two log lines.

    Args:
        flops: FLOPs of one sample's forward pass, if known (a step takes three times as many).
        peak: peak FLOP/s of all devices of the run, if known.
    """

    def __init__(self, flops: float = 0.0, peak: float = 0.0) -> None:
        self._flops, self._peak = flops, peak
        self._start = time.monotonic()
        self._samples = 0
        self._waited = 0.0
        self.total, self.steps = 0.0, 0

    def add(self, loss: float, samples: int, waited: float = 0.0) -> None:
        """Add a step; ``waited``: seconds that it waited for data."""
        self.total += loss
        self.steps += 1
        self._samples += samples
        self._waited += waited

    def read(self) -> dict[str, float]:
        """``loss``, ``samples_per_second``, ``data_wait`` (fraction) and, if known, ``mfu`` since the last call."""
        now = time.monotonic()
        seconds = max(1e-9, now - self._start)
        speed = self._samples / seconds
        values = {
            "loss": self.total / max(1, self.steps),
            "samples_per_second": round(speed, 2),
            "data_wait": round(self._waited / seconds, 4),
        }
        if self._flops and self._peak:
            values["mfu"] = round(3 * self._flops * speed / self._peak, 4)
        self._start, self._samples, self._waited = now, 0, 0.0
        self.total, self.steps = 0.0, 0
        return values


def memory_megabytes(device: torch.device) -> int:
    """Peak memory use in MiB: of the GPU, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) >> 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def peak_flops(device: torch.device, precision: str = "bfloat16") -> float:
    """Peak FLOP/s in bfloat16, tf32 or float32 according to the vendor; 0 if unknown."""
    if device.type != "cuda":
        return 0.0
    name = torch.cuda.get_device_name(device)
    place = ("bfloat16", "tf32", "float32").index(precision)
    return next((flops[place] for known, flops in _PEAK_FLOPS.items() if known in name), 0.0)


def flop_counter() -> FlopCounterMode:
    """A context that counts FLOPs, including those of the CPU's attention kernel, which torch does not know."""

    def attention(query: list[int], key: list[int], value: list[int], *_: Any, **__: Any) -> int:
        return sdpa_flop_count(query, key, value)  # type: ignore[no-any-return]

    on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(display=False, custom_mapping={on_cpu: attention})


def forward_flops(model: torch.nn.Module, arguments: tuple[Any, ...]) -> float:
    """FLOPs of one forward pass, counted by torch (matrix products, convolutions, attention)."""
    if not arguments:
        return 0.0
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    with torch.no_grad(), flop_counter() as counter:
        model(*(a.to(device) if isinstance(a, torch.Tensor) else a for a in arguments))
    model.train(training)
    return float(counter.get_total_flops())
