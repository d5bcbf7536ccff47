"""The interface of a stage: how its work is divided into partitions, and the outcome of each input.

The engine does everything else (assignment, files, commits, resumption, the balance), so that a stage cannot get it
wrong.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from pipeline import stores
from pipeline.config import cli
from pipeline.config.schema import (
    STAGES,
    ConfigError,
    StageConfig,
    default_variant,
    identity,
    stage_folder,
    traits_of,
)
from pipeline.distributed import Rank
from pipeline.formats.base import Writer
from pipeline.partitions.dataset import Dataset, Unfinished
from pipeline.partitions.plan import Input, LeftOut, Partition
from pipeline.samples import Outcome, Schema
from pipeline.storage import StorageError

ConfigT = TypeVar("ConfigT", bound=StageConfig, covariant=True)


@dataclass
class Context:
    """Context of a partition, which a stage receives together with it.

    Attributes:
        planned: The content of plan.json of the first generation; ``planned["extra"]`` is the value of
            :meth:`Stage.extra`.
        scratch: Folder for temporary files of the partition; None: the system's.
        notes: Further JSON-able facts for the record and the event of the partition, added by the stage.
        following: The partition that will probably be next. A stage may begin to prepare it.
    """

    planned: Mapping[str, Any] = field(default_factory=dict)
    scratch: Path | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    following: Partition | None = None

    @property
    def extra(self) -> Mapping[str, Any]:
        """The value of :meth:`Stage.extra` when the plan was made."""
        found: Mapping[str, Any] = self.planned.get("extra", {})
        return found


class Stage(ABC, Generic[ConfigT]):
    """One stage of the main line, configured, on one rank.

    ``class Filter(Stage[FilterConfig])``: the parameter is the class of its config.

    Attributes:
        name: Name of the stage.
        version: Increased when the same settings and inputs give different bytes than before.
        reads_upstream: Whether its input is the dataset directory of another stage.
        writes_to_stores: Whether its output may be in an object store; it then accesses it only through the engine.
        rechecks: Whether to plan again and compare if a plan exists, because the inputs may have changed.
        retries_added: Whether inputs that were added since belong to failed samples, which ``retry_failed=true`` reads.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    reads_upstream: ClassVar[bool] = True
    writes_to_stores: ClassVar[bool] = False
    rechecks: ClassVar[bool] = False
    retries_added: ClassVar[bool] = False

    def __init__(self, config: ConfigT, rank: Rank) -> None:
        self.config = config
        self.rank = rank

    @classmethod
    def version_with(cls, config: Any) -> int:
        """:attr:`version`, for stages where a change of version affects only some settings."""
        return cls.version

    @cached_property
    def output(self) -> Path:
        """The stage's dataset directory."""
        if self.config.output:
            output = Path(self.config.output)
            return output if stores.is_url(output) else output.absolute()
        return stage_folder(self.config, self.name, default_variant(self.config)).absolute()

    @cached_property
    def upstream(self) -> Dataset:
        """The finished dataset directory that this stage reads.

        Raises:
            Unfinished: It is missing or not finished.
        """
        return open_input(self.config, self.name)

    def forget_upstream(self) -> None:
        """Open the upstream again when it is next needed."""
        self.__dict__.pop("upstream", None)

    @property
    def input(self) -> str:
        """The input as an absolute path or an address; empty if it is not a folder."""
        if self.reads_upstream:
            return str(self.upstream.root.path)
        given = self.config.input
        return str(Path(given).absolute()) if given and not stores.is_url(given) else given

    @property
    def format(self) -> str:
        """Storage format of the output."""
        return "tar"

    @property
    def shard_bytes(self) -> int:
        return int(getattr(self.config, "shard_bytes", 2**26))

    def adapted(self, writer: Writer) -> Writer:
        """The format's writer, or what the stage puts in front of it."""
        return writer

    @abstractmethod
    def schema(self) -> Schema:
        """Columns of the kept rows."""

    def validate(self) -> None:
        """Raise ConfigError for settings that cannot work; called before a plan is made."""
        return

    def partitions(self, since: int = 0) -> Iterator[Partition]:
        """The partitions of a plan (:meth:`plan`), once the settings are checked."""
        self.validate()
        return self.plan(since)

    @abstractmethod
    def plan(self, since: int = 0) -> Iterator[Partition]:
        """The partitions in order; with an upstream, those made from its partitions from number ``since`` on."""

    @abstractmethod
    def process(self, partition: Partition, context: Context) -> Iterator[Outcome]:
        """Yield the outcome of each input of the partition, in order; a kept outcome contains its row.

        Any exception ends the rank: it means a bug or a broken machine, not bad data.
        """

    def close(self) -> None:
        """Release resources that were kept between partitions. Further partitions may still follow."""
        return

    def extra(self) -> dict[str, Any]:
        """Further facts for the manifest (encoders, shapes, scaling): JSON-able, and the same on every rank."""
        return {}

    def watched(self) -> dict[str, str]:
        """Files that the output depends on in addition to the inputs: name → state."""
        return {}

    def model_files(self) -> dict[str, str]:
        """Files of local models that the output depends on: path → state."""
        return {}

    def left_out(self) -> LeftOut:
        """Files that look like data but are not samples of the plan that was just made."""
        return LeftOut()

    def changed(self, file: Input) -> bool:
        """Whether a planned input has changed, for stages with :attr:`rechecks`."""
        return True

    def remarks(self, success: dict[str, Any]) -> list[str]:
        """Remarks about the finished output for the log, one line each."""
        return one_sided(success)

    def identity(self) -> dict[str, Any]:
        """The settings that the bytes of the output depend on, by name; JSON-able."""
        return identity(self.config)

    def origin(self) -> str:
        """The folder that rows refer to, if the format stores references."""
        return ""


