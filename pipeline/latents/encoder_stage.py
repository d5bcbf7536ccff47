"""Common code of stages that encode images in batches, with decoding, encoding and writing overlapped.

Three threads work in parallel: one reads rows and has images decoded (by worker processes, if any), one encodes, and
the engine's own thread writes. The first two continue with the next partition while one is written and committed.
Batches never span partitions, and nothing depends on what a rank did before, so that results do not depend on which
rank processes which partition.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby, islice
from queue import SimpleQueue
from time import perf_counter
from typing import Any, TypeVar

import numpy.typing as npt

from pipeline.config.schema import CaptionConfig, EncodingConfig, ScoreConfig
from pipeline.imaging.worker_pool import WorkerLimits, available_cpus
from pipeline.latents.image_decoding import Decoded, Decoders, SlotLayout
from pipeline.loading.prefetch import Ahead
from pipeline.partitions.dataset import Stored
from pipeline.partitions.plan import Partition
from pipeline.partitions.stage import Context, Stage, follow_upstream
from pipeline.samples import Outcome, Row, SampleError, content_hash

AHEAD = 2  # batches being decoded, and encoded batches that may wait for the writer on a CPU
_IN_FLIGHT = AHEAD + 3  # plus batches that wait for the encoder or are being encoded


@dataclass(slots=True)
class Job:
    """A sample in progress.

    Attributes:
        sizes: height and width of each crop whose size differs between images.
    """

    outcome: Outcome
    row: Row
    image: Decoded | None = None
    sizes: tuple[tuple[int, int], ...] = ()

    @property
    def good(self) -> bool:
        """Whether the image was decoded."""
        return self.image is not None and not self.image.reason


@dataclass
class Work:
    """A batch of samples in progress.

    Attributes:
        region: index of the decoder memory that the batch occupies.
        more: additional data of the stage.
    """

    jobs: list[Job]
    region: int
    more: Any = None
    free: SimpleQueue[int] = field(default_factory=SimpleQueue)

    def copied(self) -> None:
        """Release the region for reuse."""
        self.free.put(self.region)


EncodingT = TypeVar("EncodingT", bound=EncodingConfig | CaptionConfig | ScoreConfig, covariant=True)


class EncodingStage(Stage[EncodingT]):
    """Reads, decodes, encodes and writes images; subclasses define what to encode, and how."""

    writes_to_stores = True
    _line: _Line | None = None
    planned_extra: Mapping[str, Any] = {}
    """The result of :meth:`extra` at planning; available while partitions are processed."""
    reads: tuple[str, ...] | None = None
    """Upstream columns to read in addition to ``jpg``; None: all."""

    @property
    @abstractmethod
    def slot(self) -> SlotLayout:
        """The crops taken of each image, or whatever else decoding leaves of it."""

    @property
    @abstractmethod
    def batch_size(self) -> int:
        """Number of images encoded at once."""

    @abstractmethod
    def encode(self, work: Work, slots: npt.NDArray[Any]) -> Any:
        """Encode a batch; runs in its own thread. The result is passed to :meth:`finish`.

        Must call ``work.copied`` as soon as ``slots`` may be overwritten.

        Args:
            slots: uint8 (n, bytes), laid out as :attr:`slot`; on a GPU, n is padded to :meth:`padded`.
        """

    @abstractmethod
    def finish(self, work: Work, encoded: Any) -> Iterator[Outcome]:
        """Yield the outcomes of the batch's jobs, in order; may wait for the device."""

    def prepare(self) -> None:
        """Load the models before threads start, as libraries cannot load them concurrently."""
        return

    def allow_tf32(self) -> None:
        """On a GPU, use TF32 for float32 matrix products, as convolutions do by default."""
        if self.on_gpu:
            import torch

            torch.set_float32_matmul_precision("high")

    def batches(self, rows: Iterator[Job], size: int) -> Iterator[tuple[list[Job], Any]]:
        """Split a partition's samples into batches of up to ``size``, each with a value for :attr:`Work.more`."""
        for batch in of_one_shape(rows, size):
            yield batch, None

    def begin(self) -> Any:
        """Called when a partition begins; the result is passed to :meth:`lap_done`."""
        return None

    def lap_done(self, lap: Lap, busy: float, images: int, notes: dict[str, Any]) -> None:
        """Called when a partition is complete; records its speed in ``notes``.

        Recorded are images per second and fractions of the elapsed time: ``idle``: the device had nothing to do;
        ``starved``: the encoder waited for images; ``writing``: rows were built, written and committed.

        Args:
            busy: seconds that the device was busy.
            images: number of images encoded.
        """
        notes["speed"] = {
            "images_per_second": round(images / lap.seconds, 3),
            "idle": round(max(0.0, 1 - busy / lap.seconds), 4),
            "starved": round(lap.starved / lap.seconds, 4),
            "writing": round(max(0.0, 1 - lap.waited / lap.seconds), 4),
            "batch_size": self.batch_size,
        }

    # ---- decoders

    @property
    def on_gpu(self) -> bool:
        return bool(self.rank.device.type == "cuda")

    @cached_property
    def decoders(self) -> Decoders:
        decoders = Decoders(
            self.decoding_processes(), _IN_FLIGHT * self.batch_size, self.slot, WorkerLimits.of(self.config)
        )
        if self.on_gpu:
            decoders.pin()
        return decoders

    def decoding_processes(self) -> int:
        """Number of decoder processes of this rank; by default, one CPU is left for the rank itself."""
        given = int(self.config.workers)
        if given >= 0:
            return given
        return max(1, available_cpus(self.rank.local_world_size) - 1) if self.on_gpu else 1

    # ---- work

    def plan(self, since: int = 0) -> Iterator[Partition]:
        return follow_upstream(self.upstream, since)

    def process(self, partition: Partition, context: Context) -> Iterator[Outcome]:
        self.planned_extra = context.extra
        line = self._line_for(partition, context.following)
        busy, images, whole = 0.0, 0, False
        self.begin()
        try:
            for work, encoded in line.batches():
                yield from self.finish(work, encoded)
                busy += getattr(encoded, "seconds", 0.0)
                images += sum(job.good for job in work.jobs)
            whole = True
        finally:
            if not whole:
                self.close()
        self.lap_done(line.lap(), busy, images, context.notes)

    def _line_for(self, partition: Partition, following: Partition | None) -> _Line:
        """The threads, with ``partition`` at the head of their queue and ``following`` behind it."""
        if self._line is not None and self._line.queued[:1] != [partition]:
            self._end_line()
        if self._line is None:
            self._line = self._begin_line()
        for wanted in (partition, following):
            if wanted is not None and wanted not in self._line.queued:
                self._line.add(wanted)
        return self._line

    def _begin_line(self) -> _Line:
        """Create what the threads share before they start."""
        if self.on_gpu:
            import torch

            torch.cuda.set_device(self.rank.device)
        self.prepare()
        self.decoders.drain()
        return _Line(self)

    def _end_line(self) -> None:
        if self._line is not None:
            line, self._line = self._line, None
            line.close()

    def close(self) -> None:
        self._end_line()
        decoders = self.__dict__.pop("decoders", None)
        if decoders is not None:
            decoders.close()

    @property
    def depth(self) -> int:
        """Number of encoded batches that may wait to be written."""
        return AHEAD

    def begin_thread(self) -> None:
        """Apply the settings of torch that are per thread."""
        threads = getattr(self.config, "threads", 0)
        if threads:
            import torch

            torch.set_num_threads(threads)
        if self.on_gpu:
            import torch

            torch.cuda.set_device(self.rank.device)

    def encoded(self, batches: Ahead[Work | None]) -> Iterator[tuple[Work, Any] | None]:
        """Yield each batch with its result, and None after each partition; runs in its own thread."""
        self.begin_thread()
        size, memory = self.batch_size, self.decoders.memory
        with closing(batches):
            starved = 0.0
            for work in batches:
                if self.on_gpu:
                    self.rank.waited += batches.waited - starved
                    starved = batches.waited
                if work is None:
                    yield None
                    continue
                start, count = work.region * size, len(work.jobs)
                slots = memory[start : start + (self.padded(count) if self.pads else count)]
                yield work, self.encode(work, slots)

    @property
    def pads(self) -> bool:
        """Whether all batches are padded to one shape, as kernels and graphs are chosen by shape."""
        return self.on_gpu or bool(getattr(self.config, "compile", False))

    def padded(self, count: int) -> int:
        """Number of images that a batch of ``count`` is padded to, if :attr:`pads`."""
        return self.batch_size

    def decoded(self, partitions: SimpleQueue[Partition | None]) -> Iterator[Work | None]:
        """Yield the partitions' samples in batches, and None after each partition; runs in its own thread."""
        self.begin_thread()
        free: SimpleQueue[int] = SimpleQueue()
        for region in range(_IN_FLIGHT):
            free.put(region)
        while partition := partitions.get():
            yield from self._decoded(partition, free)
            yield None

    def _decoded(self, partition: Partition, free: SimpleQueue[int]) -> Iterator[Work]:
        waiting: deque[Work] = deque()
        size = self.batch_size
        for jobs, more in self.batches(self.rows(partition), size):
            work = Work(jobs, free.get(), more, free)
            for place, job in enumerate(jobs):
                if "jpg" in job.row:
                    job.image = self.decoders.submit(job.row["jpg"], work.region * size + place, job.outcome.key)
            if self.pads:
                self.decoders.memory[work.region * size + len(jobs) : (work.region + 1) * size] = 0
            waiting.append(work)
            if len(waiting) >= AHEAD:
                yield self._ready(waiting.popleft())
        while waiting:
            yield self._ready(waiting.popleft())

    def rows(self, partition: Partition) -> Iterator[Job]:
        """The partition's samples in the order in which they are encoded and stored."""
        columns = None if self.reads is None else {"jpg", *self.reads}
        for stored in self.samples(partition.inputs[0].start):
            if partition.wants(stored.key):
                yield read(stored, columns)

    def samples(self, index: int) -> Iterator[Stored]:
        """The samples of partition ``index`` of the upstream, with their images."""
        return self.upstream.samples(index)

    def _ready(self, work: Work) -> Work:
        """Return ``work`` once all its images are decoded."""
        for job in work.jobs:
            image, outcome = job.image, job.outcome
            if image is None:
                continue
            self.decoders.wait(image)
            outcome.width, outcome.height = image.width, image.height
            outcome.reason, outcome.detail, outcome.retryable = image.reason, image.detail, image.retryable
        return work


