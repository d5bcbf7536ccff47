"""One attempt at one partition, in its own folder, up to the rename that commits it."""

from __future__ import annotations

import errno
import os
import socket
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pipeline.config.schema import ConfigError
from pipeline.formats.base import Writer
from pipeline.imaging.buckets import Runs, buckets_in
from pipeline.partitions.dataset import RECORD, Dataset, SlotReader, before_redone
from pipeline.partitions.ledger import FILE as LEDGER
from pipeline.partitions.ledger import Ledger
from pipeline.partitions.plan import FORMAT_VERSION
from pipeline.registry import ExpectedError
from pipeline.samples import Outcome
from pipeline.storage import GONE, Folder, HashedFile, StorageError, commit, seal


class Superseded(ExpectedError):
    """The output was removed or moved aside while this process worked on it: its work no longer counts."""


class AttemptRemoved(RuntimeError):
    """The attempt's folder was removed, by ``gc`` or with the whole output: the partition must be tried again."""


def require_output(root: Folder) -> None:
    """Raises Superseded if the output was removed or moved."""
    if not (root.in_place() and root.exists("plan/plan.json")):
        raise Superseded(f"{root.path} was removed or overwritten while we ran")


@contextmanager
def unless_removed(root: Folder) -> Iterator[None]:
    """Context: errors from an output that no longer exists at its path become Superseded."""
    try:
        yield
    except (OSError, StorageError, ConfigError) as error:
        if root.in_place():
            raise
        raise Superseded(f"{root.path} was removed or overwritten while we ran") from error


def _name(file: dict[str, Any]) -> str:
    return str(file["name"])