AnyStage = Stage[StageConfig]


def evaluate(*properties: object) -> None:
    """Evaluate cached properties early, so that their errors are raised at once and not in several threads."""


_NEARLY_ALL = 0.999


def one_sided(success: dict[str, Any]) -> list[str]:
    """A warning if nearly all samples were dropped for one reason, which is usually a mistake."""
    total = success["counts"]["in"]
    return [
        f"{count} of {total} samples were dropped for one reason, {reason.partition(':')[2]}: is that setting right?"
        for reason, count in success["reasons"].items()
        if reason.startswith("dropped:") and count > _NEARLY_ALL * total
    ]


def input_folder(config: Any, stage: str) -> Path:
    """The folder that ``stage`` reads: ``input=``, or the upstream's folder below ``data_dir``.

    Raises:
        ConfigError: no input is known, or there are several.
    """
    if config.input:
        return Path(config.input) if stores.is_url(config.input) else Path(config.input).absolute()
    upstreams = upstreams_of(config, stage)
    if not upstreams:
        raise ConfigError(f"stage {stage} reads no other stage's output: give input=")
    return place_of(config, *upstreams)


def upstreams_of(config: Any, stage: str) -> tuple[str, ...]:
    """The stages whose output ``stage`` reads by default; ``config`` may be of another stage that reads the same."""
    own: tuple[str, ...] = config.upstreams if isinstance(config, STAGES[stage]) else traits_of(stage).upstream
    return own


def place_of(config: Any, *upstreams: str) -> Path:
    """The folder with the newest result of the stages ``upstreams``.

    Of the existing results, it is the one that was made from all others, directly or through other stages. If there
    is none, it is the result of the last stage in any variant.

    Raises:
        ConfigError: there are two results of which neither was made from the other, or several variants.
    """
    there = [place for stage in upstreams if (place := stage_folder(config, stage).absolute()).exists()]
    if there:
        return _last_of(there)
    place = stage_folder(config, upstreams[-1]).absolute()
    upstream = upstreams[-1]
    found = sorted(p for p in place.parent.glob(f"{upstream}-*") if p.is_dir())
    if len(found) > 1:
        raise ConfigError(
            f"several results of stage {upstream}: choose one with input=, of {', '.join(map(str, found))}"
        )
    return found[0] if found else place


def _last_of(places: list[Path]) -> Path:
    """The one of several results of a dataset that was made from the others; the first if that has no plan yet."""
    made_from = {place: _ancestors(place) for place in places}
    if made_from[places[0]] is None:
        return places[0]
    planned = [place for place in places if made_from[place] is not None]
    ends = [place for place in planned if not any(place in (made_from[other] or ()) for other in planned)]
    if len(ends) > 1:
        raise ConfigError(
            f"{' and '.join(map(str, ends))} are there, and none was made from the other: choose one with input="
        )
    return ends[0]


def _ancestors(place: Path) -> set[Path] | None:
    """All dataset directories that ``place`` was made from, directly or indirectly; None if it has no plan.

    A folder of the upstream's name next to ``place`` is taken for the upstream, since both may have been moved.
    """
    found: set[Path] = set()
    while True:
        try:
            upstream = Dataset.open(place).plans[-1].header.get("upstream")
        except (Unfinished, StorageError):
            return found or None
        if upstream is None:
            return found
        beside = place.parent / Path(upstream["path"]).name
        place = beside if beside.exists() else Path(upstream["path"])
        if place in found:
            raise ConfigError(f"{place} was made from what an earlier one led to: choose the input with input=")
        found.add(place)


def open_input(config: Any, stage: str) -> Dataset:
    """The finished dataset directory that ``stage`` reads; waits ``config.wait`` seconds for it.

    Raises:
        Unfinished: It is missing or not finished. The message has the command that makes it.
    """
    deadline = time.monotonic() + getattr(config, "wait", 0.0)
    while True:
        try:
            dataset = Dataset.open(input_folder(config, stage))
            dataset.require_success()
            return dataset
        except Unfinished as error:
            if time.monotonic() >= deadline:
                raise Unfinished(f"stage {stage} cannot start: {error}{_command_for_input(config, stage)}") from None
            time.sleep(1.0)


def _command_for_input(config: Any, stage: str) -> str:
    """The end of a message: the command that makes the default input of ``stage``; empty if ``input=`` is set."""
    missing: list[str] = []
    upstreams = () if config.input else upstreams_of(config, stage)
    while upstreams and not (missing and _is_finished(config, upstreams)):
        missing.insert(0, upstreams[-1])
        upstreams = traits_of(upstreams[-1]).upstream
    return f"; make it with: {cli.command_for(','.join(missing), config)}" if missing else ""


def _is_finished(config: Any, stages: tuple[str, ...]) -> bool:
    try:
        return Dataset.open(place_of(config, *stages)).success is not None
    except (ConfigError, StorageError, OSError):
        return False


def follow_upstream(upstream: Dataset, since: int) -> Iterator[Partition]:
    """One partition for each of the upstream's, from number ``since`` on."""
    for index in range(since, upstream.partitions):
        yield Partition(
            (Input("partition", index, index + 1),), int(upstream.places[index + 1] - upstream.places[index])
        )
