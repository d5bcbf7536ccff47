"""Archives by URL: each is one partition, brought in whole, checked, and read member by member without extracting."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO
from urllib.parse import unquote, urlsplit

import xxhash

from pipeline.config import ConfigError, public
from pipeline.partitions.plan import Input, Partition
from pipeline.samples import FORMATS, Outcome, SampleError, caption_fields, content_hash, make_key, path_text
from pipeline.sources.archives import Member, check, members
from pipeline.sources.base import Source
from pipeline.sources.http import Policy, Target, fetch

_LONGEST_NAME = 4096  # bytes of a member's name; what a path may have on Linux
_SHOWN = 200  # characters of a longer one
_CAPTION_BYTES = 1 << 16
_GROUP = 16  # most members that belong together


class HttpArchive(Source):
    """Images of tar (plain, gzip, bzip2, xz) and zip files, with the ``.txt`` beside an image as its caption."""

    def names(self) -> list[str]:
        """A name for each URL: the last part of its path, with a number where two would be the same.

        Raises:
            ConfigError: there are no URLs, one is none, or a setting makes no sense with them.
        """
        config = self.config
        if not config.urls:
            raise ConfigError("source=http_archive needs urls=[...]")
        if config.sha256 and len(config.sha256) != len(config.urls):
            raise ConfigError(f"sha256: {len(config.sha256)} hashes for {len(config.urls)} urls")
        for digest in config.sha256:
            if not re.fullmatch(r"([0-9a-fA-F]{64})?", digest):
                raise ConfigError(f"sha256: {digest} is no SHA-256 (64 hexadecimal digits; empty: not known)")
        for url in config.urls:
            try:
                Target.parse(url)
            except SampleError as error:
                raise ConfigError(f"urls: {public(url)}: {error.detail}") from None
        for name in ("timeout", "deadline", "max_archive_bytes", "max_members", "max_member_bytes"):
            if not getattr(config, name) > 0:
                raise ConfigError(f"{name}={getattr(config, name)}: must be more than 0")
        names = [unquote(urlsplit(url).path).rpartition("/")[2] or "archive" for url in config.urls]
        if len(set(names)) == len(names):
            return names
        return [f"{number:04d}-{name}" for number, name in enumerate(names)]

    def plan(self) -> Iterator[Partition]:
        for number, name in enumerate(self.names()):
            yield Partition((Input(name, number, number + 1),))

    def samples(self, partition: Partition) -> Iterator[Outcome]:
        (archive,) = partition.inputs
        container = Outcome(make_key(archive.path), "failed", source=archive.path, container=True, complete=False)
        try:
            with self._fetched(archive.start, container) as file:
                check(file, self.config.max_members, self.check_stop)
                for outcome in self._outcomes(archive.path, file):
                    container.count += 1
                    yield outcome
            container.status, container.complete = "kept", True
        except SampleError as error:
            container.reason, container.detail, container.retryable = error.reason, error.detail, error.retryable
        yield container

    @contextmanager
    def _fetched(self, number: int, container: Outcome) -> Iterator[IO[bytes]]:
        """The archive's bytes in a temporary file that is gone afterwards, checked against the expected hash."""
        config = self.config
        policy = Policy(
            timeout=config.timeout,
            deadline=config.deadline,
            retries=config.retries,
            max_bytes=config.max_archive_bytes,
            allow_private_hosts=config.allow_private_hosts,
            step=self.check_stop,
        )
        with tempfile.NamedTemporaryFile(dir=self.scratch) as file:
            spool = _Spool(file)
            fetched = fetch(config.urls[number], spool.begin, policy)
            file.flush()
            container.source_bytes, container.source_hash = fetched.bytes, spool.hash.hexdigest()
            expected = config.sha256[number].lower() if config.sha256 else ""
            if expected and fetched.sha256 != expected:
                raise SampleError("wrong_hash", f"sha256 is {fetched.sha256}", retryable=True)
            yield file

    def _outcomes(self, archive: str, file: IO[bytes]) -> Iterator[Outcome]:
        """Outcomes of the image members; a ``.txt`` of the same stem next to one is its caption."""
        most = self.config.max_member_bytes
        seen: Counter[int] = Counter()

        def wants(name: str, size: int) -> int | None:
            if _is_text(name):
                return min(size, _CAPTION_BYTES)
            return (size if size <= most else 0) if _format(name) else None

        for group in _groups(members(file, self.config.max_members, wants), most):
            caption = _caption(group)
            for member in group:
                if _format(member.name):
                    if member.size > most and not member.error:
                        member.error = SampleError("too_many_bytes", f"{member.size} bytes")
                    yield _outcome(archive, member, caption, seen)


class _Spool:
    """A file that hashes what is written to it."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.hash = xxhash.xxh3_128()

    def begin(self) -> _Spool:
        """Empty it, for another try."""
        self.file.seek(0)
        self.file.truncate()
        self.hash.reset()
        return self

    def write(self, data: bytes) -> None:
        self.hash.update(data)
        self.file.write(data)


def _groups(found: Iterator[Member], most_bytes: int) -> Iterator[list[Member]]:
    """Neighbours of the same stem, as WebDataset has them; a name that comes again begins another group."""
    group: list[Member] = []
    for member in found:
        together = group and _stem(member.name) == _stem(group[0].name)
        full = len(group) == _GROUP or sum(len(m.data) for m in group) + len(member.data) > most_bytes
        if group and (not together or full or any(member.name == m.name for m in group)):
            yield group
            group = []
        group.append(member)
    if group:
        yield group


def _caption(group: list[Member]) -> str:
    texts = [member.data for member in group if _is_text(member.name) and not member.error]
    return texts[0].decode("utf-8", "replace").strip() if texts else ""


def _outcome(archive: str, member: Member, caption: str, seen: Counter[int]) -> Outcome:
    """What becomes of an image; ``seen`` counts the keys of the archive by a hash of each."""
    key = make_key(f"{archive}/{member.name}")
    short = xxhash.xxh3_64_intdigest(key)
    seen[short] += 1
    if seen[short] > 1:
        key = f"{key}=={seen[short]}"  # a name that comes again in the archive; no path gives a key like this
    outcome = Outcome(key, "failed", source=archive, member=_shown(member.name), offset=member.offset)
    outcome.source_bytes = member.size
    if len(member.name.encode("utf-8", "surrogateescape")) > _LONGEST_NAME:
        outcome.reason, outcome.detail = "name_too_long", f"{len(member.name)} characters"
    elif member.error:
        outcome.reason, outcome.detail = member.error.reason, member.error.detail
    else:
        outcome.status, outcome.source_hash = "kept", content_hash(member.data)
        texts = caption_fields([caption] if caption else [])
        outcome.row = {"key": key, "jpg": member.data, "format": _format(member.name), **texts}
    return outcome


def _shown(name: str) -> str:
    """A member's name as text that any file can hold."""
    return path_text(name if len(name) <= _LONGEST_NAME else name[:_SHOWN] + "...")


def _base(name: str) -> str:
    """The last part of a name; none of the files that macOS adds to archives beside the real ones."""
    base = name.rpartition("/")[2]
    return "" if base.startswith("._") else base


def _stem(name: str) -> str:
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _is_text(name: str) -> bool:
    return _base(name).lower().endswith(".txt")


def _format(name: str) -> str:
    """The image format that a member's extension promises; empty if none."""
    _, dot, extension = _base(name).rpartition(".")
    return FORMATS.get(extension.lower(), "") if dot else ""


SOURCE = HttpArchive
