"""Images from lists of URLs of any size, fetched with many concurrent requests and limits per host."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from urllib.parse import unquote, urlsplit

from multidict import MultiMapping

from pipeline import stores
from pipeline.config.options import shown
from pipeline.config.schema import ConfigError, public
from pipeline.imaging.headers import ImageError, sniff
from pipeline.partitions.plan import Input, Partition, file_state
from pipeline.partitions.stage import Context
from pipeline.registry import sources
from pipeline.samples import IMAGE_COLUMNS, Outcome, SampleError, Schema, make_key, path_text
from pipeline.samples.captions import repaired, shown_counts
from pipeline.sources.annotations import Entry
from pipeline.sources.archive_samples import settle
from pipeline.sources.archives.compression import unpacked
from pipeline.sources.base import Source
from pipeline.sources.clutter import in_clutter
from pipeline.sources.files import check_settings, check_space, local_input, policy, user_agent
from pipeline.sources.http import FetchError, Head, Policy, check, fetch
from pipeline.sources.http.crawler import Crawler
from pipeline.sources.http_archive import check_url, share
from pipeline.sources.lists import SUFFIXES, List, Span, is_list, open_list
from pipeline.sources.mirror import Mirror
from pipeline.sources.partial import Partial
from pipeline.sources.ranges import expand
from pipeline.sources.recognition import explained
from pipeline.sources.records import Columns, Record, columns_of, record
from pipeline.sources.trees import get_tree, objects

_LARGEST = 64 << 20  # maximum bytes of an image
_LONGEST_URL, _SHOWN = 4096, 200  # characters of a URL in the ledger, and of a URL longer than that
_IDLE, _DEADLINE = 10.0, 60.0
_VALUES = 1000  # of a column of splits that are counted
_HASHES = {32: "md5", 40: "sha1", 64: "sha256"}


@sources.register("url_list")
class UrlList(Source):
    """Reads txt, csv, tsv, json, jsonl or Parquet lists from the file or folder ``input=``, or from ``urls=``.

    Lists, and the images that they name, may be in an object store. Images from ``mirror=`` are inputs of the plan.
    """

    @property
    def rechecks(self) -> bool:  # type: ignore[override]
        return self.mirror is not None

    @property
    def retries_added(self) -> bool:  # type: ignore[override]
        return self.mirror is not None

    @cached_property
    def mirror(self) -> Mirror | None:
        """The folder that replaces the network, for both lists and images."""
        return Mirror(self.config.mirror) if self.config.mirror else None

    def watched(self) -> dict[str, str]:
        """States of the lists, since planning takes too long to be repeated."""
        if self.config.urls and not self.mirror and not any(map(stores.is_url, self.config.urls)):
            return {}
        return {path.name: self._versions.get(path) or file_state(path) for path in self.lists}

    # ---- planning

    def schema(self) -> Schema:
        return {**IMAGE_COLUMNS, "url": "str", "meta": "json"}

    def plan(self) -> Iterator[Partition]:
        config = self.config
        check_settings(config)
        if config.split_column and not config.split_values:
            raise ConfigError("split_column= needs split_values=[...]")
        check_space(config, self.home, None)
        self.left_out.clear()
        self.left_out.add("other_file", *self._other_files())
        names = [path.name for path in self.lists]
        if len(set(names)) < len(names):
            raise ConfigError(f"two lists are called {next(name for name in names if names.count(name) > 1)}")
        others: Counter[str] = Counter()
        planned_any = False
        for path in self.lists:
            planned = local_input(str(path), path.name)
            if path in self._versions:  # the modification time of a copy is meaningless
                planned = replace(planned, mtime_ns=-1)
            for partition in self._spans(path, planned, others):
                planned_any = True
                yield partition
        if others and not planned_any:
            raise ConfigError(
                f"split_values={shown(config.split_values)}: no row has one of these in the column "
                f"{config.split_column}, which has {shown_counts(others)}"
            )

    def _spans(self, path: Path, planned: Input, others: Counter[str]) -> Iterator[Partition]:
        """The partitions of a list; ``others`` counts values of the column of splits that are not wanted."""
        columns = self._columns_of(path)
        rows = open_list(path)
        if columns is None:
            self.left_out.add("empty_list", path.name)
            return
        spans = rows.spans(self.config.partition_size)
        if self.config.fraction < 1:
            every = list(spans)
            spans = iter(every[: share(len(every), self.config.fraction)])
        for span in spans:
            file = Input(path.name, span.start, span.stop, planned.size, planned.mtime_ns, self._etag(path, span))
            count, images = self._rows(rows, span, columns, others)
            if count:
                yield Partition((file, *images), count)

    def _etag(self, path: Path, span: Span) -> str:
        return f"{self._versions.get(path, '')} offset {span.offset}".lstrip()

    def _columns_of(self, path: Path) -> Columns | None:
        if path not in self._columns:
            with explained(path, reads=("url_list",)):
                self._columns[path] = columns_of(open_list(path, "a list of URLs"), self.config)
        return self._columns[path]

    @cached_property
    def _columns(self) -> dict[Path, Columns | None]:
        """Roles of the columns of each list."""
        return {}

    def _rows(self, rows: List, span: Span, columns: Columns, others: Counter[str]) -> tuple[int, list[Input]]:
        """Number of wanted rows in a span, and the images in the mirror that they refer to."""
        if not self.config.split_column and not self.mirror:
            return span.stop - span.start, []
        wanted = []
        for said in (record(row, columns, self.config) for row in rows.rows(span)):
            if self._wanted(said):
                wanted.append(said)
            else:
                others[said.split if said.split in others or len(others) < _VALUES else "..."] += 1
        if not self.mirror:
            return len(wanted), []
        images: dict[str, Input] = {}
        for said in wanted:
            with suppress(SampleError, OSError):  # reported later, in the ledger
                check(said.url)
                if found := self.mirror.find(said.url):
                    name, state = self._image_name(self.mirror, found), found.stat()
                    images[name] = Input(name, size=state.st_size, mtime_ns=state.st_mtime_ns)
        return len(wanted), list(images.values())

    @staticmethod
    def _image_name(mirror: Mirror, found: Path) -> str:
        return path_text(str(found.relative_to(mirror.root)))

    def _wanted(self, said: Record) -> bool:
        return not self.config.split_column or said.split in self.config.split_values or bool(said.error)

    @cached_property
    def lists(self) -> list[Path]:
        """The list files in order; those at URLs are fetched once and kept below the output."""
        config = self.config
        if config.urls:
            return list(self._fetched(expand(config.urls)))
        if stores.is_url(config.input):
            tree = get_tree(config.input)
            every = tree.ending(("",))
            names = [n for n in every if is_list(n) and not n.startswith((".", "_")) and "/" not in n]
            if tree.is_folder and not names:
                raise ConfigError(f"{tree.said}: no {', '.join(SUFFIXES)} files in it")
            return [self._copied(tree.place(n), tree.state(n), tree.said) for n in (names if tree.is_folder else every)]
        if not config.input:
            raise ConfigError("source=url_list needs input=<a list of URLs or a folder of lists>, or urls=[...]")
        path = Path(config.input).absolute()
        if path.is_dir():
            found = sorted(p for p in path.iterdir() if is_list(p.name) and not p.name.startswith((".", "_")))
            if not found:
                raise ConfigError(f"input={config.input}: no {', '.join(SUFFIXES)} files in it")
            return found
        if not path.is_file():
            raise ConfigError(f"input={config.input}: no such file or folder")
        return [path]

    def _other_files(self) -> list[str]:
        """Files in the folder of lists that are no lists."""
        folder = Path(self.config.input).absolute()
        if not self.config.input or stores.is_url(self.config.input) or self.config.urls or not folder.is_dir():
            return []
        return sorted(
            p.name for p in folder.iterdir() if p.is_file() and not is_list(p.name) and not in_clutter(p.name)
        )

    def _fetched(self, urls: list[str]) -> Iterator[Path]:
        for url in urls:
            if not stores.is_pattern(url):
                check_url(url)
            if self.mirror:
                found = self.mirror.find(url)
                if found is None:
                    raise ConfigError(f"{self.mirror.said}: {public(url)} is not in it")
                yield found
            elif stores.is_url(url):
                for one in objects("urls", [url]):
                    yield self._copied(one.path, one.etag, "urls")
            else:
                yield self._copied(url, "", "urls")

    @cached_property
    def _versions(self) -> dict[Path, str]:
        """Versions of copied store objects, by path of the copy."""
        return {}

    def _copied(self, url: str, version: str, setting: str) -> Path:
        """The copy below the output of a list (in a store: of its ``version``); fetched if it does not exist."""
        name = unquote(urlsplit(url).path).rpartition("/")[2] or "list.txt"
        said = f"{public(url)} {version}".rstrip()
        digest = hashlib.sha256(said.encode()).hexdigest()[:16]
        place = self.home / "tables" / f"list-{digest}" / name
        if version:
            self._versions[place] = version
        if place.exists():
            return place
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            with Partial(self.home / "partial", place.parent, str(public(url))) as partial:
                headers = {"If-Match": version} if version else {}
                fetch(url, partial, policy(self.config, self.check_stop), headers)
                file, _ = partial.whole()
                attempt = place.with_name(f".{name}.tmp")
                with attempt.open("wb") as copy:
                    while block := file.read(1 << 20):
                        copy.write(block)
                attempt.replace(place)
                partial.done()
        except SampleError as error:
            raise ConfigError(f"{setting}: {public(url)}: {error}") from None
        return place

    # ---- reading samples

    def samples(self, partition: Partition, context: Context) -> Iterator[Outcome]:
        planned, *images = partition.inputs
        jobs = list(self._jobs(planned, partition))
        for (outcome, said), result in zip(jobs, self._results(jobs, images, context.scratch), strict=True):
            yield self._outcome(outcome, said, result)

    def _jobs(self, planned: Input, partition: Partition) -> Iterator[tuple[Outcome, Record]]:
        path = next((path for path in self.lists if path.name == planned.path), None)
        if path is None:
            raise FileNotFoundError(2, "the list is gone", planned.path)
        state = path.stat()
        version, _, offset = planned.etag.rpartition("offset ")
        timed = not self.config.urls and planned.mtime_ns >= 0
        same = state.st_size == planned.size and version.rstrip() == self._versions.get(path, "")
        if not same or (timed and state.st_mtime_ns != planned.mtime_ns):
            raise ConfigError(
                f"{planned.path} has changed since it was planned: choose another output=, or overwrite=true"
            )
        rows = open_list(path).rows(Span(planned.start, planned.stop, int(offset)))
        columns = self._columns_of(path) or Columns()
        for number, row in enumerate(islice(rows, planned.stop - planned.start), planned.start):
            said = record(row, columns, self.config)
            key = make_key(f"{planned.path}/{number:09d}")
            if self._wanted(said) and partition.wants(key):
                shown = str(public(repaired(said.url)))
                shown = shown if len(shown) <= _LONGEST_URL else f"{shown[:_SHOWN]}..."
                yield Outcome(key, "failed", source=planned.path, member=shown, offset=number), said

    def _results(
        self, jobs: list[tuple[Outcome, Record]], images: list[Input], scratch: Path | None
    ) -> Iterator[bytes | SampleError]:
        if self.mirror:
            planned = {image.path: image for image in images}
            return (self._from_mirror(self.mirror, said.url, planned) for _, said in jobs)
        limit = min(self.config.max_member_bytes, _LARGEST)
        refused = self._refused
        sinks = [ImageSink(limit, refused) for _ in jobs]
        asked = [(said.url, sink) for (_, said), sink in zip(jobs, sinks, strict=True)]
        return self._crawler.fetch_all(asked, self.check_stop, scratch)

    def _from_mirror(self, mirror: Mirror, url: str, planned: dict[str, Input]) -> bytes | SampleError:
        self.check_stop()
        try:
            check(url)
        except SampleError as error:
            return error
        found = mirror.find(url)
        if found is None:
            return SampleError("not_in_mirror", "", retryable=True)
        try:
            state = found.stat()
            known = planned.get(self._image_name(mirror, found))
            if known and (state.st_size, state.st_mtime_ns) != (known.size, known.mtime_ns):
                return SampleError("changed_since_plan", "size or time of change differ from the plan")
            limit = min(self.config.max_member_bytes, _LARGEST)
            fits = state.st_size <= limit
            return found.read_bytes() if fits else SampleError("too_many_bytes", f"{state.st_size} bytes")
        except OSError as error:
            return SampleError("unreadable", error.strerror or "", retryable=True)

    @cached_property
    def _crawler(self) -> Crawler:
        config = self.config
        rules = Policy(
            timeout=config.timeout or _IDLE,
            deadline=config.deadline or _DEADLINE,
            retries=config.retries,
            max_bytes=min(config.max_member_bytes, _LARGEST),
            allow_private_hosts=config.allow_private_hosts,
            connections=config.connections,
            per_host=config.per_host,
            per_second=config.per_second,
            user_agent=user_agent(config.contact),
        )
        return Crawler(rules, robots_txt=config.robots_txt)

    @cached_property
    def _refused(self) -> frozenset[str]:
        return frozenset(directive.lower() for directive in self.config.opt_outs)

    def _outcome(self, outcome: Outcome, said: Record, result: bytes | SampleError) -> Outcome:
        if said.error:
            outcome.reason, outcome.detail = "bad_row", said.error
            return outcome
        if isinstance(result, SampleError):
            outcome.status = "dropped" if result.reason in ("opted_out", "robots_txt") else "failed"
            outcome.reason, outcome.detail, outcome.retryable = result.reason, result.detail, result.retryable
            return outcome
        outcome.source_bytes = len(result)
        if said.hash and not _matches(result, said.hash):
            outcome.reason, outcome.detail = "wrong_hash", f"of {len(result)} bytes"
            return outcome
        try:
            if not result:
                raise ImageError("empty")
            settle(outcome, result, sniff(result), Entry(said.captions, said.meta), self.schema())
        except (ImageError, SampleError) as error:
            outcome.reason, outcome.detail = error.reason, error.detail
            return outcome
        if outcome.row is not None:
            outcome.row["url"] = outcome.member
        return outcome


def _matches(data: bytes, expected: str) -> bool:
    name = _HASHES.get(len(expected))
    return bool(name) and hashlib.new(str(name), data).hexdigest() == expected


class ImageSink:
    """Holds a small file in memory; rejects it if a header opts out of its use."""

    def __init__(self, limit: int, refused: frozenset[str]) -> None:
        self._limit = limit
        self._refused = refused
        self._parts: list[bytes] = []
        self._encoding = ""

    def have(self) -> tuple[int, str]:
        return 0, ""

    def begin(self, head: Head) -> None:
        self._parts = []
        self._encoding = head.headers.get("Content-Encoding", "").lower()
        if directive := opt_out(head.headers, self._refused):
            raise FetchError("opted_out", directive)

    def write(self, data: bytes) -> None:
        self._parts.append(data)

    def data(self) -> bytes:
        """The file, decompressed if the server has compressed it without being asked.

        Raises:
            SampleError: it unpacks to more than the limit or is damaged.
        """
        data = b"".join(self._parts)
        self._parts = []
        if self._encoding in ("gzip", "x-gzip"):
            try:
                data = unpacked(io.BytesIO(data), self._limit).read()
            except SampleError as error:
                reason = "too_many_bytes" if error.reason == "archive_bomb" else "damaged"
                raise SampleError(reason, "packed by gzip") from None
        return data


def opt_out(headers: MultiMapping[str], refused: frozenset[str], agent: str = "latentmill") -> str:
    """The first directive of X-Robots-Tag in ``refused`` that applies to ``agent`` or to all; empty if none does."""
    values = (
        headers.getall("X-Robots-Tag", []) if isinstance(headers, MultiMapping) else [headers.get("X-Robots-Tag", "")]
    )
    for value in values:
        concerned = True
        for part in value.lower().split(","):
            name, colon, rest = part.partition(":")
            if colon:
                concerned = name.strip() in (agent, "*")
            directive = (rest if colon else name).strip()
            if concerned and directive in refused:
                return str(directive)
    return ""
