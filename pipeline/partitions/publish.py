"""Copies a finished dataset directory to an object store, where it counts as finished only once it is complete.

Objects have the names of the local files. Data files, ledgers and records are sent first, in units of a few partitions;
each unit ends with a receipt below ``.publish/``, which shows the other ranks what is left. When all receipts exist,
plans, indexes and the manifest follow, and last ``_SUCCESS``, by a conditional write; until then the copy does not
count as finished. The name of a data file is never reused for different content, so that publishing an extended,
repaired or reduced dataset again adds objects and replaces only the small files at the top.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath

import xxhash

from pipeline.config.schema import ConfigError
from pipeline.partitions.claims import Claims
from pipeline.partitions.dataset import RECORD, SUCCESS, Dataset
from pipeline.partitions.ledger import FILE as LEDGER
from pipeline.partitions.plan import TAKEDOWN
from pipeline.storage import BLOCK, StorageError, digest, json_bytes
from pipeline.stores import PART, Object, Store

UNIT = 16  # partitions that share a receipt
RECEIPTS = ".publish"
TARGET = f"{RECEIPTS}/target.json"
_LOCAL = ("claims", "events", "data", "packed", "partial", "tables")
"""Folders of a dataset directory that are not copied as they are."""
_POLL = 0.2


@dataclass(frozen=True, slots=True)
class Item:
    """A file to publish; ``data`` is its content if that is already in memory."""

    path: str
    size: int
    hashed: str
    data: bytes | None = None

    @property
    def requests(self) -> int:
        """Requests needed to send it: one, or the parts plus the start and end of a multipart upload."""
        return 1 if self.size <= PART else -(-self.size // PART) + 2


class Contents:
    """The files of a finished dataset that are to be published.

    Args:
        place: destination, for messages.
        step: called often; may raise.

    Raises:
        Unfinished: the dataset is not complete.
        ConfigError: it refers to files outside of it, or its data were removed.
    """

    def __init__(self, dataset: Dataset, place: str, step: Callable[[], None]) -> None:
        self.dataset = dataset
        self.place = place
        self._step = step
        self.success = dataset.require_success()
        dataset.require_data()
        if dataset.header.get("origin") or dataset.header["format"] in ("reference", "pointer"):
            raise ConfigError(
                f"{dataset.root.path} refers to files that are stored elsewhere: publish the output of a later stage, "
                "or run stage=download with copy=true"
            )
        self._marker = dataset.root.read(SUCCESS)

    def partition_items(self, index: int) -> Iterator[Item]:
        """The files of a partition, the record last."""
        dataset, path = self.dataset, self.dataset.path_of(index)
        record = dataset.record(index)
        content = dataset.small_file(index, RECORD)
        if record is None or content is None:
            raise StorageError(f"{dataset.root.path / path} is missing: run stage=repair on {dataset.root.path}")
        for file in record["files"]:
            data = dataset.small_file(index, LEDGER) if file["name"] == LEDGER else None
            yield Item(f"{path}/{file['name']}", file["bytes"], file["xxh3"], data)
        yield Item(f"{path}/{RECORD}", len(content), digest(content), content)

    def top_items(self) -> Iterator[Item]:
        """Plans, manifest and indexes: all files outside partitions, except ``_SUCCESS``."""
        root = self.dataset.root
        expected = self.success["digests"]
        for name in root.listdir():
            if name.startswith(".") or name in _LOCAL or name == SUCCESS:
                continue
            path = root.path / name
            names = [name] if path.is_file() else [f"{name}/{inner}" for inner in sorted(os.listdir(path))]
            for each in names:
                data = root.read(each)
                if expected.get(each, digest(data)) != digest(data):
                    raise StorageError(f"{root.path / each} is damaged: run stage=repair on {root.path}")
                yield Item(each, len(data), digest(data), data)

    def items(self) -> Iterator[Item]:
        """All files of the dataset, ``_SUCCESS`` last."""
        for index in range(self.dataset.partitions):
            yield from self.partition_items(index)
        yield from self.top_items()
        yield self.success_item()

    def success_item(self) -> Item:
        return Item(SUCCESS, len(self._marker), digest(self._marker), self._marker)

    def _pieces(self, item: Item) -> Iterator[bytes]:
        """The bytes of a file in pieces, checked against the hash in its record.

        Raises:
            StorageError: the hash differs; raised before the last piece, so that nothing is stored.
        """
        root = self.dataset.root
        if item.data is not None:
            whole, size = digest(item.data), len(item.data)
            last = item.data
        else:
            hasher, size, last = xxhash.xxh3_128(), 0, b""
            with os.fdopen(root.open_file(item.path), "rb", buffering=0) as file:
                while block := file.read(BLOCK):
                    if last:
                        yield last
                    last = block
                    size += len(block)
                    hasher.update(block)
                    self._step()
            whole = hasher.hexdigest()
        if (whole, size) != (item.hashed, item.size):
            raise StorageError(
                f"{root.path / item.path} is damaged, and was not published: run stage=repair on {root.path}"
            )
        yield last


class Publication(Contents):
    """The publication of one dataset to one object store.

    Args:
        connections: number of files sent at the same time.
        step: called often; may raise.

    Attributes:
        sent: ``files`` and ``bytes`` that this process has sent.
        there: ``files`` and ``bytes`` that the store already had.

    Raises:
        Unfinished: the dataset is not complete.
        ConfigError: it refers to files outside of it, or its data were removed.
    """

    def __init__(
        self, dataset: Dataset, store: Store, connections: int = 8, step: Callable[[], None] = lambda: None
    ) -> None:
        super().__init__(dataset, store.url, step)
        self.store = store
        self.sent: Counter[str] = Counter()
        self.there: Counter[str] = Counter()
        self._connections = connections
        self._receipts = f"{RECEIPTS}/{digest(self._marker)}"  # a repair leaves the content digest as it was
        self._listed: dict[str, dict[str, Object]] = {}

    @property
    def units(self) -> range:
        return range(-(-self.dataset.partitions // UNIT))

    def estimate(self) -> Counter[str]:
        """``files``, ``bytes`` and ``requests`` still to be sent, and in ``there`` the files that the store has."""
        there = {found.path: found.size for found in self.store.objects()}
        counts: Counter[str] = Counter(requests=len(self.units) + 2, there=0)
        for item in self.items():
            if there.get(item.path) == item.size:
                counts.update(there=1, requests=1)
            else:
                counts.update(files=1, bytes=item.size, requests=item.requests)
        return counts

    # ---- sending

    def claim_target(self, overwrite: bool = False, is_main: bool = True) -> None:
        """Make sure that the destination is empty or contains an earlier state of this dataset.

        With ``overwrite``, the main rank deletes what marks the destination as occupied, and the others wait for it.

        Raises:
            ConfigError: the destination contains something else.
        """
        if overwrite and is_main:
            if self._occupied():
                self.store.delete([SUCCESS])
            self.store.delete([found.path for found in self.store.objects(RECEIPTS)])
            self.store.put(TARGET, self._target)
        while occupied := self._occupied():
            if not overwrite:
                raise ConfigError(
                    f"stage=publish to={self.store.url} holds {occupied}: choose another place, or replace it with "
                    "overwrite=true"
                )
            self._pause()

    @property
    def _target(self) -> bytes:
        return json_bytes({"plan": self.dataset.plans[0].digest, "stage": self.dataset.stage})

    def _occupied(self) -> str:
        """What the destination contains that prevents publication, for a message; empty if nothing."""
        found = next(iter(self.store.objects()), None)
        if found is not None and not any(o.path == TARGET for o in self.store.objects(RECEIPTS)):
            return f"something else ({found.path} ...)"
        if not self.store.put_new(TARGET, self._target):
            return "another dataset"
        published = self._published()
        theirs = json.loads(published[0])["plans"] if published else []
        if theirs != self.success["plans"][: len(theirs)]:
            return f"a later or another state of this dataset than {self.dataset.root.path}"
        return ""

    def _published(self) -> tuple[bytes, str] | None:
        """The published ``_SUCCESS`` and its version; None if there is none."""
        if not any(found.path == SUCCESS for found in self.store.children()[1]):
            return None
        return self.store.versioned(SUCCESS)

    def done(self) -> set[int]:
        """The units with a receipt."""
        found = self.store.objects(self._receipts)
        return {int(PurePosixPath(o.path).stem) for o in found}

    def send_unit(self, unit: int) -> None:
        """Send the missing files of a unit's partitions, then its receipt."""
        span = range(unit * UNIT, min((unit + 1) * UNIT, self.dataset.partitions))
        receipt: dict[str, list[object]] = {}
        self._list(span)
        with ThreadPoolExecutor(self._connections) as pool:
            for records in (False, True):  # a partition's record goes last
                items = [i for n in span for i in self.partition_items(n) if i.path.endswith(f"/{RECORD}") == records]
                for item, etag in zip(items, pool.map(self._send, items), strict=True):
                    receipt[item.path] = [item.size, etag]
                    self._step()
        self.store.put_new(self._receipt(unit), json_bytes(receipt))

    def _receipt(self, unit: int) -> str:
        return f"{self._receipts}/{unit:06d}.json"

    def _list(self, span: range) -> None:
        """List the published objects of these partitions' groups, once for each group."""
        groups = {f"data/{self.dataset.bucket(index)}" for index in span}
        self._listed = {
            group: self._listed.get(group) or {o.path: o for o in self.store.objects(group)} for group in groups
        }

    def _found(self, path: str) -> Object | None:
        group = path.rpartition("/")[0].rpartition("/")[0]
        return self._listed.get(group, {}).get(path)

    def _send(self, item: Item) -> str:
        """Send a file unless the store has it. Returns the object's version."""
        self._step()
        found = self._found(item.path)
        if found is not None and found.size == item.size:
            now, hashed = self.store.described(item.path)
            if (now.size, hashed) == (item.size, item.hashed):
                self.there.update(files=1, bytes=item.size)
                return now.etag
        etag = self.store.upload(item.path, lambda: self._pieces(item), item.size, item.hashed)
        self.sent.update(files=1, bytes=item.size)
        return etag

    def run(self, claims: Claims, rank: int, world_size: int) -> None:
        """Send everything, together with the other ranks. Returns once the dataset is published, by any of them.

        Raises:
            StoreError: the store refuses a request or fails.
            StorageError: a file is damaged.
        """
        name = f"publish.{digest(self.store.url.encode())[:8]}"
        done = self.done()
        start = len(self.units) * rank // max(1, world_size)
        order = [*self.units[start:], *self.units[:start]]
        while left := [unit for unit in order if unit not in done]:
            before = len(done)
            for unit in left:
                if claims.take(f"{name}.{unit}"):
                    try:
                        if not self.store.exists(self._receipt(unit)):  # a previous owner of the claim may have sent it
                            self.send_unit(unit)
                    finally:
                        claims.release(f"{name}.{unit}")
                    done.add(unit)
            if len(done) == before:
                self._pause()
            done |= self.done()
        while True:
            published = self._published()
            if published is not None and published[0] == self._marker:
                return
            if claims.take(f"{name}.final"):
                try:
                    self._finish(published)
                finally:
                    claims.release(f"{name}.final")
                return
            self._pause()

    def _finish(self, published: tuple[bytes, str] | None) -> None:
        for item in self.top_items():
            self._send(item)
        if published is None:
            won = self.store.put_new(SUCCESS, self._marker)
        else:
            won = self.store.replace(SUCCESS, self._marker, published[1])
        if not won:
            raise StorageError(
                f"{self.store.url}: another state of the dataset was published in the meantime: run the same command "
                "again"
            )

    def _pause(self) -> None:
        self._step()
        time.sleep(_POLL)

    # ---- outdated objects

    def unnamed(self, everything: bool) -> list[str]:
        """Objects that the dataset no longer contains: of partitions rewritten by a takedown, or ``everything``."""
        dataset = self.dataset
        taken = {i for plan in dataset.plans if plan.header["kind"] == TAKEDOWN for i in plan.redo}
        if everything:
            named = {item.path for item in self.items()} | {TARGET}
            found: Iterable[str] = (o.path for o in self.store.objects())
            return [p for p in found if p not in named and not p.startswith(f"{self._receipts}/")]
        old = []
        for index in sorted(taken):
            now = f"{dataset.path_of(index)}/"
            slot = f"{index:05d}"
            folders, _ = self.store.children(f"data/{dataset.bucket(index)}")
            for folder in folders:
                if folder.split(".")[0] == slot and f"data/{dataset.bucket(index)}/{folder}/" != now:
                    old += [o.path for o in self.store.objects(f"data/{dataset.bucket(index)}/{folder}")]
        return old
