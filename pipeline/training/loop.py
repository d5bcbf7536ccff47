"""The training loop. It knows steps, ranks and checkpoints; what is learned is the task's business.

All randomness of a step is keyed by (seed, step) and a sample's place in the global batch. torch's own generator, for
dropout and the like, is seeded anew for each step. So there is no random state to save, a resumed run continues bit
for bit (on the CPU, with the same number of ranks and threads), and other numbers of ranks see the same batches.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.config import ConfigError, TrainConfig, identity
from pipeline.distributed import Rank
from pipeline.distributed.signals import Stopped
from pipeline.loading import Batches, Sampler
from pipeline.randomness import keyed_seed
from pipeline.storage import Folder
from pipeline.training.checkpoint import Checkpoint, Checkpoints, load_optimizer, optimizer_tensors
from pipeline.training.ema import Ema
from pipeline.training.logs import Meter, TrainingLog
from pipeline.training.schedule import learning_rate
from pipeline.training.tasks.base import Keys, Task


class NotFinite(RuntimeError):
    """The loss or the gradient became NaN or infinite; the weights are still those of before the step."""


@dataclass
class State:
    """All that changes while training."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: Ema
    sampler: Sampler
    step: int = 0


def train(task: Task, data: Batches, config: TrainConfig, rank: Rank, run: Folder) -> State:
    """Train ``task`` until ``config.steps``, from the newest checkpoint in the folder ``run`` on, if there is one.

    Raises:
        ConfigError: the run in this folder was started with other settings.
        NotFinite: see there; the newest checkpoint is from before.
        Stopped: a signal came to any rank; the state was saved.
    """
    state = _start(task, data, config, rank)
    life = str(rank.broadcast(uuid.uuid4().hex))
    checkpoints = Checkpoints(run, life, config.keep_checkpoints)
    saved = _resume(state, checkpoints, config, rank)
    network = _replicated(state.model, rank)
    log = TrainingLog(run, life) if rank.is_main else None
    meter = Meter()
    stopping = False
    while True:
        finished = state.step >= config.steps
        if state.step != saved and (finished or stopping or state.step % config.checkpoint_every == 0):
            saved = _save(state, task, checkpoints, config, rank)
        if finished:
            break
        if stopping:
            raise Stopped(f"stopped after step {state.step} of {config.steps}; the same command resumes")

        lr = learning_rate(state.step, config.lr, config.warmup_steps, config.steps, config.schedule)
        for group in state.optimizer.param_groups:
            group["lr"] = lr
        share = _accumulate_gradients(task, network, data, state, config, rank)
        norm = nn.utils.clip_grad_norm_(state.model.parameters(), config.clip_norm)
        loss, stopping = _agree(share, rank)
        _require_finite(loss, float(norm), state)
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        state.ema.update(state.model)
        state.sampler.advance()
        state.step += 1

        meter.add(loss, config.batch_size)
        if log and (state.step % config.log_every == 0 or state.step == config.steps):
            values = {**meter.read(), "lr": lr, "grad_norm": float(norm), "epoch": state.sampler.epoch}
            log.write(step=state.step, **values)
            rank.log.info(
                "step %d/%d  loss %.4f  %.0f samples/s",
                state.step,
                config.steps,
                values["loss"],
                values["samples_per_second"],
            )
    if log:
        log.write(step=state.step, **_evaluate(task, state))
    return state


def _start(task: Task, data: Batches, config: TrainConfig, rank: Rank) -> State:
    model = task.model.to(rank.device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.lr, betas=(0.9, 0.99), weight_decay=config.weight_decay, fused=True
    )
    sampler = Sampler(len(data), config.batch_size, config.seed, rank.rank, rank.world_size)
    return State(model, optimizer, Ema(model, config.ema_decay), sampler)


def _resume(state: State, checkpoints: Checkpoints, config: TrainConfig, rank: Rank) -> int:
    """Load the newest checkpoint into ``state`` on every rank; its step, or -1 if there is none.

    Raises:
        ConfigError: it was made with other settings.
    """
    if not rank.is_main:
        rank.barrier("newest checkpoint")  # rank 0 has moved damaged ones aside
    found = checkpoints.load_latest(rank.log)
    if rank.is_main:
        rank.barrier("newest checkpoint")
    if found is None:
        return -1
    _require_same(found.facts["config"], identity(config), checkpoints.folder)
    state.model.load_state_dict(found.tensors["model"])
    state.ema.load(found.tensors["ema"], found.facts["ema_updates"])
    load_optimizer(state.model, state.optimizer, found.tensors["optimizer"])
    state.sampler.load(found.facts["sampler"])
    state.step = found.step
    if rank.is_main:
        rank.log.info("resuming after step %d of %d", state.step, config.steps)
    return state.step


