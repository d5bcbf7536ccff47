"""What a stage has to say: how its work is cut into partitions, and what becomes of each input of one.

Everything else (who works on what, files, commits, resumption, the balance) is the engine's, so that a stage cannot get
it wrong.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from pipeline.config.schema import (
    MAIN_LINE,
    UPSTREAMS,
    ConfigError,
    StageConfig,
    default_variant,
    identity,
    stage_folder,
)
from pipeline.distributed import Rank
from pipeline.formats.base import Writer
from pipeline.partitions.dataset import Dataset
from pipeline.partitions.plan import Input, LeftOut, Partition
from pipeline.samples import Outcome, Schema


class Stage(ABC):
    """One stage of the main line, configured, on one rank.

    Attributes:
        name: the stage's name.
        version: raised when equal settings and inputs give other bytes than before.
        reads_upstream: whether its input is another stage's dataset directory.
        rechecks: plan again when an existing plan is found, and compare: the inputs may have changed since.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    reads_upstream: ClassVar[bool] = True
    rechecks: ClassVar[bool] = False

    def __init__(self, config: StageConfig, rank: Rank) -> None:
        self.config: Any = config
        self.rank = rank
        self.planned: dict[str, Any] = {}
        """plan.json of the first generation, once the plan is there."""
        self.scratch: Path | None = None
        """While a partition is processed: a folder for files that are needed for a while only."""
        self.notes: dict[str, Any] = {}
        """What the record and the event of the partition should say as well once it is processed; JSON-able."""
        self.following: Partition | None = None
        """While a partition is processed: the one that will probably be the next. A stage may begin with it early."""

    @classmethod
    def version_with(cls, config: Any) -> int:
        """:attr:`version`, where only some settings give other bytes than before."""
        return cls.version

    @cached_property
    def output(self) -> Path:
        """The stage's dataset directory."""
        if self.config.output:
            return Path(self.config.output).absolute()
        return stage_folder(self.config, self.name, default_variant(self.config)).absolute()

    @cached_property
    def upstream(self) -> Dataset:
        """The finished dataset directory that this stage reads.

        Raises:
            Unfinished: it is missing or not complete.
        """
        return open_input(self.config, self.name)

    def forget_upstream(self) -> None:
        """Look at the upstream anew when it is needed next."""
        self.__dict__.pop("upstream", None)

    @property
    def input(self) -> str:
        """What the stage reads, as an absolute path; empty if that is no folder."""
        if self.reads_upstream:
            return str(self.upstream.root.path)
        return str(Path(self.config.input).absolute()) if self.config.input else ""

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

    @abstractmethod
    def plan(self, since: int = 0) -> Iterator[Partition]:
        """The partitions in order; of an upstream, those made of its partitions from number ``since`` on."""

    @abstractmethod
    def process(self, partition: Partition) -> Iterator[Outcome]:
        """What becomes of each input of the partition, in order; a kept outcome carries its row.

        An exception other than these outcomes ends the rank: it means a defect or a broken machine, not bad data.
        """

    def close(self) -> None:
        """Let go of what was kept from one partition to the next; the stage may be asked for more all the same."""
        return

    def extra(self) -> dict[str, Any]:
        """What else the manifest should say (encoders, shapes, scaling); JSON-able, the same on every rank."""
        return {}

    def watched(self) -> dict[str, str]:
        """Files besides the inputs that the result depends on: name → state."""
        return {}

    def left_out(self) -> LeftOut:
        """What looks like data but is no sample of the plan that was just made."""
        return LeftOut()

    def changed(self, file: Input) -> bool:
        """Whether a planned input is not what it was, where :attr:`rechecks` holds."""
        return True

    def remarks(self, success: dict[str, Any]) -> list[str]:
        """What a person should know about the finished result, a line each."""
        return one_sided(success)

    def identity(self) -> dict[str, Any]:
        """The settings that the bytes of the result depend on, by name; JSON-able."""
        return identity(self.config)

    def origin(self) -> str:
        """The folder that rows refer to, if the format holds references."""
        return ""


_NEARLY_ALL = 0.999


def one_sided(success: dict[str, Any]) -> list[str]:
    """A warning where nearly all samples were dropped for one reason: more often a mistake than a choice."""
    total = success["counts"]["in"]
    return [
        f"{count} of {total} samples were dropped for one reason, {reason.partition(':')[2]}: is that setting right?"
        for reason, count in success["reasons"].items()
        if reason.startswith("dropped:") and count > _NEARLY_ALL * total
    ]


def input_folder(config: Any, stage: str) -> Path:
    """The folder that ``stage`` reads: ``input=``, or the upstream's place below ``data_dir``.

    Raises:
        ConfigError: it cannot be told, or several variants are there.
    """
    if config.input:
        return Path(config.input).absolute()
    return place_of(config, *(UPSTREAMS.get(stage) or (MAIN_LINE[MAIN_LINE.index(stage) - 1],)))


def place_of(config: Any, *upstreams: str) -> Path:
    """Where the result of the first of the stages ``upstreams`` that is there lies, whatever its variant.

    Raises:
        ConfigError: several variants are there.
    """
    for upstream in upstreams:
        place = stage_folder(config, upstream).absolute()
        if place.exists():
            return place
    found = sorted(p for p in place.parent.glob(f"{upstream}-*") if p.is_dir())
    if len(found) > 1:
        raise ConfigError(
            f"several results of stage {upstream}: choose one with input=, of {', '.join(map(str, found))}"
        )
    return found[0] if found else place


def open_input(config: Any, stage: str) -> Dataset:
    """The finished dataset directory that ``stage`` reads; waits ``config.wait`` seconds for it."""
    import time

    from pipeline.partitions.dataset import Unfinished

    deadline = time.monotonic() + getattr(config, "wait", 0.0)
    while True:
        try:
            dataset = Dataset.open(input_folder(config, stage))
            dataset.require_success()
            return dataset
        except Unfinished as error:
            if time.monotonic() >= deadline:
                raise Unfinished(f"stage {stage} cannot start: {error}") from None
            time.sleep(1.0)


def follow_upstream(upstream: Dataset, since: int) -> Iterator[Partition]:
    """One partition for each of the upstream's, from number ``since`` on."""
    for index in range(since, upstream.partitions):
        yield Partition(
            (Input("partition", index, index + 1),), int(upstream.places[index + 1] - upstream.places[index])
        )
