"""Base class of sources that read files with many samples (archives, Parquet), one partition per file."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from io import BufferedReader
from pathlib import Path
from typing import IO, Any

import xxhash

from pipeline import stores
from pipeline.config.schema import ConfigError, public
from pipeline.partitions.plan import Input, Partition, file_state
from pipeline.partitions.stage import Context
from pipeline.samples import IMAGE_COLUMNS, Outcome, SampleError, Schema, make_key, path_text, real_path
from pipeline.sources import archive_samples, parquet_rows
from pipeline.sources.annotations import Annotations, archive_class, get_annotations
from pipeline.sources.archives.compression import unpacked
from pipeline.sources.base import Source
from pipeline.sources.http import Head, Policy, fetch
from pipeline.sources.mirror import Mirror
from pipeline.sources.partial import Partial
from pipeline.sources.recognition import explained
from pipeline.sources.text_files import is_pointer
from pipeline.sources.trees import StoreTree, Tree, get_tree, objects
from pipeline.stores import Object

_BLOCK = 1 << 20
_UNPACKED = 1 << 36  # maximum bytes to unpack when checking the hash of a file's content
_IDLE, _DEADLINE = 60.0, 86400.0


@dataclass(frozen=True, slots=True)
class Place:
    """Location of a file: a URL (with request headers) or a local path, and its known hashes."""

    url: str = ""
    path: str = ""
    sha256: str = ""
    md5: str = ""
    unpacked_md5: str = ""
    """MD5 of the unpacked content, checked if the hash of the file differs because it has been recompressed."""
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    span: tuple[int, int] | None = None
    """Start and size in bytes, if the file is a part of the file ``path``."""


class FileSource(Source):
    """A source whose partitions are files.

    With ``mirror=``, files at URLs are read from a folder and checked against the same hashes; files that are not in
    the folder are left out of the plan and counted.
    """

    _commits: Mapping[str, str] = {}
    """Commits of the Hub repositories when the plan was made."""

    reads: tuple[str, ...] = ("webdataset", "parquet")
    """Sources whose files :meth:`read` accepts; error messages do not explain the format of such files."""

    @property
    def rechecks(self) -> bool:  # type: ignore[override]
        return bool(self.mirror or self.config.input or any(map(stores.is_url, self.config.urls)))

    @cached_property
    def mirror(self) -> Mirror | None:
        """The folder that replaces the network: ``mirror=``, or ``input=`` if :attr:`input_is_mirror`."""
        if self.config.mirror:
            return Mirror(self.config.mirror)
        return Mirror(self.config.input, "input") if self.input_is_mirror else None

    @property
    def input_is_mirror(self) -> bool:
        """Whether ``input=`` is a folder that holds the publisher's files."""
        return False

    @abstractmethod
    def inputs(self) -> Iterator[Input]:
        """Yield the files in order, each with a unique name.

        Raises:
            ConfigError: a setting or the input is missing.
        """

    @abstractmethod
    def locate(self, file: Input) -> Place:
        """Return the location of a planned file."""

    def size_of(self, file: Input) -> int:
        """Size of a planned file in bytes; 0 if unknown."""
        return max(file.size, 0)

    def metadata(self) -> list[tuple[str, Place]]:
        """Names and locations of the files of ``metadata=``."""
        names = self._addresses("metadata", self.config.metadata)
        return [(name, Place(url=name) if "://" in name else Place(path=name)) for name in names]

    def watched(self) -> dict[str, str]:
        """States of the metadata files that are local or in a store; those at other URLs are fetched only once."""
        return self._states("metadata", self.metadata())

    def _states(self, setting: str, files: Iterable[tuple[str, Place]]) -> dict[str, str]:
        """States of local files and store objects; a state changes when its file changes."""
        places = [(name, self._mirrored(place, name)) for name, place in files]
        known = self._known(setting, [place.url for _, place in places])
        states = {name: known[place.url].etag for name, place in places if place.url in known}
        return states | {name: file_state(real_path(place.path)) for name, place in places if place.path}

    def _addresses(self, setting: str, given: Iterable[str]) -> list[str]:
        """Replace patterns in ``given`` with the addresses of the store objects that they match."""
        found: list[str] = []
        for one in given:
            if not stores.is_pattern(one):
                found.append(one)
                continue
            listed = objects(setting, [one])
            self._objects.update((o.path, o) for o in listed)
            found += [o.path for o in listed]
        return found

    def _known(self, setting: str, urls: Iterable[str]) -> dict[str, Object]:
        """Size and version of those ``urls`` that are objects in a store."""
        wanted = {url: stores.canonical(url) for url in urls if stores.is_url(url)}
        more = objects(setting, [address for address in wanted.values() if address not in self._objects])
        self._objects.update((o.path, o) for o in more)
        return {url: self._objects[address] for url, address in wanted.items()}

    @cached_property
    def tree(self) -> Tree:
        """The files that ``input=`` refers to."""
        tree = get_tree(self.config.input)
        if isinstance(tree, StoreTree):
            self._objects.update((tree.place(name), found) for name, found in tree.found.items())
        return tree

    @cached_property
    def _objects(self) -> dict[str, Object]:
        """Cached sizes and versions of store objects, by address."""
        return {}

    def changed(self, file: Input) -> bool:
        path = self._mirrored(self.locate(file), file.path).path
        return bool(path) and file.mtime_ns >= 0 and local_input(path, file.path).mtime_ns != file.mtime_ns

    def _mirrored(self, place: Place, name: str) -> Place:
        """``place``, or its location in the mirror if there is one.

        Raises:
            SampleError: ``not_in_mirror``.
        """
        if not self.mirror or not place.url:
            return place
        found = self.mirror.find(place.url)
        if found is None:
            raise SampleError("not_in_mirror", f"{name[:200]} is not below {self.mirror.root}", retryable=True)
        return replace(place, url="", path=path_text(str(found)), headers={})

    # ---- planning

    def schema(self) -> Schema:
        return {**IMAGE_COLUMNS, **self.annotations.columns}

    def extra(self) -> dict[str, Any]:
        self.annotations.prepare(self.home, self._metadata_files())
        if self.config.annotations == "archives":
            return {"classes": [archive_class(file.path) for file in self.inputs()], **self._found_commits()}
        return {**self.annotations.extra, **self._found_commits()}

    def _found_commits(self) -> dict[str, Any]:
        """Commits of the Hub repositories that hold files, so that all ranks read the same version."""
        places = [place for _, place in self.metadata()] + [self.locate(file) for file in self.inputs()]
        roots = {stores.Store(place.url).bucket for place in places if stores.is_hub(place.url)}
        return {"commits": {root: stores.Store(root).commit for root in sorted(roots)}} if roots else {}

    def plan(self) -> Iterator[Partition]:
        check_settings(self.config)
        self.left_out.clear()
        files = list(self._available())
        sizes = [self.size_of(file) for file in files]
        known = sum(sizes)
        largest = max(sizes, default=0)  # an archive stays on the disk until its samples are stored
        check_space(self.config, self.home, known + largest if known else None)
        for file in files:
            yield Partition((file,))

    def _available(self) -> Iterator[Input]:
        """Yield the available files with their size and modification time, or their version in a store.

        Raises:
            ConfigError: none of the files is in the mirror.
        """
        missing = 0
        there: list[tuple[Input, Place]] = []
        for file in self.inputs():
            try:
                there.append((file, self._mirrored(self.locate(file), file.path)))
            except SampleError as error:
                if not missing:
                    first = error.detail
                missing += 1
                self.left_out.add(error.reason, file.path)
        if missing and not there and self.mirror:
            raise ConfigError(f"{self.mirror.said}: none of the {missing} files is in it: {first}")
        in_stores = self._known(self._setting, [place.url for _, place in there])
        for file, place in there:
            if found := in_stores.get(place.url):
                yield replace(file, size=found.size, etag=found.etag)
                continue
            known = file.mtime_ns >= 0 or not place.path
            state = None if known else local_input(real_path(place.path), file.path)
            yield replace(file, size=state.size, mtime_ns=state.mtime_ns) if state else file

    @property
    def _setting(self) -> str:
        """The setting that names the files."""
        return f"input={self.config.input}" if self.config.input else "urls"

    @cached_property
    def annotations(self) -> Annotations:
        return get_annotations(self.config)

    def _metadata_files(self, scratch: Path | None = None) -> Iterator[tuple[str, IO[bytes]]]:
        for name, place in self.metadata():
            try:
                with self._fetched(name, place, scratch=scratch) as (file, _, _):
                    yield name, file
            except SampleError as error:
                raise ConfigError(f"metadata: {public(name)}: {error}") from None

    # ---- reading samples

    def samples(self, partition: Partition, context: Context) -> Iterator[Outcome]:
        (planned,) = partition.inputs
        self._commits = context.extra.get("commits", {})
        container = Outcome(make_key(planned.path), "failed", source=planned.path, container=True, complete=False)
        self.annotations.open(self.home, lambda: self._metadata_files(context.scratch), context.extra)
        try:
            place = self.locate(planned)
            with self._fetched(planned.path, place, planned, context.scratch) as (file, size, digest):
                container.source_bytes, container.source_hash = size, digest
                with explained(file, reads=self.reads):
                    outcomes = self.read(planned, file, context)
                for outcome in outcomes:
                    container.count += 1
                    yield outcome
            container.status, container.complete = "kept", True
        except SampleError as error:
            container.reason, container.detail, container.retryable = error.reason, error.detail, error.retryable
            container.source_bytes = container.source_bytes or int(getattr(error, "came", 0))
        yield container

    def read(self, planned: Input, file: IO[bytes], context: Context) -> Iterator[Outcome]:
        """Return the outcome of each sample in ``file``.

        Raises:
            SampleError: the whole file is unusable. Raised before the first outcome.
        """
        self.annotations.enter(planned.path, context.extra.get("classes", []))
        file.seek(0)
        start = file.read(64)
        file.seek(0)
        if is_pointer(start):
            raise SampleError("lfs_pointer", "a pointer of Git LFS: fetch the file itself with `git lfs pull`")
        if not start:
            raise SampleError("empty", "the file has no bytes", retryable=True)
        if start.startswith(b"PAR1"):
            return parquet_rows.outcomes(planned.path, file, self.config, self.annotations.columns)
        return archive_samples.outcomes(planned.path, file, self.config, self.annotations, self.check_stop, self.noted)

    @contextmanager
    def _fetched(
        self, name: str, place: Place, planned: Input | None = None, scratch: Path | None = None
    ) -> Iterator[tuple[IO[bytes], int, str]]:
        """Context manager: the file, its size and its XXH3-128, after checking it against the known hashes."""
        place = self._mirrored(place, name)
        if place.path:
            with self._opened(place, planned) as found:
                yield found
            return
        identity = public(place.url)
        sha256 = place.sha256
        if planned and planned.etag.startswith(stores.SHA256) and stores.is_hub(place.url):
            sha256 = planned.etag.removeprefix(stores.SHA256)
        partial = Partial(self.home / "partial", scratch, str(identity), sha256, place.md5, self._room_for)
        with partial:
            headers = {**place.headers}
            if planned and planned.etag and stores.is_url(place.url):
                headers["If-Match"] = planned.etag
            size = fetch(
                stores.pinned(place.url, self._commits), partial, policy(self.config, self.check_stop), headers
            )
            try:
                file, digest = partial.whole()
                yield file, size, digest
            except SampleError as error:
                error.came = size  # type: ignore[attr-defined]
                partial.done()
                raise
            partial.done()

    def _room_for(self, head: Head) -> None:
        """Raise ConfigError if an archive of the announced length does not fit on the disk."""
        stored = 0 if getattr(self.config, "fuse", False) else head.length
        require_space(self.config, self.home, head.length - head.offset + stored)

    @contextmanager
    def _opened(self, place: Place, planned: Input | None) -> Iterator[tuple[IO[bytes], int, str]]:
        """:meth:`_fetched` for a local file."""
        try:
            file = Path(real_path(place.path)).open("rb")  # noqa: SIM115 - closed below
        except OSError as error:
            raise SampleError("unreadable", error.strerror or "", retryable=True) from None
        with file:
            state = os.fstat(file.fileno())
            known = planned is not None and planned.mtime_ns >= 0
            if planned and known and (state.st_size, state.st_mtime_ns) != (planned.size, planned.mtime_ns):
                raise SampleError("changed_since_plan", "size or time of change differ from the plan")
            part = BufferedReader(_Part(file.fileno(), *(place.span or (0, state.st_size))), _BLOCK)
            digest = xxhash.xxh3_128()
            expected = {"sha256": place.sha256.lower(), "md5": place.md5.lower()}
            sums = {name: hashlib.new(name) for name, value in expected.items() if value}
            while block := part.read(_BLOCK):
                digest.update(block)
                for each in sums.values():
                    each.update(block)
                self.check_stop()
            for name, each in sums.items():
                if each.hexdigest() != expected[name] and not _unpacks_to(part, place.unpacked_md5):
                    raise SampleError("wrong_hash", f"{name} is {each.hexdigest()}", retryable=True)
            size = part.seek(0, io.SEEK_END)
            part.seek(0)
            yield part, size, digest.hexdigest()