def _require_same(theirs: dict[str, object], ours: dict[str, object], folder: Folder) -> None:
    for name in sorted(theirs.keys() | ours.keys()):
        if theirs.get(name) != ours.get(name):
            raise ConfigError(
                f"{name}={ours.get(name)}, but the run in {folder.path} was started with {name}={theirs.get(name)}: "
                "use that, or another name="
            )


def _replicated(model: nn.Module, rank: Rank) -> nn.Module:
    """The model, or around it what averages gradients over the ranks (and gives all of them rank 0's weights)."""
    if rank.world_size == 1:
        return model
    rank.process_group()
    return DistributedDataParallel(model, device_ids=[rank.device] if rank.device.type == "cuda" else None)


def _accumulate_gradients(
    task: Task, network: nn.Module, data: Batches, state: State, config: TrainConfig, rank: Rank
) -> Tensor:
    """Gradients of the global batch's mean loss; returns this rank's share of that mean."""
    torch.manual_seed(keyed_seed(config.seed, "step", state.step, rank.rank))
    total = torch.zeros((), device=rank.device)
    positions, slots = state.sampler.positions(), state.sampler.slots()
    parts = list(_cut(positions, slots, config.micro_batch))
    for number, (some, places) in enumerate(parts):
        batch = {name: tensor.to(rank.device) for name, tensor in data.batch(some).items()}
        with _communicating(network, number == len(parts) - 1):
            losses = task.losses(network, batch, Keys(config.seed, state.step, places))
            share = losses.sum() / config.batch_size
            (share * rank.world_size).backward()  # the wrapper takes the mean over ranks: of shares, we need the sum
        total += share.detach()
    return total


def _cut(positions: np.ndarray, slots: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Parts of at most ``size`` samples (0: all at once)."""
    size = size or len(positions)
    for start in range(0, len(positions), size):
        yield positions[start : start + size], slots[start : start + size]


def _communicating(network: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Gradients travel between ranks once a step, with the last part of its batch."""
    if isinstance(network, DistributedDataParallel) and not last:
        return network.no_sync()  # type: ignore[no-any-return]
    return nullcontext()


def _agree(loss: Tensor, rank: Rank) -> tuple[float, bool]:
    """The global mean loss, and whether any rank was asked to stop: ranks get signals at different times, and one that
    stops alone leaves the others waiting."""
    both = torch.stack([loss, torch.tensor(float(rank.stopping), device=loss.device)])
    total, stops = rank.all_reduce(both).tolist()
    return total, stops > 0


def _require_finite(loss: float, norm: float, state: State) -> None:
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise NotFinite(
            f"step {state.step + 1}: loss {loss}, gradient norm {norm}. Nothing of this step was applied. "
            "A lower lr= or clip_norm= may help; the same command goes on from the newest checkpoint"
        )


def _save(state: State, task: Task, checkpoints: Checkpoints, config: TrainConfig, rank: Rank) -> int:
    """Rank 0 writes, the others wait; returns the step."""
    if rank.is_main:
        facts = {
            "config": identity(config),
            "task": task.name,
            "sampler": state.sampler.state(),
            "ema_updates": state.ema.updates,
            "world_size": rank.world_size,
            **task.facts(),
        }
        tensors = {
            "model": state.model.state_dict(),
            "ema": state.ema.weights(),
            "optimizer": optimizer_tensors(state.model, state.optimizer),
        }
        checkpoints.save(Checkpoint(state.step, facts, tensors))
        rank.log.info("saved step %d", state.step)
    rank.barrier("checkpoint")
    rank.saved()
    return state.step


def _evaluate(task: Task, state: State) -> dict[str, float]:
    """The task's metrics with averaged weights; the weights in training are not touched."""
    averaged = deepcopy(state.model)
    averaged.load_state_dict(state.ema.weights())
    averaged.eval()
    with torch.no_grad():
        return task.evaluate(averaged)
