"""The interface of a source, and the sources by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline.config.schema import SourceConfig
from pipeline.partitions.plan import Input, LeftOut, Partition
from pipeline.partitions.stage import Context
from pipeline.registry import ConfigError, nearest, sources
from pipeline.samples import IMAGE_COLUMNS, Outcome, Schema


class Source(ABC):
    """Lists inputs and reads them partition by partition."""

    rechecks: bool = False
    """Whether planning is cheap and contacts no server, so that it can be repeated to detect changed inputs."""

    retries_added: bool = False
    """Whether inputs that were added since belong to failed samples, which ``retry_failed=true`` reads."""

    format: str = "tar"
    """Storage format of the samples."""

    def __init__(self, config: SourceConfig) -> None:
        self.config = config
        self.home = Path()
        """The output folder; sources keep temporary downloads and tables in its subfolders ``partial`` and
        ``tables``."""
        self.left_out = LeftOut()
        """Files found by the last :meth:`plan` that look like data but are not samples."""
        self.noted: Counter[str] = Counter()
        """Counts of such entries in the partition that is being read, without examples."""
        self.check_stop: Callable[[], None] = lambda: None
        """To be called regularly during long work; raises if the rank was asked to stop."""

    def extra(self) -> dict[str, Any]:
        """Facts that :meth:`samples` needs and that are stored in the manifest, such as class names and revisions."""
        return {}

    def watched(self) -> dict[str, str]:
        """Files that samples depend on in addition to the inputs, such as a file of captions: maps names to states."""
        return {}

    def changed(self, file: Input) -> bool:
        """Whether a planned input has changed."""
        return False

    def schema(self) -> Schema:
        """Columns of the samples."""
        return dict(IMAGE_COLUMNS)

    @abstractmethod
    def plan(self) -> Iterator[Partition]:
        """The partitions, in an order that depends on the inputs alone.

        Raises:
            ConfigError: A setting or the input is missing.
        """

    @abstractmethod
    def samples(self, partition: Partition, context: Context) -> Iterator[Outcome]:
        """Yield the outcome of each input of the partition; ``context.extra`` is the value of :meth:`extra` for the
        plan."""

    def origin(self) -> str:
        """The folder that references point into; empty if the samples themselves are stored."""
        return ""


def get_source(config: SourceConfig, home: Path, check_stop: Callable[[], None]) -> Source:
    """Return the source named by ``config.source``, for the output folder ``home``.

    Raises:
        ConfigError: There is no such source.
    """
    if not config.source:
        raise ConfigError(
            f"no source: give dataset= (a YAML that names one) or source=; {nearest(config.source, sources)}"
        )
    source: Source = sources.get(config.source)(config)
    source.home, source.check_stop = home, check_stop
    return source
