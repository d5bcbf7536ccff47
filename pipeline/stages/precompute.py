"""stage=precompute: image latents at each resolution and text-encoder states, stored as MDS.

Three threads work at once: one reads rows and has pictures decoded, one encodes, and the engine's own writes. The first
two go on with the partition that follows while one is written and committed. Batches never reach over partitions, and
nothing depends on what a rank did before: so results do not depend on who does which partition.
"""

from __future__ import annotations

import math
import os
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from queue import SimpleQueue
from time import perf_counter
from typing import TYPE_CHECKING, Any

from pipeline.cli import config_for
from pipeline.config import ConfigError, PrecomputeConfig
from pipeline.distributed import Rank, distributed
from pipeline.encoders.base import (
    Autoencoder,
    ImageEncoder,
    TextEncoder,
    autoencoder,
    image_encoder,
    posterior_noise,
    text_encoder,
)
from pipeline.latents.ahead import Ahead
from pipeline.latents.decoding import Decoded, Decoders
from pipeline.partitions.dataset import Stored
from pipeline.partitions.plan import Partition
from pipeline.partitions.stage import Stage, follow_upstream
from pipeline.samples import Outcome, Row, SampleError, Schema, content_hash
from pipeline.stages import release

if TYPE_CHECKING:
    from pipeline.latents.encoding import Batch, Encoded, Encoding

_WINDOW = 512
"""Rows that are read ahead, so that captions of like length can be encoded together."""
_REMEMBERED = 2048
"""Captions of a partition whose states are kept for the next sample that has the same."""
_AHEAD = 2  # batches that are being decoded
_IN_FLIGHT = _AHEAD + 3  # and those that wait for the encoder, or are there
_BUFFER = 2**28  # bytes of results of a GPU that may wait for a disk that writes in bursts
_ASPECT = 4  # a slot holds pictures of up to this ratio of edges; larger ones take another way


@dataclass
class Job:
    """A sample on its way."""

    outcome: Outcome
    row: Row
    picture: Decoded | None = None


@dataclass
class Work:
    """A batch of samples on its way.

    Attributes:
        region: which of the decoders' slots it has.
        captions: to be encoded with it, and ``forget``: not to be kept any longer after it.
        good: those of its jobs that have pixels.
    """

    jobs: list[Job]
    region: int
    captions: list[str]
    forget: list[str]
    batch: Batch | None = None
    good: list[Job] = field(default_factory=list)


