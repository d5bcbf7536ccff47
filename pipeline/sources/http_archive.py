"""Archives and Parquet files at URLs or in a store, given as ``urls=[...]`` or as a list in the file ``input=``."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import IO
from urllib.parse import unquote, urlsplit

from pipeline import stores
from pipeline.config.schema import ConfigError, public
from pipeline.partitions.plan import Input
from pipeline.registry import sources
from pipeline.samples import SampleError
from pipeline.sources.files import FileSource, Place
from pipeline.sources.http import check
from pipeline.sources.ranges import expand
from pipeline.sources.recognition import explained, kind_of
from pipeline.sources.text_files import Lines, decoded, list_errors, open_text, skip


@sources.register("http_archive")
class HttpArchive(FileSource):
    """Images in tar (plain, gzip, bzip2, xz), zip and Parquet files; text files next to them are captions."""

    @property
    def input_is_mirror(self) -> bool:
        return bool(self.config.input) and not stores.is_url(self.config.input) and Path(self.config.input).is_dir()

    @cached_property
    def named(self) -> list[tuple[str, str]]:
        """Name and URL of each file: the name in the list, or otherwise the last component of the URL's path.

        Raises:
            ConfigError: there are no URLs, one of them is invalid, or ``sha256=`` does not fit them.
        """
        config = self.config
        if config.input and not self.input_is_mirror:
            listed = self._from_input(config.input)
        else:
            listed = [("", url) for url in self._addresses("urls", expand(config.urls))]
        if not listed:
            raise ConfigError("source=http_archive needs urls=[...], or input=<a file with a URL on each line>")
        if config.sha256 and len(config.sha256) != len(listed):
            raise ConfigError(f"sha256: {len(config.sha256)} hashes for {len(listed)} urls")
        for digest in config.sha256:
            if not re.fullmatch(r"([0-9a-fA-F]{64})?", digest):
                raise ConfigError(f"sha256: {digest} is not a SHA-256 (64 hexadecimal digits; empty: not known)")
        for _, url in listed:
            check_url(url)
        names = [name or unquote(urlsplit(url).path).rpartition("/")[2] or "archive" for name, url in listed]
        if len(set(names)) != len(names):
            names = [f"{number:04d}-{name}" for number, name in enumerate(names)]
        return [(name, url) for name, (_, url) in zip(names, listed, strict=True)]

    def _from_input(self, given: str) -> list[tuple[str, str]]:
        """Files named by the list ``given``; in a store, it can also be a pattern, a folder or an archive."""
        if not stores.is_url(given):
            with list_errors(f"input={given}"), Path(given).open("rb") as file:
                return _listed(file, f"input={given}")
        names = self.tree.ending(_ARCHIVES)
        if self.tree.is_folder and not names:
            raise ConfigError(f"{self.tree.said}: no {', '.join(_ARCHIVES)} files in it")
        if self.tree.is_folder or len(names) > 1 or names[0].lower().endswith(_ARCHIVES):
            return [("", self.tree.place(name)) for name in names]
        with list_errors(self.tree.said), io.BytesIO(self.tree.read(names[0])) as file:
            return _listed(file, self.tree.said)

    def inputs(self) -> Iterator[Input]:
        for number, (name, _) in enumerate(islice(self.named, share(len(self.named), self.config.fraction))):
            yield Input(name, number, number + 1)

    def locate(self, file: Input) -> Place:
        name, url = self.named[file.start] if file.start < len(self.named) else ("", "")
        if name != file.path:
            raise SampleError("not_listed", "the list of URLs has changed since the plan", retryable=True)
        return Place(url, sha256=self.config.sha256[file.start] if self.config.sha256 else "")


def share(count: int, fraction: float) -> int:
    """Number of files in a fraction of ``count`` files; at least 1.

    Raises:
        ConfigError: ``fraction`` is out of range.
    """
    if not 0 < fraction <= 1:
        raise ConfigError(f"fraction={fraction}: must be more than 0 and at most 1")
    return max(1, round(count * fraction))


def check_url(url: str) -> None:
    """Raise ConfigError if ``url`` is invalid or its scheme is not supported."""
    try:
        check(url)
    except SampleError as error:
        raise ConfigError(f"urls: {public(url)}: {error.detail}") from None


def _listed(file: IO[bytes], said: str) -> list[tuple[str, str]]:
    """Names and URLs in a text file: a line is a URL, or a name and a URL separated by blanks, a tab or a comma.

    A URL ends at a blank or at its closing quotation mark. Lines without a URL, such as headings, are ignored.

    Raises:
        ConfigError: the file is not text or contains no URL.
    """
    found = []
    kind = kind_of(file)
    if kind and not kind.text:
        raise ConfigError(f"{said}: expected a text with a URL on each line, but it is {kind}")
    file.seek(0)
    stream, mark = open_text(file)
    skip(stream, mark)
    lines = Lines(stream)
    while line := lines.take():
        if match := _LINE.match(decoded(line)):
            before = match[1].strip(" \t,;\"'")
            name = before.split("\t")[0] if "\t" in before else before.replace(",", " ", 1).partition(" ")[0]
            found.append((name.strip(" ,\"'"), match[3]))
    if not found:
        with explained(file, "it"):
            raise ConfigError(f"{said}: there is no URL in it; expected one on each line")
    return found


_ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".zip", ".parquet")
_LINE = re.compile(r"(.*?)(?P<quote>[\"'])?((?:https?|s3|gs|az)://(?(quote)(?:(?!(?P=quote))\S)+|\S+))")
