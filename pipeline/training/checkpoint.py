"""Checkpoints: folders ``checkpoints/step_<n>`` of a run, committed atomically.

    checkpoint.json     facts (config, task, positions, counters) and each file's digest; written last; sealed
    __<rank>_0.distcp   tensors, in the layout of torch.distributed.checkpoint (DCP): "model/<name>", "ema/<name>",
    .metadata           "optimizer/<parameter>/<quantity>"; every rank writes its share, any number of ranks may load

Tensors are read with ``weights_only``; ``.metadata`` is a pickle, of which only the classes that DCP needs are allowed.
There is no random state: all randomness of a step is keyed by (seed, step), see :mod:`pipeline.training.loop`.
"""

from __future__ import annotations

import io
import logging
import pickle
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult

from pipeline.config import cli
from pipeline.config.schema import ConfigError
from pipeline.distributed import Rank
from pipeline.storage import Folder, StorageError, commit, seal
from pipeline.training.staging import Stage, share_of

warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")  # a single rank
logging.getLogger("c10d-NullHandler-dcp_logger").setLevel(logging.WARNING)  # otherwise two records for each tensor

FORMAT_VERSION = 2
FOLDER = "checkpoints"
RECORD = "checkpoint.json"
_METADATA = ".metadata"
_NAME = re.compile(r"step_(\d+)")
_ATTEMPT = re.compile(r"\.step_\d+\.(\w+)")
_METADATA_CLASSES = {
    "builtins": {"set", "frozenset"},
    "collections": {"OrderedDict"},
    "torch": {"Size", "strided"} | {str(t)[6:] for t in vars(torch).values() if isinstance(t, torch.dtype)},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
}


class Superseded(RuntimeError):
    """Another process trains the same run: it has committed this step first, or removed our attempt."""


@dataclass(frozen=True)
class Checkpoint:
    """State after ``step`` optimizer steps.

    Attributes:
        facts: JSON-serialisable values.
        tensors: by part (model, ema, optimizer), then by name.
    """

    step: int
    facts: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]