class Attempt:
    """Context that writes the outcomes of partition ``index`` and commits them; without a commit, nothing remains."""

    def __init__(self, dataset: Dataset, index: int) -> None:
        self.index = index
        self.ledger = Ledger(index, dataset.partition(index).count)
        self.notes: dict[str, Any] = {}
        buckets = buckets_in(dataset.header["extra"])
        self._runs = Runs(buckets) if buckets else None
        self._dataset = dataset
        self._slot = dataset.slot(index)
        self._plan = dataset.counts_by(index)
        self._id = uuid.uuid4().hex
        self._name = f".{self._slot}.{self._id}"
        self._files: list[HashedFile] = []
        self._begin = time.time()
        self._folder: Folder | None = None
        self._won = False

    def __enter__(self) -> Attempt:
        try:
            self._bucket = self._dataset.root.folder(f"data/{self._dataset.bucket(self.index)}")
            self._bucket.mkdir(self._name)
            self._folder = self._bucket.folder(self._name)
        except OSError as error:
            raise self._explain(error) from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        for file in self._files:
            file.discard()
        if self._folder is not None:
            self._folder.close()
            if not self._won:
                with suppress(OSError):  # what cannot be deleted now is left to gc
                    self._bucket.trash(self._name)
        self._bucket.close()

    @property
    def scratch(self) -> Path:
        """Folder for temporary files of the stage, which are deleted with the attempt."""
        assert self._folder is not None
        return Path(f"/proc/self/fd/{self._folder.fd}")

    def _create(self, name: str) -> HashedFile:
        assert self._folder is not None
        file = self._folder.create(name)
        self._files.append(file)
        return file

    def run(
        self,
        outcomes: Iterable[Outcome],
        shard_bytes: int,
        step: Callable[[], None],
        adapted: Callable[[Writer], Writer] = lambda writer: writer,
    ) -> dict[str, Any] | None:
        """Write all ``outcomes``, check that they balance, and commit them.

        Args:
            shard_bytes: maximum bytes of a data file.
            step: called after each outcome; may raise.
            adapted: may wrap the format's writer.

        Returns:
            The record, or None if another attempt was committed first.

        Raises:
            LedgerError: the outcomes do not add up.
            AttemptRemoved: the attempt's folder is gone.
            StorageError: the disk is full or broken, or the input cannot be read.
        """

        def work() -> dict[str, Any]:
            return self._write(self._read(outcomes), adapted(self._writer(shard_bytes)), step)

        return self._committed(work)

    def without_data(self, ledger: bytes, counted: Mapping[str, Any]) -> dict[str, Any] | None:
        """Commit the partition with this ledger and without its data files; returns and raises as :meth:`run`.

        The record still lists the data files, so that the content digest covers them; ``counted`` replaces its counts.
        """

        def work() -> dict[str, Any]:
            before = SlotReader(before_redone(self._dataset, self.index), self.index).record
            with self._create(LEDGER) as file:
                file.write(ledger)
            data = [file for file in before["files"] if file["name"] != LEDGER]
            files = sorted([*self._described({}), *data], key=_name)
            released = [file["name"] for file in data]
            return self._recorded({**before, **counted, **self._who(), "files": files, "released": released})

        return self._committed(work)

    def _committed(self, work: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        try:
            record = work()
            self._won = commit(self._bucket, self._name, self._slot, RECORD)
        except OSError as error:
            raise self._explain(error) from error
        return record if self._won else None

    def _read(self, outcomes: Iterable[Outcome]) -> Iterator[Outcome]:
        """Distinguish an error of the input from one of the output."""
        try:
            yield from outcomes
        except OSError as error:
            if error.errno in GONE and not self._bucket.exists(self._name):
                raise  # the scratch folder was removed with the attempt
            raise StorageError(
                f"{self._dataset.root.path}: cannot read the input of partition {self.index}: {error}"
            ) from error

    def _writer(self, shard_bytes: int) -> Writer:
        dataset = self._dataset
        compression = dataset.header["config"].get("compression", "")
        return dataset.format.writer(self._create, self.index, dataset.schema, shard_bytes, compression)

    def _write(self, outcomes: Iterable[Outcome], writer: Writer, step: Callable[[], None]) -> dict[str, Any]:
        assert self._folder is not None
        for outcome in outcomes:
            row = outcome.row
            if self._runs is not None and row is not None:
                self._runs.add(outcome.height, outcome.width)
            self.ledger.add(outcome)
            if row is not None:
                writer.write(row)
            step()
        locations = writer.close()
        self.ledger.check(len(locations))
        with self._create(LEDGER) as file:
            self.ledger.write(file, locations)
        return self._recorded(self._record(locations))

    def _recorded(self, record: dict[str, Any]) -> dict[str, Any]:
        """Write the record, which is the last file of an attempt, and check that the folder contains nothing else."""
        assert self._folder is not None
        with self._folder.create(RECORD) as file:
            file.write(seal(record))
        listed = self._folder.listdir()
        if listed != sorted([*(file.name for file in self._files), RECORD]):
            if not self._bucket.exists(self._name):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self._name)
            raise StorageError(f"{self._folder.path} holds {listed}: something else writes there")
        return record

    def _record(self, locations: list[tuple[str, int, int]]) -> dict[str, Any]:
        samples = Counter(name for name, _, _ in locations)
        return {
            "format_version": FORMAT_VERSION,
            **self._who(),
            "partition": self.index,
            "files": sorted(self._described(samples), key=_name),
            "counts": dict(self.ledger.counts),
            "reasons": dict(self.ledger.reasons),
            "supersedes": self._dataset.partition(self.index).supersedes,
            "notes": self.notes,
            **({"buckets": self._runs.runs} if self._runs is not None else {}),
        }

    def _described(self, samples: Mapping[str, int]) -> list[dict[str, Any]]:
        return [
            {
                "name": file.name,
                "bytes": file.bytes,
                "samples": samples.get(file.name, 0),
                "xxh3": file.digest,
                "blocks": file.blocks,
            }
            for file in self._files
        ]

    def _who(self) -> dict[str, Any]:
        return {
            "attempt": self._id,
            "plan": self._plan.digest,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "begin": self._begin,
            "seconds": time.time() - self._begin,
        }

    def _explain(self, error: OSError) -> Exception:
        place = self._dataset.root.path
        if error.errno in GONE:
            return AttemptRemoved(f"{place}: the attempt at partition {self.index} was removed while it ran")
        return StorageError(
            f"{place}: cannot write partition {self.index}: {error.strerror}. Committed partitions are not affected; "
            "fix the cause and run the same command again"
        )