def _unpacks_to(file: IO[bytes], md5: str) -> bool:
    """Whether ``md5`` is the MD5 of the unpacked content of ``file``."""
    found = hashlib.md5()
    if md5:
        stream = unpacked(file, _UNPACKED)
        while block := stream.read(_BLOCK):
            found.update(block)
    return bool(md5) and found.hexdigest() == md5


class _Part(io.RawIOBase):
    """A range of bytes of an open file, as a file."""

    def __init__(self, fd: int, start: int, size: int) -> None:
        self._fd, self._start, self._size, self._at = fd, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        left = max(0, min(len(buffer), self._size - self._at))
        count = os.preadv(self._fd, [memoryview(buffer)[:left]], self._start + self._at) if left else 0
        self._at += count
        return count


def local_input(path: str, name: str, number: int = 0) -> Input:
    """Return a local file as an input of a plan.

    Raises:
        ConfigError: there is no such file.
    """
    try:
        state = Path(path).stat()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    return Input(name, number, number + 1, size=state.st_size, mtime_ns=state.st_mtime_ns)


def policy(config: Any, step: Any) -> Policy:
    """Return the download policy for large files."""
    return Policy(
        timeout=config.timeout or _IDLE,
        deadline=config.deadline or _DEADLINE,
        retries=config.retries,
        max_bytes=config.max_archive_bytes,
        allow_private_hosts=config.allow_private_hosts,
        user_agent=user_agent(config.contact),
        step=step,
    )