class Checkpoints:
    """The checkpoints of a run, written by all ranks of one life together.

    Args:
        run: the run's folder.
        life: unique id of this life, the same on all its ranks.
        keep: number of checkpoints to keep; older ones are deleted after each save (0: all are kept).
    """

    def __init__(self, run: Folder, life: str, keep: int, rank: Rank | None = None) -> None:
        run.mkdir(FOLDER, exist_ok=True)
        self.folder = run.folder(FOLDER)
        self.life = life
        self.keep = keep
        self._rank = rank or Rank()
        self._group = self._own_group()
        self._stage = Stage()
        self._thread = ThreadPoolExecutor(1, "latentmill-checkpoint")
        self._pending: Future[None] | None = None

    def _own_group(self) -> dist.ProcessGroup | None:
        """A group for saving in the background only, so that its messages do not interfere with those of a step."""
        if self._rank.world_size == 1:
            return None
        self._rank.process_group()
        group = dist.new_group(backend="gloo")
        assert isinstance(group, dist.ProcessGroup)
        return group

    def save(
        self,
        step: int,
        facts: dict[str, Any],
        tensors: Mapping[str, Tensor],
        *,
        spare: frozenset[int] = frozenset(),
        background: bool = False,
        done: Callable[[], None] = lambda: None,
    ) -> None:
        """Write a checkpoint and commit it by one rename; every rank must call this, with all its tensors.

        Args:
            spare: steps whose checkpoints are never deleted.
            background: only copy the tensors now, and write them while training continues. Errors are then raised by
                the next call, or by :meth:`wait`.
            done: called after the commit.

        Raises:
            Superseded: another process has written this step.
            OSError: for example, the disk is full; nothing is left behind.
        """
        self.wait()
        staged = self._stage.copy(share_of(tensors, self._rank))

        def work() -> None:
            self._stage.wait()
            self._write(step, facts, staged)
            if self._rank.is_main:
                self._prune(spare)
            done()

        self._pending = self._thread.submit(work)
        if not background:
            self.wait()

    def wait(self) -> None:
        """Wait until a save in the background is committed; raises as :meth:`save` does."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, step: int, facts: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        name = f"step_{step:06d}"
        attempt = f".{name}.{self.life}"
        record = {"format_version": FORMAT_VERSION, "step": step, "life": self.life, "facts": facts}
        writer = _FolderWriter(self.folder, attempt, record)
        try:
            try:
                dcp.save(tensors, storage_writer=writer, process_group=self._group, no_dist=self._group is None)
            except CheckpointException as error:
                raise _first_failure(error) from None
            won = not self._rank.is_main or commit(self.folder, attempt, name, proof=RECORD)
        except BaseException:
            if self._rank.is_main:
                with suppress(OSError):
                    self.folder.trash(attempt)
            raise
        if not won:
            self.folder.trash(attempt)
            raise Superseded(f"{self.folder.path / name}: another process is training this run; this one stops")

    def newest(self, log: logging.Logger) -> Path | None:
        """The newest undamaged checkpoint; damaged ones are reported and deleted."""
        for name in reversed(names(self.folder)):
            try:
                with self.folder.folder(name) as folder:
                    checked_record(folder)
                return self.folder.path / name
            except StorageError as error:
                log.warning("%s; going back to the checkpoint before it", error)
                self.folder.trash(name)
        return None

    def _prune(self, spare: frozenset[int]) -> None:
        """Delete all but the newest ``keep`` checkpoints, and unfinished attempts of other lives."""
        for name in names(self.folder)[: -self.keep or None]:
            if step_of(name) not in spare:
                self.folder.trash(name)
        for name in self.folder.listdir():
            found = _ATTEMPT.fullmatch(name)
            if found and found[1] != self.life:
                self.folder.trash(name)


def names(folder: Folder) -> list[str]:
    """Names of committed checkpoints, oldest step first."""
    return sorted((name for name in folder.listdir() if _NAME.fullmatch(name)), key=step_of)


def step_of(name: str) -> int:
    """The step in the name of a checkpoint."""
    return int(name.rpartition("_")[2])


def require_run(config: Any, run: Path, task: str = "diffuse") -> None:
    """Raise ConfigError, saying what makes it, unless the folder ``run`` is there; ``config`` may name it by
    ``checkpoint`` or ``name``."""
    if run.is_dir():
        return
    if config.checkpoint:
        raise ConfigError(f"checkpoint={config.checkpoint}: there is no such training run")
    more = [f"task={task}"] * (task != "diffuse") + [f"name={config.name}"] * bool(config.name)
    command = cli.command_for("train", replace(config, split="train"), *more)
    raise ConfigError(f"there is no training run in {run}; make it with: {command}; or choose another with checkpoint=")


def find_checkpoint(path: str | Path, which: str = "last") -> Path:
    """The checkpoint at ``path``; for a run's folder, its ``last``, or the ``best`` recorded in the last.

    Raises:
        ConfigError: there is no checkpoint.
    """
    place = Path(path)
    if (place / FOLDER).is_dir():
        with Folder.open(place / FOLDER) as folder:
            known = names(folder)
            if not known:
                raise ConfigError(f"checkpoint={path}: this run has no checkpoint yet")
            name = known[-1]
            if which == "best":
                best = (folder.read_sealed(f"{name}/{RECORD}") or {"facts": {}})["facts"].get("best_step", -1)
                name = next((one for one in known if step_of(one) == best), name)
        place = place / FOLDER / name
    if not (place / RECORD).is_file():
        raise ConfigError(f"checkpoint={path}: neither a run folder nor a checkpoint")
    return place


def open_checkpoint(path: str | Path, which: str = "last", parts: tuple[str, ...] = ()) -> Checkpoint:
    """Load the checkpoint found by :func:`find_checkpoint` into memory, or only these ``parts`` of it.

    Raises:
        ConfigError: there is no checkpoint.
        StorageError: it is damaged.
    """
    with Folder.open(find_checkpoint(path, which)) as folder:
        record = checked_record(folder)
        targets = {
            name: torch.empty(tuple(stored.size), dtype=stored.properties.dtype)
            for name, stored in stored_tensors(folder.path).items()
            if not parts or name.partition("/")[0] in parts
        }
        load_into(folder.path, targets)
    tensors: dict[str, dict[str, Tensor]] = {}
    for name, tensor in targets.items():
        part, _, rest = name.partition("/")
        tensors.setdefault(part, {})[rest] = tensor
    return Checkpoint(record["step"], record["facts"], tensors)


def finished_run(place: str, task: str) -> Checkpoint:
    """Load the EMA weights of the run at ``start_from=place``, or of one checkpoint.

    Raises:
        ConfigError: the run is not finished, or of another task.
    """
    found = open_checkpoint(place, parts=("ema",))
    if (steps := found.facts["config"]["steps"]) > found.step and (Path(place) / FOLDER).is_dir():
        raise ConfigError(f"start_from={place}: that run is at step {found.step} of {steps}")
    if found.facts["task"] != task:
        raise ConfigError(f"start_from={place}: its task is {found.facts['task']}, expected {task}")
    return found


def require_same_network(place: str, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Raises ConfigError if the weights at ``start_from=place`` are of a network with other settings."""
    for name, value in ours.items():
        if value != theirs[name]:
            raise ConfigError(f"start_from={place}: its network has {name}={theirs[name]}, this one {value}")


