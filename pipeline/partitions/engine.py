"""The engine: makes or adopts a plan, processes partitions until all are committed, and finishes the dataset."""

from __future__ import annotations

import random
import time
import uuid
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import closing
from itertools import zip_longest
from typing import Any

from pipeline.config import cli
from pipeline.distributed import Rank
from pipeline.partitions.attempt import Attempt, AttemptRemoved, require_output, unless_removed
from pipeline.partitions.claims import Claims
from pipeline.partitions.compact import compact, uncompacted
from pipeline.partitions.dataset import Dataset
from pipeline.partitions.finalize import Incomplete, Overtaken, Unbalanced, common_failures, finalize
from pipeline.partitions.pace import Pace
from pipeline.partitions.plan import BUCKET, TAKEDOWN, Partition
from pipeline.partitions.planning import open_or_plan
from pipeline.partitions.stage import AnyStage, Context
from pipeline.partitions.takedown import released_ledger, rewritten, without_taken
from pipeline.samples import Outcome
from pipeline.storage import GONE, StorageError
from pipeline.telemetry.events import BEAT, Events
from pipeline.telemetry.host_stats import Hosts

_POLL = 0.01  # seconds between looks at what others have claimed; grows to a quarter of the lease
_LOOKUPS = 20  # failed lookups of a planned bucket before it is reported as missing
_HOSTS = 20  # hosts that a rank's events report
_LOOKS = 8  # buckets that an idle rank lists between two pauses, so that a thousand ranks do not flood the file system
_WATCHED = 8  # claims in a bucket that an idle rank checks; different ranks check different claims
_COST = 24  # file operations after which an idle rank pauses


