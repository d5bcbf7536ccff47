"""The training loop. It handles steps, ranks and checkpoints; the task defines what is learned.

All randomness of a step is keyed by (seed, step) and a sample's slot in the global batch. torch's own generator, for
dropout etc., is seeded again in each step. There is thus no random state to save, a resumed run continues bit for bit
(with the same number of ranks and threads, on the CPU or with deterministic kernels), and any number of ranks sees the
same batches.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pipeline.config.schema import ConfigError, TrainConfig, identity
from pipeline.distributed import Rank
from pipeline.distributed.signals import Stopped
from pipeline.imaging.contact_sheet import grid, png
from pipeline.loading import Batches, Sampler
from pipeline.loading.bucketed import BucketSampler
from pipeline.randomness import keyed_seed
from pipeline.registry import ExpectedError
from pipeline.storage import Folder
from pipeline.training.checkpoint import (
    Checkpoints,
    empty_optimizer_tensors,
    load_into,
    load_optimizer,
    optimizer_tensors,
)
from pipeline.training.compile_cache import load_compiled, save_compiled
from pipeline.training.ema import Ema, buffers_of
from pipeline.training.export import Uploads, export, export_epoch
from pipeline.training.feed import Feed, Part, on_device, part_size, sampler_of, shape_ranges
from pipeline.training.loggers import Logger, Meter, forward_flops, memory_megabytes, open_loggers, peak_flops
from pipeline.training.parallel import (
    autocast,
    check_parallel,
    checkpoint_activations,
    communicating,
    compile_blocks,
    shard,
    wrapped,
)
from pipeline.training.profiling import Profiler
from pipeline.training.resuming import newest_record, require_same_data, settled
from pipeline.training.schedule import learning_rate
from pipeline.training.tasks.base import Keys, Task
from pipeline.training.verdicts import StopRequests, Verdicts

SHOWN = "shown"


class NotFinite(ExpectedError):
    """The loss or the gradient was NaN or infinite too often; the weights are those of the last good step."""


@dataclass
class Progress:
    """The progress of the validation metric."""

    evaluated: int = -1
    """Step of the last evaluation."""
    best: float | None = None
    best_step: int = -1
    without_gain: int = 0
    """Evaluations since the best one."""
    since_reduction: int = 0
    reductions: int = 0
    """How often schedule=plateau has reduced the learning rate."""
    valid_loss: float | None = None
    """Of the last evaluation."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Of the last evaluation."""

    def see(self, step: int, value: float, higher_is_better: bool, patience: int) -> None:
        """Record an evaluation; ``patience``: evaluations without improvement before the learning rate is reduced."""
        self.evaluated = step
        gained = self.best is None or (value > self.best if higher_is_better else value < self.best)
        if gained and math.isfinite(value):
            self.best, self.best_step, self.without_gain, self.since_reduction = value, step, 0, 0
            return
        self.without_gain += 1
        self.since_reduction += 1
        if self.since_reduction >= patience:
            self.reductions, self.since_reduction = self.reductions + 1, 0


