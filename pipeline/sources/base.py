"""The interface of a source, and the sources by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from pipeline.config.schema import ConfigError, SourceConfig
from pipeline.partitions.plan import Input, LeftOut, Partition
from pipeline.samples import IMAGE_COLUMNS, Outcome, Schema


class Source(ABC):
    """Lists what there is, and brings it in partition by partition."""

    rechecks: bool = False
    """Whether planning again is cheap and asks no server, so that it shows if the inputs have changed."""

    format: str = "tar"
    """Storage format of what is brought in."""

    def __init__(self, config: SourceConfig) -> None:
        self.config = config
        self.planned: dict[str, Any] = {}
        """What :meth:`extra` said when the plan was made."""
        self.home = Path()
        """The output folder; sources keep what they need besides in ``partial`` and ``tables`` below it."""
        self.scratch: Path | None = None
        """A folder for files that are needed for a while only."""
        self.left_out = LeftOut()
        """What the last :meth:`plan` has seen that looks like data but is no sample."""
        self.noted: Counter[str] = Counter()
        """The same of the partition that is being brought in, without examples."""
        self.check_stop: Callable[[], None] = lambda: None
        """To be called now and then in long work; raises when the rank was asked to stop."""

    def extra(self) -> dict[str, Any]:
        """What samples need to know of the plan, and the manifest says: class names, revisions, ..."""
        return {}

    def watched(self) -> dict[str, str]:
        """Files besides the inputs that samples depend on, as captions in a file of their own: name → state."""
        return {}

    def changed(self, file: Input) -> bool:
        """Whether a planned input is not what it was."""
        return False

    def schema(self) -> Schema:
        """Columns of the samples."""
        return dict(IMAGE_COLUMNS)

    @abstractmethod
    def plan(self) -> Iterator[Partition]:
        """The partitions, in an order that depends on the inputs alone.

        Raises:
            ConfigError: a setting is missing, or the input is not there.
        """

    @abstractmethod
    def samples(self, partition: Partition) -> Iterator[Outcome]:
        """What becomes of each input of the partition."""

    def origin(self) -> str:
        """The folder that references point into; empty if the samples are stored."""
        return ""


_MODULES = {
    name: name
    for name in (
        "shapes",
        "digits",
        "image_folder",
        "url_list",
        "http_archive",
        "huggingface",
        "parquet",
        "ipc",
        "mds",
        "webdataset",
        "torchvision",
    )
}


def get_source(config: SourceConfig, home: Path, check_stop: Callable[[], None]) -> Source:
    """The source that ``config.source`` names, for the output folder ``home``.

    Raises:
        ConfigError: there is none of that name.
    """
    from pipeline.config.cli import nearest

    if config.source not in _MODULES:
        what = (
            f"source={config.source}"
            if config.source
            else "no source: give dataset= (a YAML that names one) or source="
        )
        raise ConfigError(f"{what}; {nearest(config.source, _MODULES)}")
    source: Source = import_module(f"pipeline.sources.{_MODULES[config.source]}").SOURCE(config)
    source.home, source.check_stop = home, check_stop
    return source