def checked_record(folder: Folder) -> dict[str, Any]:
    """Read checkpoint.json in ``folder`` and check all files against it.

    Raises:
        StorageError: a file is missing or damaged.
        ConfigError: the checkpoint has another format version.
    """
    record = folder.read_sealed(RECORD)
    if record is None:
        raise StorageError(f"{folder.path} has no {RECORD}")
    if record["format_version"] != FORMAT_VERSION:
        raise ConfigError(
            f"{folder.path} has format_version {record['format_version']}, this program reads {FORMAT_VERSION}"
        )
    for name, said in record["files"].items():
        try:
            good = folder.digest_of(name) == said["xxh3"]
        except OSError as error:
            raise StorageError(f"{folder.path / name} cannot be read: {error.strerror}") from None
        if not good:
            raise StorageError(f"{folder.path / name} is damaged: its content does not match its digest")
    return record


def stored_tensors(path: Path) -> dict[str, TensorStorageMetadata]:
    """Shapes and dtypes of the tensors in the checkpoint at ``path``, by name."""
    metadata = _FolderReader(path).read_metadata().state_dict_metadata
    return {name: stored for name, stored in metadata.items() if isinstance(stored, TensorStorageMetadata)}


def load_into(path: Path, tensors: dict[str, Tensor]) -> None:
    """Load ``tensors``, which may be shards of larger ones, from the checkpoint at ``path``, in place.

    Raises:
        ConfigError: the checkpoint lacks one of them, or has it in another shape: it is of another model.
    """
    there = stored_tensors(path)
    for name, tensor in tensors.items():
        if name not in there:
            raise ConfigError(f"{path} is of another model: it has no {name}")
        if there[name].size != tensor.shape:
            raise ConfigError(
                f"{path} is of another model: {name} is {_shape(there[name].size)} there, {_shape(tensor.shape)} here"
            )
    if tensors:
        dcp.load(dict(tensors), storage_reader=_FolderReader(path), no_dist=True)