@dataclass
class State:
    """All state that changes during training."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: Ema
    sampler: Sampler | BucketSampler
    meter: Meter
    step: int = 0
    skipped: int = 0
    """Number of consecutive steps, up to now, that were not finite."""
    skipped_ever: int = 0
    progress: Progress = field(default_factory=Progress)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of a checkpoint."""
        optimizer = optimizer_tensors(self.model, self.optimizer)
        parts = {"model": self.model.state_dict(), "ema": self.ema.weights(), "optimizer": optimizer}
        return {f"{part}/{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}

    def facts(self) -> dict[str, Any]:
        """All other state that a resumed run needs, as JSON-serialisable values."""
        return {
            "sampler": self.sampler.state(),
            "ema_updates": self.ema.updates,
            "skipped": self.skipped,
            "skipped_ever": self.skipped_ever,
            "progress": asdict(self.progress),
            "best_step": self.progress.best_step,
            "meter": [self.meter.total, self.meter.steps],
        }

    def load(self, place: Path, facts: dict[str, Any], step: int) -> None:
        """Load the checkpoint at ``place``."""
        parts = {"model": self.model.state_dict(), "ema": self.ema.weights()}
        load_into(place, {f"{part}/{name}": t for part, tensors in parts.items() for name, t in tensors.items()})
        optimizer = empty_optimizer_tensors(place, self.model)
        load_into(place, {f"optimizer/{name}": tensor for name, tensor in optimizer.items()})
        load_optimizer(self.model, self.optimizer, optimizer)
        self.sampler.load(facts["sampler"])
        self.step, self.ema.updates = step, facts["ema_updates"]
        self.skipped, self.skipped_ever = facts["skipped"], facts["skipped_ever"]
        self.progress = Progress(**facts["progress"])
        self.meter.total, self.meter.steps = facts["meter"]


def train(
    task: Task,
    data: Batches,
    config: TrainConfig,
    rank: Rank,
    run: Folder,
    valid: Batches | None = None,
    about: dict[str, Any] | None = None,
) -> State:
    """Train ``task`` until ``config.steps``, resuming from the newest checkpoint in the folder ``run``, if any.

    Args:
        valid: validation set; its metrics determine the best checkpoint and early stopping.
        about: facts about the data for the model card; JSON-serialisable.

    Raises:
        ConfigError: the run in this folder was started with other settings or data.
        NotFinite: too many steps were not finite; the newest checkpoint is from before.
        Stopped: a rank received a signal; the state was saved.
    """
    return Training(task, data, config, rank, run, valid, about).run()


class Training:
    """One life of a run; see :func:`train`."""

    def __init__(
        self,
        task: Task,
        data: Batches,
        config: TrainConfig,
        rank: Rank,
        run: Folder,
        valid: Batches | None,
        about: dict[str, Any] | None = None,
    ) -> None:
        check(config, rank)
        self.about = {**(about or {}), "samples": len(data), "validation_samples": len(valid) if valid else 0}
        self.task, self.rank, self.folder, self.valid = task, rank, run, valid
        life = str(rank.broadcast(uuid.uuid4().hex))
        self.checkpoints = Checkpoints(run, life, config.keep_checkpoints, rank)
        found = newest_record(self.checkpoints, rank)
        if found:
            require_same_data(found[1]["facts"], len(data), self.checkpoints.folder)
        self.config = config = settled(config, found, self.checkpoints.folder, rank)
        flops = forward_flops(task.model, task.example())
        self.state = state = _start(task, data, config, rank)
        state.meter = Meter(flops, peak_flops(rank.device, config.precision) * rank.world_size)
        self.saved = -1
        if found:
            name, record = found
            state.load(self.checkpoints.folder.path / name, record["facts"], record["step"])
            self.saved = state.step
        self.network = wrapped(state.model, config, rank)
        if config.compile:
            load_compiled(run, rank)
        self.loggers = open_loggers(run, config, life, state.step) if rank.is_main else []
        left = max(0, config.steps - state.step)
        self.feed = Feed(task, data, state.sampler, state.step, left, config, rank) if left else None
        self.verdicts = Verdicts(rank.device, config.max_skipped, state.skipped)
        self.requests = StopRequests(rank)
        self.profiler = Profiler(run, rank, config.profile, left)
        self.uploads = Uploads(config.hub_repo, rank.log, run.path)
        self.unread: list[tuple[int, float, float]] = []
        """Step, seconds without data, and learning rate of each step whose verdict has not been read."""
        self.last = {"loss": math.nan, "grad_norm": math.nan, "lr": math.nan}
        self.done = 0

    def run(self) -> State:
        """Train until the end, or until a rank is asked to stop."""
        state, config, rank = self.state, self.config, self.rank
        stopping = False
        try:
            while True:
                if not stopping and _due(state, config) and self.valid and len(self.valid):
                    self.read()
                    stopping = _evaluate(self.task, state, self.valid, config, rank, self.loggers, self.folder)
                finished = state.step >= config.steps or _out_of_patience(state, config)
                self._checkpoint(finished, stopping)
                if stopping:
                    raise Stopped(f"stopped after step {state.step} of {config.steps}; the same command resumes")
                if finished:
                    break
                stopping = self._step()
                if self.verdicts.immediate or state.step % config.log_every == 0:
                    self.read()
                if state.step % config.log_every == 0 or state.step == config.steps:
                    self.read()
                    _log(state, config, rank, self.loggers, {n: self.last[n] for n in ("lr", "grad_norm")})
        finally:
            self.profiler.close(state.step)
            self.checkpoints.wait()
            for logger in self.loggers:
                logger.close()
        if rank.is_main:
            self.uploads.wait()
            self.uploads.start(export(self.folder, state.progress.best_step))
            self.uploads.wait()
        return state

    def _checkpoint(self, finished: bool, stopping: bool) -> None:
        """Save and export if due."""
        state, config = self.state, self.config
        best = state.progress.best_step == state.step
        epoch = _finished_epoch(state, config)
        due = finished or stopping or best or epoch or state.step % config.checkpoint_every == 0
        if state.step != self.saved and due:  # in the background, unless the process is about to exit
            self.read()
            background = not (finished or stopping)
            if config.compile and self.rank.is_main:
                save_compiled(self.folder, self.rank)
            self.saved = _save(state, self.task, self.checkpoints, config, self.rank, self.about, background=background)
        if epoch and self.rank.is_main and not stopping:
            self.checkpoints.wait()
            progress = state.progress
            made = export_epoch(self.folder, epoch, state.step, progress.best_step, progress.valid_loss, config)
            self.uploads.start(made)

    def _step(self) -> bool:
        """Run one optimizer step without synchronizing with a GPU; returns whether a rank was asked to stop."""
        state, config, rank = self.state, self.config, self.rank
        assert self.feed is not None
        lr = learning_rate(config, state.step, state.progress.reductions)
        for group in state.optimizer.param_groups:
            group["lr"] = lr
        self.profiler.step(state.step + 1)
        share, waited = _accumulate_gradients(self.task, self.network, self.feed, state, config, rank)
        norm = _clip(state.model, config.clip_norm)
        loss, stopping = _agree(share, rank, self.requests)
        left_out = self.verdicts.judge(loss, norm)
        state.optimizer.found_inf = left_out  # type: ignore[attr-defined] # its kernel leaves the step out
        state.optimizer.step()
        _share_buffers(state.model, rank)
        state.ema.update(state.model, left_out)
        state.optimizer.zero_grad(set_to_none=True)
        state.sampler.advance()
        state.step += 1
        self.profiler.done(state.step)

        self.unread.append((state.step, waited, lr))
        rank.waited += waited
        batch = config.batch_size // rank.world_size
        self.done += batch
        now = {"step": state.step, "of": config.steps, "batch": batch, "done": self.done}
        rank.now = now | ({"loss": self.last["loss"]} if math.isfinite(self.last["loss"]) else {})
        return stopping

    def read(self) -> None:
        """Read the results of all steps so far, and update meter and counters.

        Raises:
            NotFinite: too many consecutive steps were skipped.
        """
        state, config = self.state, self.config
        for (number, waited, lr), step in zip(self.unread, self.verdicts.read(), strict=True):
            self.last = {"loss": step.loss, "grad_norm": step.norm, "lr": lr}
            state.meter.add(step.loss, config.batch_size, waited)
            state.skipped = step.in_row
            state.skipped_ever += step.in_row > 0
            if step.in_row > config.max_skipped:
                raise NotFinite(
                    f"step {number}: loss {step.loss}, gradient norm {step.norm}, {step.in_row} steps in a row "
                    f"(max_skipped={config.max_skipped}). None of them was applied. A lower lr= or clip_norm= may "
                    "help; the same command resumes from the newest checkpoint"
                )
            if step.in_row and self.rank.is_main:
                self.rank.log.warning("step %d is left out: loss %s, gradient norm %s", number, step.loss, step.norm)
        self.unread.clear()
        if self.rank.now and math.isfinite(self.last["loss"]):
            self.rank.now = {**self.rank.now, "loss": self.last["loss"]}


# ---- the start


def check(config: TrainConfig, rank: Rank) -> None:
    """Check that the settings fit together.

    Raises:
        ConfigError: names the settings that do not.
    """
    check_parallel(config, rank)
    if config.batch_size < rank.world_size:
        raise ConfigError(f"batch_size={config.batch_size}: less than one sample for each of {rank.world_size} ranks")
    if (config.schedule == "plateau" or config.early_stop) and not config.valid_fraction:
        name = "schedule=plateau" if config.schedule == "plateau" else f"early_stop={config.early_stop}"
        raise ConfigError(f"{name} needs a validation set: valid_fraction=0.1, for example")


def _start(task: Task, data: Batches, config: TrainConfig, rank: Rank) -> State:
    model = task.model.to(rank.device)
    if config.checkpoint_activations:
        checkpoint_activations(model)
    if config.compile:
        compile_blocks(model)
    if config.parallel != "ddp":
        shard(model, config, rank, config.precision)
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (decayed if task.decays(name, parameter) else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=config.lr, betas=(0.9, config.beta2), fused=True
    )
    return State(model, optimizer, Ema(model, config.ema_decay), sampler_of(data, config, rank), Meter())


# ---- a step


def _accumulate_gradients(
    task: Task, network: nn.Module, feed: Feed, state: State, config: TrainConfig, rank: Rank
) -> tuple[Tensor, float]:
    """Accumulate gradients of the global batch's mean loss; returns this rank's share, and seconds without data."""
    torch.manual_seed(keyed_seed(config.seed, "step", state.step, rank.rank))
    total = torch.zeros((), device=rank.device)
    before, last = feed.waited, False
    while not last:
        part = next(feed)
        last = part.last
        with communicating(network, state.model, last):
            losses = _losses(task, network, part, config, rank)
            share = losses.sum() / config.batch_size
            (share * rank.world_size).backward()  # the wrapper averages over ranks, but shares must be summed
        total += share.detach()
        feed.prefetch()
    return total, feed.waited - before


def _losses(task: Task, network: nn.Module, part: Part, config: TrainConfig, rank: Rank) -> Tensor:
    with autocast(config.precision, rank.device):
        return task.losses(network, part.batch, part.keys).float()


def _clip(model: nn.Module, most: float) -> Tensor:
    """Clip gradients to the norm ``most``; returns their norm () before."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), most)
    whole: Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return whole


def _agree(loss: Tensor, rank: Rank, requests: StopRequests) -> tuple[Tensor, bool]:
    """The global mean loss (), and whether any rank was asked to stop."""
    if rank.device.type == "cuda":
        return rank.all_reduce(loss), requests.answer()
    both = rank.all_reduce(torch.stack([loss, torch.tensor(float(rank.stopping))]))
    return both[0], bool(both[1] > 0)


def _share_buffers(model: nn.Module, rank: Rank) -> None:
    """Broadcast rank 0's buffers (such as a batch norm's), so that all ranks save the same state."""
    if rank.world_size > 1:
        import torch.distributed as dist

        for tensor in buffers_of(model).values():
            dist.broadcast(tensor, 0, group=rank.process_group())


def _log(state: State, config: TrainConfig, rank: Rank, loggers: list[Logger], more: dict[str, float]) -> None:
    values: dict[str, Any] = {**state.meter.read(), **more, "epoch": state.sampler.epoch}
    values |= {"skipped": state.skipped_ever, "memory_mb": memory_megabytes(rank.device)}
    for logger in loggers:
        logger.write(state.step, values)
    if rank.is_main:
        rank.log.info(
            "step %d/%d  loss %.4f  %.0f samples/s",
            state.step,
            config.steps,
            values["loss"],
            values["samples_per_second"],
        )


# ---- evaluation and checkpoints


def _due(state: State, config: TrainConfig) -> bool:
    """Whether to evaluate: every ``evaluate_every`` steps, and at the end."""
    every = config.evaluate_every or config.steps
    return (
        state.step > state.progress.evaluated
        and state.step > 0
        and (state.step % every == 0 or state.step >= config.steps or _finished_epoch(state, config) > 0)
    )


def _finished_epoch(state: State, config: TrainConfig) -> int:
    """The epoch (from 1) that ends with this step, to within half a batch, if it is to be exported; else 0."""
    if not config.export_every or not state.step:
        return 0
    per_step = config.batch_size / state.sampler.n
    epoch = round(state.step * per_step)
    ends = epoch > 0 and state.step == max(1, round(epoch / per_step))
    return epoch if ends and (epoch % config.export_every == 0 or state.step >= config.steps) else 0


def _out_of_patience(state: State, config: TrainConfig) -> bool:
    return config.early_stop > 0 and state.progress.without_gain >= config.early_stop


def _evaluate(
    task: Task,
    state: State,
    valid: Batches,
    config: TrainConfig,
    rank: Rank,
    loggers: list[Logger],
    run: Folder,
) -> bool:
    """Evaluate the EMA weights on all ranks together, and write the task's images of them, and the real ones, to
    ``shown/``.

    Returns whether a signal arrived meanwhile: the evaluation is then discarded, and repeated after resuming.
    """
    size = part_size(task, config, rank)
    sums: dict[str, Tensor] = {}
    state.model.eval()
    try:
        with state.ema.in_place(state.model), torch.no_grad():
            for start, stop in _parts_of(valid, size * rank.world_size):
                if rank.all_reduce(float(rank.stopping), "max"):
                    return True
                positions = start + rank.rank * size + np.arange(size)
                real = torch.from_numpy(positions < stop).to(rank.device)
                positions = np.minimum(positions, stop - 1)
                for name, (values, weights) in _measured(task, state, valid, positions, config, rank).items():
                    weights = torch.where(real, weights, 0.0).double()
                    total = torch.stack([(values.double() * weights).sum(), weights.sum()])
                    sums[name] = sums.get(name, torch.zeros_like(total)) + total
            with autocast(config.precision, rank.device):
                images = {f"step_{state.step:06d}": task.pictures(state.model), "real": task.pictures(None)}
    finally:
        state.model.train()
    means = task.summary({name: total / weight for name, (total, weight) in _reduced(sums, rank).items() if weight})
    state.progress.valid_loss, state.progress.metrics = means.get("valid_loss"), dict(means)
    state.progress.see(state.step, means[task.metric], task.higher_is_better, config.lr_patience)
    for logger in loggers:
        logger.write(state.step, means)
    if rank.is_main:
        _write_images(run, images)
        rank.log.info("step %d  %s", state.step, "  ".join(f"{name} {mean:.4f}" for name, mean in means.items()))
    return False


def _write_images(run: Folder, images: dict[str, npt.NDArray[Any] | None]) -> None:
    """Write rows of images to ``shown/``."""
    for name, shown in images.items():
        if shown is not None:
            run.mkdir(SHOWN, exist_ok=True)
            with run.folder(SHOWN) as folder:
                folder.write_atomic(f"{name}.png", png(grid(shown, columns=len(shown))))


def _parts_of(valid: Batches, size: int) -> Iterator[tuple[int, int]]:
    """For each global batch of ``size``: its start, and the end of the samples that have its shape."""
    for samples in shape_ranges(valid):
        for start in samples[::size]:
            yield start, samples.stop


def _measured(
    task: Task, state: State, valid: Batches, positions: npt.NDArray[Any], config: TrainConfig, rank: Rank
) -> dict[str, tuple[Tensor, Tensor]]:
    """Metrics of a batch. All ranks have the same number of batches; those beyond the end repeat the last sample, which
    then has no weight."""
    keys = Keys(config.seed, -1, positions, positions, np.zeros_like(positions))
    batch = task.prepare(valid.batch(positions), keys)
    with autocast(config.precision, rank.device):
        return task.measure(state.model, on_device(batch, rank.device, task.on_host), keys)


def _reduced(sums: dict[str, Tensor], rank: Rank) -> dict[str, tuple[float, float]]:
    if not sums:
        return {}
    table = rank.all_reduce(torch.stack(list(sums.values())))
    return {name: (total, weight) for name, (total, weight) in zip(sums, table.tolist(), strict=True)}


def _save(
    state: State,
    task: Task,
    checkpoints: Checkpoints,
    config: TrainConfig,
    rank: Rank,
    about: dict[str, Any],
    *,
    background: bool,
) -> int:
    """Save a checkpoint, of which every rank writes its share; returns the step."""
    facts = {"config": identity(config), "task": task.name, "world_size": rank.world_size, **state.facts()}
    facts |= {**task.facts(), "preprocessing": task.preprocessing(), "data": about}
    step = state.step

    def done() -> None:
        rank.saved()
        if rank.is_main:
            rank.log.info("saved step %d", step)

    checkpoints.save(
        step,
        facts,
        state.tensors(),
        spare=frozenset({state.progress.best_step}),
        background=background and config.save_in_background,
        done=done,
    )
    return step