def run(stage: AnyStage, planned: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Run the stage until its output is finished, together with all other ranks that work on it.

    Args:
        planned: called once the plan exists.

    Returns:
        The content of ``_SUCCESS``.

    Raises:
        ConfigError: settings, upstream and output do not match.
        StorageError: the output cannot be written.
        Superseded: the output was removed or moved aside.
        Stopped: a signal asked this process to stop.
    """
    try:
        dataset = open_or_plan(stage)
        planned()
        with unless_removed(dataset.root):
            if dataset.success is not None:
                if stage.rank.is_main:
                    stage.rank.log.info("%s: already finished, nothing to do", dataset.root.path)
                if stage.config.compact and stage.rank.is_main and (left := uncompacted(dataset)):
                    compact(dataset, left, stage.rank.check_stop)
                return dataset.success
            success = _run(stage, dataset)
            _compare_restored(stage, dataset, success)
            return success
    except OSError as error:
        raise StorageError(f"output {stage.output}: {error}") from error


def _compare_restored(stage: AnyStage, dataset: Dataset, success: dict[str, Any]) -> None:
    expected = dataset.plans[-1].header.get("mends")
    if expected and expected != success["generations"][len(dataset.plans) - 1]["content_digest"]:
        stage.rank.log.warning(
            "%s differs from the earlier output: its input or the software has changed since; outputs made from it "
            "are stale",
            dataset.root.path,
        )


def _run(stage: AnyStage, dataset: Dataset) -> dict[str, Any]:
    events = Events(dataset.root, stage.rank, min(BEAT, stage.config.lease / 6))
    with events.around(partitions=dataset.partitions, generation=dataset.plans[-1].generation):
        worker = Worker(stage, dataset, events)
        try:
            stage.rank.on_hang = worker.tell_hang
            worker.work()
            success = worker.finish()
            if stage.config.compact:
                worker.compact()
            return success
        finally:
            worker.close()


class Worker:
    """The work of one process on one dataset."""

    def __init__(self, stage: AnyStage, dataset: Dataset, events: Events) -> None:
        self.stage = stage
        self.dataset = dataset
        self.events = events
        self.config = stage.config
        self.rank = stage.rank
        self.claims = Claims(dataset.root, self.config.lease)
        self.hosts = Hosts()
        self._now(-1, 0)
        self._done: set[int] = set()
        self._full: set[int] = set()
        self._missing: set[int] = set()
        self._lookups: Counter[int] = Counter()
        self._cost = 0  # file operations since the last pause
        self._watches = uuid.uuid4().int

    def close(self) -> None:
        try:
            self.stage.close()
        finally:
            self.claims.close()

    # ---- choice of partitions

    def work(self) -> None:
        """Commit partitions until none is left: first this rank's own range, then any that are open."""
        for bucket in buckets(self.own_range()):
            self._work_on(bucket, self.own_range())
        order = list(range(-(-self.dataset.partitions // BUCKET)))
        start = random.Random(uuid.uuid4().int).randrange(len(order)) if order else 0
        order = order[start:] + order[:start]
        pause, pace = _POLL, Pace()
        while True:
            self._full |= self._known_full()
            order = [bucket for bucket in order if bucket not in self._full]
            if not order:
                return
            self._cost, looked, progress = 2, 0, False
            while looked < min(_LOOKS, len(order)) and self._cost < _COST:
                progress |= self._work_on(order[looked], self._span(order[looked]), helping=True)
                looked += 1
            idle = not progress and not self._full.issuperset(order[:looked])
            order = order[looked:] + order[:looked]
            pause = min(pause * 1.5, max(_POLL, self.config.lease / 4)) if idle else _POLL
            self._sleep(max(pause, pace.spend(self._cost)) if idle else 0)

    def own_range(self) -> range:
        """The contiguous range of partitions assigned to this rank."""
        total, rank, world = self.dataset.partitions, self.rank.rank, self.rank.world_size
        return range(total * rank // world, total * (rank + 1) // world)

    def _span(self, bucket: int) -> range:
        return range(bucket * BUCKET, min((bucket + 1) * BUCKET, self.dataset.partitions))

    def _known_full(self) -> set[int]:
        """Buckets that some rank has marked as fully committed. Only an optimization: finish() checks all records."""
        try:
            with self.dataset.root.folder("claims") as claims:
                names = claims.listdir()
        except OSError as error:
            if error.errno not in GONE:
                raise
            return set()
        mine = f".{self.dataset.plans[-1].generation}.full"
        return {int(name[: -len(mine)]) for name in names if name.endswith(mine)}

    def _work_on(self, bucket: int, span: range, helping: bool = False) -> bool:
        """Try every open partition of ``span`` in ``bucket``; when ``helping``, only some of those that others claimed.

        Returns whether this process committed anything.
        """
        self._cost += 2
        present = self._committed(bucket)
        if present is None:
            return False
        whole = self._span(bucket)
        progress = False
        mine = range(max(span.start, whole.start), min(span.stop, whole.stop))
        todo = [index for index in mine if self.dataset.slot(index) not in present and index not in self._done]
        if helping:
            todo = self._unclaimed_first(bucket, todo)
        for index, following in zip_longest(todo, todo[1:]):
            self.rank.check_stop()
            claim = f"{bucket:03d}/{self.dataset.slot(index)}"
            if self.claims.take(claim):
                try:
                    if self.dataset.root.exists(self.dataset.path_of(index)):
                        self._done.add(index)
                    else:
                        progress |= self._attempt(index, following)
                finally:
                    self.claims.release(claim)
            else:
                self._cost += 2
        if all(self.dataset.slot(index) in present or index in self._done for index in whole):
            self._full.add(bucket)
            self._mark_full(bucket)
        return progress

    def _unclaimed_first(self, bucket: int, todo: list[int]) -> list[int]:
        """The unclaimed partitions of ``todo``, then some of the claimed ones, which differ from rank to rank."""
        self._cost += 2
        try:
            with self.dataset.root.folder(f"claims/{bucket:03d}") as folder:
                claimed = set(folder.listdir())
        except OSError as error:
            if error.errno not in GONE:
                raise
            claimed = set()
        taken = [index for index in todo if self.dataset.slot(index) in claimed]
        start = self._watches % max(1, len(taken))
        free = [index for index in todo if self.dataset.slot(index) not in claimed]
        return free + (taken[start:] + taken[:start])[:_WATCHED]

    def _committed(self, bucket: int) -> set[str] | None:
        """Names of the committed slots in ``bucket``; None if the bucket is not visible at the moment.

        Raises:
            Superseded: the output was removed.
            StorageError: the bucket or the record of a slot is missing.
        """
        place = f"data/{bucket:03d}"
        try:
            with self.dataset.root.folder(place) as folder:
                present = set(folder.listdir())
        except OSError as error:
            if error.errno not in GONE:
                raise
            require_output(self.dataset.root)
            self._lookups[bucket] += 1  # network file systems may return stale lookups for a while
            if self._lookups[bucket] > _LOOKUPS:
                raise StorageError(f"{self.dataset.root.path / place} is missing, although it is in the plan") from None
            return None
        for index in [index for index in self._missing if index // BUCKET == bucket]:
            if self.dataset.slot(index) in present and self.dataset.record(index) is None:
                raise StorageError(
                    f"{self.dataset.root.path / self.dataset.path_of(index)} has no record: "
                    f"run stage=repair on {self.dataset.root.path}"
                )
            self._missing.discard(index)
        return present

    def _mark_full(self, bucket: int) -> None:
        name = f"claims/{bucket:03d}.{self.dataset.plans[-1].generation}.full"
        if not self.dataset.root.exists(name):
            self.dataset.root.append(name, b"")

    # ---- one partition

    def _attempt(self, index: int, following: int | None) -> bool:
        """Try to commit partition ``index``; ``following`` is probably next. Returns whether this attempt succeeded."""
        record = None
        self.rank.now["partition"] = index
        try:
            with Attempt(self.dataset, index) as attempt:
                record = self._work_in(attempt, following)
        except AttemptRemoved:
            require_output(self.dataset.root)  # if the output exists, gc removed the attempt: it is tried again
        self._now(-1, self.events.totals["in"])
        if record is not None:
            self._done.add(index)
            self._tell(record)
            return True
        if self.dataset.record(index) is not None:  # raises if the winning attempt belongs to another plan
            self._done.add(index)
        self.events.totals["lost"] += 1
        self.events.emit("lost", partition=index)
        return False

    def _work_in(self, attempt: Attempt, following: int | None) -> dict[str, Any] | None:
        if attempt.index in self.dataset.released:
            return attempt.without_data(*released_ledger(self.dataset, attempt.index))
        context = Context(self.dataset.header, attempt.scratch, attempt.notes, self._to_process(following))
        with closing(self._outcomes(self.dataset.partition(attempt.index), context)) as outcomes:
            return attempt.run(outcomes, self.stage.shard_bytes, self.rank.check_stop, self.stage.adapted)

    def _to_process(self, index: int | None) -> Partition | None:
        """Partition ``index`` if :meth:`Stage.process` will be called for it; otherwise None."""
        if index is None or index in self.dataset.released:
            return None
        return None if self.dataset.counts_by(index).header["kind"] == TAKEDOWN else self.dataset.partition(index)

    def _outcomes(self, partition: Partition, context: Context) -> Generator[Outcome, None, None]:
        dataset, index = self.dataset, partition.index
        if dataset.counts_by(index).header["kind"] == TAKEDOWN:
            yield from rewritten(dataset, index)
            return
        for outcome in self.stage.process(partition, context):
            if partition.only is None or (not outcome.container and partition.wants(outcome.key)):
                self.rank.now["done"] += not outcome.container
                self.hosts.add(outcome.member, outcome.status, outcome.reason)
                yield without_taken(dataset, index, outcome)

    def _tell(self, record: dict[str, Any]) -> None:
        totals = self.events.totals
        totals["partitions"] += 1
        totals["bytes"] += sum(f["bytes"] for f in record["files"])
        counts = Counter(record["counts"])
        totals.update({name: counts[name] for name in ("in", "kept", "dropped", "failed")})
        totals.update({f"reason:{name}": n for name, n in record["reasons"].items()})
        self.rank.now["done"] = totals["in"]
        self.events.emit(
            "commit",
            partition=record["partition"],
            attempt=record["attempt"],
            seconds=record["seconds"],
            **record["notes"],
        )
        self.rank.saved()
        limit = self.config.max_failed_fraction
        if totals["in"] >= 10_000 and totals["failed"] > limit * totals["in"]:
            raise Unbalanced(
                f"{self.dataset.root.path}: {totals['failed']} of {totals['in']} samples of this rank failed, more "
                f"than max_failed_fraction={limit:g} allows: {common_failures(self.dataset)}"
            )

    def _now(self, partition: int, done: int) -> None:
        """Set what every event reports from here on."""
        hosts = self.hosts.said(_HOSTS)
        self.rank.now = {"partition": partition, "done": done, **({"hosts": hosts} if hosts else {})}

    def tell_hang(self) -> None:
        self.events.emit("hang", seconds=self.config.hang_timeout)

    # ---- finishing

    def finish(self) -> dict[str, Any]:
        """Finish the dataset, or wait until another process has finished it."""
        pause = _POLL
        while True:
            self.rank.check_stop()
            require_output(self.dataset.root)
            current = Dataset(self.dataset.root)
            if current.success is not None:
                return current.success
            if self.claims.take("finalize"):
                try:
                    return finalize(current, self.config.max_failed_fraction)
                except Overtaken:
                    continue
                except Incomplete as gap:
                    self._reopen(current, gap.missing)
                finally:
                    self.claims.release("finalize")
                self.work()
            else:
                self._sleep(pause)
                pause = min(pause * 1.5, max(_POLL, self.config.lease / 4))

    def compact(self) -> None:
        """Pack the small files of the finished dataset, one bucket at a time, together with the other ranks."""
        dataset = Dataset(self.dataset.root)
        pause = _POLL
        while left := uncompacted(dataset):
            mine = [bucket for bucket in left if self.claims.take(f"compact.{bucket:03d}")]
            for bucket in mine:
                try:
                    compact(dataset, [bucket], self.rank.check_stop)
                finally:
                    self.claims.release(f"compact.{bucket:03d}")
            if not mine:
                self._sleep(pause)
                pause = min(pause * 1.5, max(_POLL, self.config.lease / 4))

    def _reopen(self, current: Dataset, missing: list[int]) -> None:
        """Continue with ``missing`` partitions that seemed committed: forget that they were done."""
        if len(current.plans) != len(self.dataset.plans):
            self.stage.forget_upstream()  # the new generation may need a newer state of it
        self.dataset = current
        self._done -= set(missing)
        self._missing = set(missing)
        for bucket in {index // BUCKET for index in missing}:
            self._full.discard(bucket)
            name = f"claims/{bucket:03d}.{current.plans[-1].generation}.full"
            current.root.unlink(name, missing_ok=True)

    # ---- waiting

    def _sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        with self.rank.waiting():
            while time.monotonic() < end:
                self.rank.check_stop()
                time.sleep(min(0.1, max(0.0, end - time.monotonic())))


def buckets(span: range) -> range:
    """The buckets that a range of partitions touches."""
    return range(span.start // BUCKET, -(-span.stop // BUCKET)) if len(span) else range(0)


def main(make: Callable[[Any, Rank], AnyStage], config: Any, rank: Rank) -> None:
    """The body of a stage's ``main``: log the settings, run the stage, log the result."""
    if rank.is_main:
        rank.log.info("%s\n%s", type(config).__name__, cli.dump(config))
    stage = make(config, rank)
    success = run(stage)
    if rank.is_main:
        counts = success["counts"]
        shown = ", ".join(f"{counts[name]} {name}" for name in ("in", "kept", "dropped", "failed"))
        reasons = f" {success['reasons']}" if success["reasons"] else ""
        rank.log.info("%s: finished: %s%s", stage.output, shown, reasons)
        for remark in stage.remarks(success):
            rank.log.warning("%s: %s", stage.output, remark)