def _shape(size: torch.Size) -> str:
    return "x".join(map(str, size)) or "a number"


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as "<parameter>/<quantity>", by parameter name, as indices may differ between processes."""
    state = optimizer.state
    return {
        f"{name}/{quantity}": value
        for name, parameter in model.named_parameters()
        for quantity, value in state.get(parameter, {}).items()
    }


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Restore the state returned by :func:`optimizer_tensors`; learning rates etc. stay those of ``optimizer``."""
    names_of = {parameter: name for name, parameter in model.named_parameters()}
    listed = [names_of[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    numbers = {name: number for number, name in enumerate(listed)}
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, quantity = key.rpartition("/")
        state.setdefault(numbers[name], {})[quantity] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def empty_optimizer_tensors(path: Path, model: nn.Module) -> dict[str, Tensor]:
    """Empty tensors for the optimizer's state in the checkpoint at ``path``, sharded like those of ``model``."""
    parameters = dict(model.named_parameters())
    room = {}
    for name, stored in stored_tensors(path).items():
        part, _, key = name.partition("/")
        if part == "optimizer":
            like = parameters.get(key.rpartition("/")[0])
            if like is None:
                raise ConfigError(f"{path} is of another model: it has {name}")
            same = like.shape == stored.size
            dtype = stored.properties.dtype
            room[key] = torch.zeros_like(like, dtype=dtype) if same else torch.zeros(tuple(stored.size), dtype=dtype)
    return room


class _FolderWriter(StorageWriter):
    """Writes DCP's own layout through :mod:`pipeline.storage` into an attempt's folder, with a digest of every file.

    Args:
        parent: folder in which the attempt's folder is created.
        record: content of checkpoint.json except for the files.
    """

    def __init__(self, parent: Folder, attempt: str, record: dict[str, Any]) -> None:
        self._parent = parent
        self._attempt = attempt
        self._record = record

    def reset(self, checkpoint_id: Any = None) -> None: ...

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None: ...

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Called on one rank, before any rank writes."""
        self._parent.mkdir(self._attempt)
        return [replace(plan, storage_data=number) for number, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
        name = f"__{plan.storage_data}_0.distcp"
        results = []
        with self._parent.folder(self._attempt) as folder:
            with folder.create(name) as file:
                for item in plan.items:
                    start = file.tell()
                    torch.save(_compact(planner.resolve_data(item)), file)  # type: ignore[arg-type]
                    place = _StorageInfo(name, start, file.tell() - start)
                    results.append(WriteResult(item.index, place.length, place))
            folder.sync()
        results.append(WriteResult(MetadataIndex(name), file.bytes, {"bytes": file.bytes, "xxh3": file.digest}))
        future: torch.futures.Future[list[WriteResult]] = torch.futures.Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Called on one rank, when all ranks have written."""
        every = [result for some in results for result in some]
        metadata.storage_data = {r.index: r.storage_data for r in every if isinstance(r.storage_data, _StorageInfo)}
        files = {r.index.fqn: r.storage_data for r in every if isinstance(r.storage_data, dict)}
        with self._parent.folder(self._attempt) as folder:
            with folder.create(_METADATA) as file:
                file.write(pickle.dumps(metadata))
            files[_METADATA] = {"bytes": file.bytes, "xxh3": file.digest}
            with folder.create(RECORD) as file:
                file.write(seal({**self._record, "files": files}))


def _compact(data: Tensor | io.BytesIO) -> Tensor:
    """A tensor without the rest of the storage that it may be a view of."""
    assert isinstance(data, Tensor)
    data = data.detach()
    return data if data.untyped_storage().nbytes() == data.nbytes else data.clone()


class _FolderReader(FileSystemReader):
    """Reads what :class:`_FolderWriter` has written."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / _METADATA).open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise StorageError(f"{self.path}/{_METADATA} holds no metadata of torch.distributed.checkpoint")
        return metadata


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _METADATA_CLASSES.get(module, ()):
            raise StorageError(f"{_METADATA} refers to {module}.{name}, which no checkpoint of Latentmill does")
        return super().find_class(module, name)


def _first_failure(error: CheckpointException) -> BaseException:
    """The error of the lowest rank that failed, instead of DCP's long collection of tracebacks."""
    failures: Iterator[Any] = iter(error.failures[rank] for rank in sorted(error.failures))
    failure = next(failures)[0]
    return failure if isinstance(failure, BaseException) else error