class Precompute(Stage):
    name = "precompute"
    version = 2
    _line: _Line | None = None

    @property
    def format(self) -> str:
        return "mds"

    def schema(self) -> Schema:
        self.upstream.require_columns("key", "jpg", "caption")
        schema: Schema = {"key": "str", "caption": "str", "min_side": "int"}
        schema |= dict.fromkeys([*self.texts, *(f"latents_{r}" for r in self.config.image_resolutions)], "bytes")
        schema |= {"caption_back": "int"} if self.dedup else {}
        schema |= {"image_embedding": "bytes"} if self.config.image_encoder else {}
        return schema | ({"jpg": "jpeg"} if self.config.save_images else {})

    def extra(self) -> dict[str, Any]:
        """Shapes, dtype and encoders: what a reader needs to make tensors of the bytes and to decode them."""
        shapes: dict[str, list[int]] = {name: [text.length, text.width] for name, text in self.texts.items()}
        for resolution in self.config.image_resolutions:
            channels, *edges = self._shape(resolution)
            shapes[f"latents_{resolution}"] = [channels * (2 if self.config.latent == "moments" else 1), *edges]
        encoders = {name: text.describe() for name, text in self.texts.items()}
        extra = {
            "dtype": self.config.save_dtype,
            "latent": self.config.latent,
            "vae": self.vae.describe(),
            "text_encoder": encoders["caption_latents"],
            "text_encoders": encoders,
            "text_storage": self._describe_storage(),
        }
        if self.embedder is not None:
            shapes["image_embedding"] = [self.embedder.width]
            extra["image_encoder"] = self.embedder.describe()
        return {"shapes": shapes, **extra}

    def _describe_storage(self) -> dict[str, Any]:
        """How text states are stored, and what that costs: measured on the first captions."""
        from pipeline.latents import text_storage

        storage, dtype = self.config.text_storage, self.config.save_dtype
        said: dict[str, Any] = {"kind": storage}
        for name, text in self.texts.items():
            said[name] = {"bytes": text_storage.size_of((text.length, text.width), storage, dtype)}
            if text_storage.kind_of(storage) != "dense":
                states = text.encode(self._first_captions)
                said[name]["cosine_error"] = text_storage.cosine_error(states, storage, dtype)
        return said

    @cached_property
    def _first_captions(self) -> list[str]:
        """Up to 32 different ones."""
        captions: dict[str, None] = {}
        for stored in islice(self.upstream.samples(0), 256):
            try:
                captions[stored.read()["caption"]] = None
            except SampleError:
                continue
            if len(captions) == 32:
                break
        return list(captions) or [""]

    # ---- encoders

    @cached_property
    def vae(self) -> Autoencoder:
        return autoencoder(self.config.vae, self.rank.device, self._dtype)

    @cached_property
    def texts(self) -> dict[str, TextEncoder]:
        """By column."""
        specs = self.config.text_encoder
        if not specs:
            raise ConfigError("text_encoder=[]: name at least one")
        return {
            f"caption_latents{f'_{number}' if number > 1 else ''}": text_encoder(spec, self.rank.device, self._dtype)
            for number, spec in enumerate(specs, 1)
        }

    @cached_property
    def embedder(self) -> ImageEncoder | None:
        name = self.config.image_encoder
        return image_encoder(name, self.rank.device, self._dtype) if name else None

    @property
    def _dtype(self) -> str:
        return "float32" if self.rank.device.type == "cpu" else str(self.config.model_dtype)

    def _shape(self, resolution: int) -> tuple[int, int, int]:
        if resolution < 1 or resolution % self.vae.downsample:
            raise ConfigError(f"image_resolutions={resolution}: must be a multiple of {self.vae.downsample}")
        edge = resolution // self.vae.downsample
        return (self.vae.channels, edge, edge)

    @property
    def dedup(self) -> bool:
        return str(self.config.text_storage).endswith("dedup")

    @cached_property
    def encoding(self) -> Encoding:
        from pipeline.latents.encoding import Encoding

        config = self.config
        if config.compile:
            self.vae.compile()
            for text in self.texts.values():
                text.compile()
        return Encoding(
            self.rank.device,
            self.vae,
            self.texts,
            self.embedder,
            config.image_resolutions,
            config.latent == "moments",
            config.text_storage,
            config.save_dtype,
        )

    @cached_property
    def batch_size(self) -> int:
        given = self.config.batch_size
        return self.encoding.find_batch_size() if given == "auto" else int(given)

    # ---- decoders

    @cached_property
    def decoders(self) -> Decoders:
        workers = self._workers()
        largest = max([*self.config.image_resolutions, self.embedder.resolution if self.embedder else 0])
        slot_bytes = 3 * _ASPECT * largest**2 if workers else 0
        decoders = Decoders(workers, _IN_FLIGHT * self.batch_size, slot_bytes, largest)
        if workers and self.rank.device.type == "cuda":
            import torch

            torch.cuda.check_error(
                torch.cuda.cudart().cudaHostRegister(decoders.memory.ctypes.data, decoders.memory.nbytes, 0)
            )
        return decoders

    def _workers(self) -> int:
        given = self.config.workers
        if given >= 0:
            return int(given)
        if self.rank.device.type == "cpu":
            return 0
        return max(1, len(os.sched_getaffinity(0)) // self.rank.local_world_size - 1)

    # ---- work

    def plan(self, since: int = 0) -> Iterator[Partition]:
        if not self.config.image_resolutions:
            raise ConfigError("image_resolutions=[]: name at least one")
        if self.config.batch_size != "auto":
            self.batch_size  # noqa: B018 - wrong settings are found before the work
        return follow_upstream(self.upstream, since)

    def process(self, partition: Partition) -> Iterator[Outcome]:
        line = self._line_for(partition)
        memory = _Memory(self)
        busy = 0.0
        whole = False
        try:
            for work, result in line.batches():
                result.wait()
                busy += result.seconds
                yield from memory.outcomes(work, result)
            whole = True
        finally:
            if not whole:
                self.close()
        self._tell(line.lap(), busy, memory.pictures)

    def _line_for(self, partition: Partition) -> _Line:
        """The threads, with ``partition`` as their next, and at work on the one that follows it afterwards."""
        if self._line is not None and self._line.queued[:1] != [partition]:
            self.close()
        if self._line is None:
            self.encoding  # noqa: B018 - libraries cannot load models in several threads at once
            self._line = _Line(self)
        for wanted in (partition, self.following):
            if wanted is not None and wanted not in self._line.queued:
                self._line.add(wanted)
        return self._line

    def close(self) -> None:
        if self._line is not None:
            line, self._line = self._line, None
            line.close()

    @cached_property
    def depth(self) -> int:
        """Encoded batches that may wait for being written."""
        if self.rank.device.type == "cpu":
            return _AHEAD
        shapes = self.extra()["shapes"].values()
        size = self.batch_size * sum(math.prod(shape) for shape in shapes) * 4
        return int(min(64, max(_AHEAD, _BUFFER // size)))

    def encoded(self, batches: Ahead[Work | None]) -> Iterator[tuple[Work, Encoded] | None]:
        """In a thread of its own: what it calls must not depend on the main thread's settings of torch."""
        import torch

        torch.set_num_threads(self.config.threads)
        if self.rank.device.type == "cuda":
            torch.cuda.set_device(self.rank.device)
        with closing(batches):
            starved = 0.0
            for work in batches:
                if self.rank.device.type == "cuda":
                    self.rank.waited += batches.waited - starved
                    starved = batches.waited
                if work is None:
                    yield None
                else:
                    assert work.batch is not None
                    yield work, self.encoding.encode(work.batch)

    def decoded(self, partitions: SimpleQueue[Partition | None]) -> Iterator[Work | None]:
        """The partitions' samples in batches, None after each partition; in a thread of its own."""
        self.decoders.drain()
        free: SimpleQueue[int] = SimpleQueue()
        for region in range(_IN_FLIGHT):
            free.put(region)
        while partition := partitions.get():
            yield from self._batches(partition, free)
            yield None

    def _batches(self, partition: Partition, free: SimpleQueue[int]) -> Iterator[Work]:
        rows = self._rows(partition)
        known: OrderedDict[str, None] = OrderedDict()
        waiting: deque[Work] = deque()
        size = self.batch_size
        while window := list(islice(rows, size * max(1, _WINDOW // size))):
            captions, forget = _news(known, [job.row["caption"] for job in window if job.row])
            for start in range(0, len(window), size):
                first, last = start == 0, start + size >= len(window)
                jobs = window[start : start + size]
                work = Work(jobs, free.get(), captions if first else [], forget if last else [])
                for place, job in enumerate(jobs):
                    if job.row:
                        job.picture = self.decoders.submit(job.row["jpg"], work.region * size + place)
                waiting.append(work)
                if len(waiting) >= _AHEAD:
                    yield self._ready(waiting.popleft(), free)
        while waiting:
            yield self._ready(waiting.popleft(), free)

    def _rows(self, partition: Partition) -> Iterator[Job]:
        for stored in self.upstream.samples(partition.inputs[0].start):
            if partition.wants(stored.key):
                yield _read(stored)

    def _ready(self, work: Work, free: SimpleQueue[int]) -> Work:
        """``work`` with its batch, once all of its pictures are decoded."""
        from pipeline.latents.encoding import Batch

        for job in work.jobs:
            if job.picture is None:
                continue
            self.decoders.wait(job.picture)
            job.outcome.width, job.outcome.height = job.picture.width, job.picture.height
            if job.picture.pixels is None:
                job.outcome.reason, job.outcome.detail = job.picture.reason, job.picture.detail
                job.outcome.retryable = job.picture.retryable
            else:
                work.good.append(job)
        work.batch = Batch(
            [self._place(job.picture) for job in work.good if job.picture],
            self._staged(work),
            self._noise([job.outcome.key for job in work.good]),
            work.captions,
            lambda: free.put(work.region),
        )
        return work

    def _place(self, picture: Decoded) -> Any:
        assert picture.pixels is not None
        if not picture.in_slot or self.rank.device.type == "cpu":
            return picture.pixels
        return (picture.slot % self.batch_size, *picture.pixels.shape[:2])

    def _staged(self, work: Work) -> Any:
        """The memory of all slots that the batch uses, to be copied at once."""
        if self.rank.device.type == "cpu" or not self.decoders.memory.size:
            return None
        import torch

        start = work.region * self.batch_size
        return torch.from_numpy(self.decoders.memory[start : start + len(work.jobs)])

    def _noise(self, keys: list[str]) -> dict[int, Any]:
        """What makes a latent a sample of its posterior, keyed by seed and sample: every rank draws the same."""
        if self.config.latent != "sample" or not keys:
            return {}
        noise = {r: posterior_noise(self.config.seed, keys, r, self._shape(r)) for r in self.config.image_resolutions}
        if self.rank.device.type == "cuda":
            return {resolution: values.pin_memory() for resolution, values in noise.items()}
        return noise

    def _tell(self, lap: Lap, busy: float, pictures: int) -> None:
        """Leave for the events how fast it went, where the time went, and what that costs.

        ``idle``: share of the time in which the device had nothing to do; ``starved``: in which the encoder waited for
        pictures; ``writing``: in which rows were made, written and committed.
        """
        rate = pictures / lap.seconds
        speed: dict[str, Any] = {
            "images_per_second": round(rate, 3),
            "idle": round(max(0.0, 1 - busy / lap.seconds), 4),
            "starved": round(lap.starved / lap.seconds, 4),
            "writing": round(max(0.0, 1 - lap.waited / lap.seconds), 4),
            "batch_size": self.batch_size,
        }
        if self.config.gpu_hour_price and rate:
            speed["cost_per_million"] = round(1e6 / rate / 3600 * self.config.gpu_hour_price, 4)
        self.notes["speed"] = speed
        noted, self.encoding.notes = self.encoding.notes, Counter()
        if noted:
            self.notes["noted"] = dict(noted)


@dataclass(frozen=True)
class Lap:
    """Seconds between the ends of two partitions, and those of them in which somebody had to wait.

    Attributes:
        starved: the encoder for pictures.
        waited: the writer for results.
    """

    seconds: float
    starved: float
    waited: float

    def __sub__(self, other: Lap) -> Lap:
        return Lap(self.seconds - other.seconds, self.starved - other.starved, self.waited - other.waited)


class _Line:
    """The threads that read, decode and encode: partitions go in, encoded batches come out in order.

    Attributes:
        queued: partitions that went in and have not come out whole.
    """

    def __init__(self, stage: Precompute) -> None:
        self.queued: list[Partition] = []
        self._partitions: SimpleQueue[Partition | None] = SimpleQueue()
        self._decoded = Ahead(stage.decoded(self._partitions), 1)
        self._encoded = Ahead(stage.encoded(self._decoded), stage.depth)
        self._last = self._now()

    def add(self, partition: Partition) -> None:
        self.queued.append(partition)
        self._partitions.put(partition)

    def batches(self) -> Iterator[tuple[Work, Encoded]]:
        """Those of the first partition."""
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
        """Give up what is queued; wait for the threads' end."""
        self._partitions.put(None)
        self._encoded.close()


def _news(known: OrderedDict[str, None], captions: list[str]) -> tuple[list[str], list[str]]:
    """Of the next ``captions``, those that are not ``known``, each once; and what to forget when they are through."""
    news = []
    for caption in captions:
        if caption not in known:
            known[caption] = None
            news.append(caption)
        known.move_to_end(caption)
    forget = [known.popitem(last=False)[0] for _ in range(len(known) - _REMEMBERED)]
    return news, forget


def _read(stored: Stored) -> Job:
    outcome = Outcome(stored.key, "failed", source=stored.source, offset=stored.offset)
    try:
        row = stored.read()
    except SampleError as error:
        outcome.reason, outcome.detail, outcome.retryable = error.reason, error.detail, error.retryable
        return Job(outcome, {})
    outcome.source_bytes, outcome.source_hash = len(row["jpg"]), content_hash(row["jpg"])
    return Job(outcome, row)


class _Memory:
    """Makes rows of encoded batches: knows the states of captions that may come again, and where they were stored."""

    def __init__(self, stage: Precompute) -> None:
        self.pictures = 0
        self._stage = stage
        self._names = [name for name in ("caption", "jpg") if name in stage.schema()]
        self._states: dict[str, tuple[dict[str, bytes], bool]] = {}
        self._stored: dict[str, int] = {}
        self._kept = 0

    def outcomes(self, work: Work, result: Encoded) -> Iterator[Outcome]:
        finite = result.texts_finite.all(0).tolist() if work.captions else []
        for number, caption in enumerate(work.captions):
            packed = {name: values[number].numpy().tobytes() for name, values in result.texts.items()}
            self._states[caption] = (packed, finite[number])
        places = {id(job): place for place, job in enumerate(work.good)}
        good = result.finite.tolist()
        for job in work.jobs:
            place = places.get(id(job))
            if place is not None:
                self.pictures += 1
                texts, sound = self._states[job.row["caption"]]
                if good[place] and sound:
                    job.outcome.status, job.outcome.row = "kept", self._row(job, texts, result, place)
                else:
                    job.outcome.reason = "not_finite"
                    job.outcome.detail = "a latent is NaN or infinite; model_dtype=float32 may help"
            yield job.outcome
        for caption in work.forget:
            del self._states[caption]

    def _row(self, job: Job, texts: dict[str, bytes], result: Encoded, place: int) -> Row:
        caption = job.row["caption"]
        row: Row = {"key": job.outcome.key, **{name: job.row[name] for name in self._names}, **texts}
        row["min_side"] = job.row.get("min_side", min(job.outcome.width, job.outcome.height))
        if self._stage.dedup:
            row["caption_back"] = self._kept - self._stored.setdefault(caption, self._kept)
            if row["caption_back"]:
                row.update(dict.fromkeys(texts, b""))
        self._kept += 1
        return row | {name: values[place].numpy().tobytes() for name, values in result.columns.items()}


@distributed
def main(rank: Rank, config: PrecomputeConfig) -> None:
    release.main(Precompute, config, rank, release_raw=config.keep == "latents", whole_line=True)


if __name__ == "__main__":
    main(config_for("precompute"))