@dataclass(frozen=True)
class Lap:
    """Seconds between the ends of two partitions, and how much of it was spent waiting.

    Attributes:
        starved: seconds that the encoder waited for images.
        waited: seconds that the writer waited for results.
    """

    seconds: float
    starved: float
    waited: float

    def __sub__(self, other: Lap) -> Lap:
        return Lap(self.seconds - other.seconds, self.starved - other.starved, self.waited - other.waited)


class _Line:
    """The threads that read, decode and encode: partitions go in, encoded batches come out in order.

    Attributes:
        queued: partitions that went in and are not yet complete.
    """

    def __init__(self, stage: EncodingStage[EncodingConfig | CaptionConfig | ScoreConfig]) -> None:
        self.queued: list[Partition] = []
        self._partitions: SimpleQueue[Partition | None] = SimpleQueue()
        self._decoded = Ahead(stage.decoded(self._partitions), 1)
        self._encoded = Ahead(stage.encoded(self._decoded), stage.depth)
        self._last = self._now()

    def add(self, partition: Partition) -> None:
        self.queued.append(partition)
        self._partitions.put(partition)

    def batches(self) -> Iterator[tuple[Work, Any]]:
        """The batches of the first queued partition."""
        for item in self._encoded:
            if item is None:
                self.queued.pop(0)
                return
            yield item

    def lap(self) -> Lap:
        now, before = self._now(), self._last
        self._last = now
        return now - before

    def _now(self) -> Lap:
        return Lap(perf_counter(), self._decoded.waited, self._encoded.waited)

    def close(self) -> None:
        """Discard queued work and wait for the threads to end."""
        self._partitions.put(None)
        self._encoded.close()


def of_one_shape(rows: Iterator[Job], size: int) -> Iterator[list[Job]]:
    """Split ``rows`` into batches of up to ``size`` in which all jobs have the same :attr:`Job.sizes`."""
    for _, group in groupby(rows, key=lambda job: job.sizes):
        while batch := list(islice(group, size)):
            yield batch


def read(stored: Stored, columns: Sequence[str] | set[str] | None) -> Job:
    """Read a stored sample, only these of its columns (None: all); if that fails, its row is empty and its outcome has
    the reason."""
    outcome = Outcome(stored.key, "failed", source=stored.source, offset=stored.offset)
    try:
        row = stored.read(columns)
    except SampleError as error:
        outcome.reason, outcome.detail, outcome.retryable = error.reason, error.detail, error.retryable
        return Job(outcome, {})
    if "jpg" in row:
        outcome.source_bytes, outcome.source_hash = len(row["jpg"]), content_hash(row["jpg"])
    return Job(outcome, row)
