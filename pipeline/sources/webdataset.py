"""WebDataset tars, local, at URLs or in a store: ``urls=[part-{0000..0099}.tar]``, or a folder ``input=``."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from itertools import islice

from pipeline.config.schema import ConfigError
from pipeline.partitions.plan import Input, Partition
from pipeline.registry import sources
from pipeline.samples import SampleError, path_text
from pipeline.sources.archives.member import Wants
from pipeline.sources.archives.tar import tar_members
from pipeline.sources.clutter import in_clutter
from pipeline.sources.files import FileSource, Place, local_input
from pipeline.sources.http_archive import check_url, share
from pipeline.sources.ranges import expand
from pipeline.sources.trees import Tree

_INSIDE = "inside "


@sources.register("webdataset")
class WebDataset(FileSource):
    """Tar files in which consecutive members with the same stem form a sample: image, ``.txt``, ``.json``, ``.cls``.

    With ``annotations=archives``, each tar is a class, and a tar of tars is read like a folder of tars.
    """

    suffixes: tuple[str, ...] = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".zip")

    @cached_property
    def places(self) -> dict[str, str]:
        """URL or path of each file by name, in order.

        Raises:
            ConfigError: there are none, or two have the same name.
        """
        config = self.config
        if config.urls:
            found = self._addresses("urls", expand(config.urls))
            for url in found:
                if "://" in url:
                    check_url(url)
            relative = []
        elif config.input:
            relative = self._below(self.tree)
            found = [self.tree.place(name) for name in relative]
        else:
            raise ConfigError(f"source={config.source} needs urls=[...] or input=<a file, folder or pattern>")
        names = {path_text(_name(place)): place for place in found}
        if len(names) < len(found):
            names = {path_text(name): place for name, place in zip(relative, found, strict=False)}
            if not names:
                raise ConfigError("urls: two files have the same name")
        return names

    def _below(self, tree: Tree) -> list[str]:
        """Names of the data files, in order."""
        found = tree.ending(self.suffixes)
        if not found:
            raise ConfigError(f"{tree.said}: no {', '.join(self.suffixes)} files in it")
        return found

    def plan(self) -> Iterator[Partition]:
        yield from super().plan()
        self.left_out.add("other_file", *map(path_text, self._others()))

    def _others(self) -> list[str]:
        """Files in the folder ``input=`` that are not used, except clutter and the writers' own files."""
        if self.config.urls or not self.tree.is_folder:
            return []
        used = {
            *map(os.path.abspath, self.config.metadata),
            *map(self.tree.place, self._below(self.tree)),
            *self._used(),
        }
        names = (name for name in self.tree.ending(("",)) if not in_clutter(name))
        return [
            name
            for name in names
            if not name.rpartition("/")[2].startswith("_") and not {name, self.tree.place(name)} & used
        ]

    def _used(self) -> set[str]:
        """Names of other files in the folder that are used."""
        return set()

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
        """The tars in a tar that contains nothing else, sorted by name, with their positions in it."""
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
        place = self.places.get(file.path, "")
        if not place:
            raise SampleError("not_listed", "there is no such file any more", retryable=True)
        return Place(url=place) if "://" in place else Place(path=place)

    def size_of(self, file: Input) -> int:
        return file.stop - file.start if file.etag.startswith(_INSIDE) else super().size_of(file)


def refuse_own(tree: Tree) -> None:
    """Raise ConfigError for a dataset directory, which contains plans and ledgers in addition to samples."""
    if tree.is_folder and tree.has_folder("plan"):
        raise ConfigError(
            f"{tree.said}: this is a dataset directory: no source reads it, it can be the input= of the other stages"
        )


def _name(place: str) -> str:
    return re.sub(r"[?#].*", "", place).rpartition("/")[2] if "://" in place else place.rpartition("/")[2]
