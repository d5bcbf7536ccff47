"""Archives and parquet files by URL, given as ``urls=[...]`` or as a list in the file ``input=``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path
from urllib.parse import unquote, urlsplit

from pipeline.config.schema import ConfigError, public
from pipeline.partitions.plan import Input
from pipeline.samples import SampleError
from pipeline.sources.files import FileSource, Place
from pipeline.sources.http import Target
from pipeline.sources.ranges import expand
from pipeline.sources.texts import Lines, decoded, list_errors, open_text, skip


class HttpArchive(FileSource):
    """Images of tar (plain, gzip, bzip2, xz), zip and parquet files, with the texts beside an image as its captions."""

    @property
    def input_is_mirror(self) -> bool:
        return bool(self.config.input) and Path(self.config.input).is_dir()

    @cached_property
    def named(self) -> list[tuple[str, str]]:
        """A name and the URL of each file: the name that a list gives, else the last part of the path.

        Raises:
            ConfigError: there are no URLs, one is none, or a setting makes no sense with them.
        """
        config = self.config
        listed = (
            _listed(Path(config.input))
            if config.input and not self.input_is_mirror
            else [("", url) for url in expand(config.urls)]
        )
        if not listed:
            raise ConfigError("source=http_archive needs urls=[...], or input=<a file with a URL on each line>")
        if config.sha256 and len(config.sha256) != len(listed):
            raise ConfigError(f"sha256: {len(config.sha256)} hashes for {len(listed)} urls")
        for digest in config.sha256:
            if not re.fullmatch(r"([0-9a-fA-F]{64})?", digest):
                raise ConfigError(f"sha256: {digest} is no SHA-256 (64 hexadecimal digits; empty: not known)")
        for _, url in listed:
            check_url(url)
        names = [name or unquote(urlsplit(url).path).rpartition("/")[2] or "archive" for name, url in listed]
        if len(set(names)) != len(names):
            names = [f"{number:04d}-{name}" for number, name in enumerate(names)]
        return [(name, url) for name, (_, url) in zip(names, listed, strict=True)]

    def inputs(self) -> Iterator[Input]:
        for number, (name, _) in enumerate(islice(self.named, share(len(self.named), self.config.fraction))):
            yield Input(name, number, number + 1)

    def locate(self, file: Input) -> Place:
        name, url = self.named[file.start] if file.start < len(self.named) else ("", "")
        if name != file.path:
            raise SampleError("not_listed", "the list of URLs has changed since the plan", retryable=True)
        return Place(url, sha256=self.config.sha256[file.start] if self.config.sha256 else "")


def share(count: int, fraction: float) -> int:
    """How many of ``count`` files a fraction is; at least one.

    Raises:
        ConfigError: it is no fraction.
    """
    if not 0 < fraction <= 1:
        raise ConfigError(f"fraction={fraction}: must be more than 0 and at most 1")
    return max(1, round(count * fraction))


def check_url(url: str) -> None:
    """Raises ConfigError for what is no URL that we would follow."""
    try:
        Target.parse(url)
    except SampleError as error:
        raise ConfigError(f"urls: {public(url)}: {error.detail}") from None


def _listed(path: Path) -> list[tuple[str, str]]:
    """Names and URLs of a text file: a line is a URL, or a name and a URL with blanks, a tab or a comma between them.

    A URL ends at a blank, or at the quotation mark that it began with. Lines without one, as headings, say nothing.
    """
    found = []
    with list_errors(f"input={path}"), path.open("rb") as file:
        stream, mark = open_text(file)
        skip(stream, mark)
        lines = Lines(stream)
        while line := lines.take():
            if match := _LINE.match(decoded(line)):
                before = match[1].strip(" \t,;\"'")
                name = before.split("\t")[0] if "\t" in before else before.replace(",", " ", 1).partition(" ")[0]
                found.append((name.strip(" ,\"'"), match[3]))
    return found


_LINE = re.compile(r"(.*?)(?P<quote>[\"'])?(https?://(?(quote)(?:(?!(?P=quote))\S)+|\S+))")


SOURCE = HttpArchive
