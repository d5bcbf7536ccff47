"""WebDataset tars, by URL or on this machine: ``urls=[part-{0000..0099}.tar]``, or a folder of tars as ``input=``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from itertools import islice
from pathlib import Path

from pipeline.config.schema import ConfigError
from pipeline.partitions.plan import Input
from pipeline.samples import SampleError, path_text
from pipeline.sources.archives.member import Wants
from pipeline.sources.archives.tar import tar_members
from pipeline.sources.files import FileSource, Place, local_input
from pipeline.sources.http_archive import check_url, share
from pipeline.sources.ranges import expand

_INSIDE = "inside "


class WebDataset(FileSource):
    """Tar files whose neighbours of one stem are a sample: image, ``.txt``, ``.json``, ``.cls``.

    With ``annotations=archives`` each tar is a class, and a tar of such tars is as good as a folder of them.
    """

    suffixes: tuple[str, ...] = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".zip")

    @cached_property
    def places(self) -> dict[str, str]:
        """Name → URL or path of each file, in order.

        Raises:
            ConfigError: there are none, or two have one name.
        """
        config = self.config
        if config.urls:
            found = expand(config.urls)
            for url in found:
                if "://" in url:
                    check_url(url)
        elif config.input:
            found = [str(path) for path in self._below(Path(config.input).absolute())]
        else:
            raise ConfigError(f"source={config.source} needs urls=[...] or input=<a file or folder>")
        names = {path_text(_name(place)): place for place in found}
        if len(names) < len(found):
            base = Path(config.input).absolute()
            names = {path_text(str(Path(place).relative_to(base))): place for place in found} if config.input else {}
            if not names:
                raise ConfigError("urls: two files have the same name")
        return names

    def _below(self, path: Path) -> list[Path]:
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.name.lower().endswith(self.suffixes) and p.is_file())
            if not found:
                raise ConfigError(f"input={path}: no {', '.join(self.suffixes)} files in it")
            return found
        if not path.is_file():
            raise ConfigError(f"input={path}: no such file or folder")
        return [path]

    def inputs(self) -> Iterator[Input]:
        return islice(self._found, share(len(self._found), self.config.fraction))

    @cached_property
    def _found(self) -> list[Input]:
        found: list[Input] = []
        for number, (name, place) in enumerate(self.places.items()):
            if "://" in place:
                found.append(Input(name, number, number + 1))
                continue
            file = local_input(place, name, number)
            found += (self._inside(file, place) if self.config.annotations == "archives" else []) or [file]
        if len({file.path for file in found}) < len(found):
            raise ConfigError(f"input={self.config.input}: two archives have the same name")
        return found

    def _inside(self, file: Input, place: str) -> list[Input]:
        """The tars in a tar that holds nothing else, by name: where each begins and ends in it."""
        nothing: Wants = lambda name, size: 0  # noqa: E731
        found = []
        try:
            with open(place, "rb") as outer:
                for member in tar_members(outer, self.config.max_members, nothing):
                    if not member.name.endswith(".tar") or member.error:
                        return []
                    stop = member.offset + member.size
                    name = path_text(member.name.rpartition("/")[2])
                    found.append(replace(file, path=name, start=member.offset, stop=stop, etag=_INSIDE + file.path))
        except SampleError as error:
            if found:
                raise ConfigError(f"{place}: {error}") from None
        return sorted(found, key=lambda inner: inner.path)

    def locate(self, file: Input) -> Place:
        if file.etag.startswith(_INSIDE):
            return Place(path=self.places[file.etag.removeprefix(_INSIDE)], span=(file.start, file.stop - file.start))
        place = self.places[file.path]
        return Place(url=place) if "://" in place else Place(path=place)

    def size_of(self, file: Input) -> int:
        return file.stop - file.start if file.etag.startswith(_INSIDE) else super().size_of(file)


def refuse_own(path: Path) -> None:
    """Raises ConfigError for a dataset directory: ledgers and plans lie among its samples."""
    if (path / "plan").is_dir():
        raise ConfigError(
            f"input={path}: this is a dataset directory: no source reads it, it can be the input= of the other stages"
        )


def _name(place: str) -> str:
    return re.sub(r"[?#].*", "", place).rpartition("/")[2] if "://" in place else place.rpartition("/")[2]


SOURCE = WebDataset