def user_agent(contact: str) -> str:
    """Return the User-Agent header, with an address for complaints if there is one."""
    return f"latentmill (+{contact})" if contact else "latentmill"


def check_settings(config: Any) -> None:
    """Raise ConfigError if a limit is out of range."""
    for name in ("max_archive_bytes", "max_members", "max_member_bytes", "connections", "per_host"):
        if not getattr(config, name) > 0:
            raise ConfigError(f"{name}={getattr(config, name)}: must be more than 0")
    for name in ("timeout", "deadline", "retries", "per_second"):
        if getattr(config, name) < 0:
            raise ConfigError(f"{name}={getattr(config, name)}: must not be negative")
    if any(ord(char) < 32 or ord(char) > 126 for char in config.contact):
        raise ConfigError("contact: plain ASCII characters only")


def check_space(config: Any, home: Path, known: float | None) -> None:
    """Raise ConfigError if the planned download does not fit on the disk: ``known`` bytes, or, if None, the size in the
    dataset's YAML."""
    if not getattr(config, "fuse", False):
        require_space(config, home, config.expected_gb * 1e9 * config.fraction if known is None else known)


def require_space(config: Any, home: Path, expected: float) -> None:
    """Raise ConfigError if ``expected`` more bytes do not fit on the disk."""
    there = next(path for path in (home, *home.parents) if path.exists())
    free = shutil.disk_usage(there).free
    if config.check_space and expected > free:
        raise ConfigError(
            f"output {home}: about {expected / 1e9:,.1f} GB will be downloaded, but only {free / 1e9:,.1f} GB are "
            "free: choose another "
            "data_dir=, a subset=, or stage=filter with fuse=true, which stores the resized images alone "
            "(check_space=false tries anyway)"
        )
