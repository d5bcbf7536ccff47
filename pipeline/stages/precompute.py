"""stage=precompute: image latents at each resolution and text-encoder states, stored as MDS."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from pipeline.config.cli import config_for
from pipeline.config.schema import ConfigError, PrecomputeConfig
from pipeline.distributed import Rank, distributed
from pipeline.encoders.base import (
    Autoencoder,
    ImageEncoder,
    allow_graphs,
    autoencoder,
    image_encoder,
    model_files,
    patch_encoder,
)
from pipeline.imaging.buckets import BUCKET_COLUMNS, ORIGINAL_COLUMNS, Buckets, Size, buckets_in
from pipeline.imaging.patches import FEATURES, PatchGrid
from pipeline.imaging.worker_pool import Pool, WorkerLimits
from pipeline.latents.bucketing import by_bucket, header_pool
from pipeline.latents.encoder_stage import AHEAD, EncodingStage, Job, Lap, Work, of_one_shape, read
from pipeline.latents.image_decoding import Layout
from pipeline.latents.stored_texts import STAGE as TEXTS
from pipeline.latents.stored_texts import StoredTextStates, images_of, with_images
from pipeline.latents.text_states import BACK, PER_SAMPLE, WINDOW, TextStates, fault_of, news
from pipeline.partitions.dataset import Dataset, Stored
from pipeline.partitions.plan import Partition
from pipeline.partitions.stage import evaluate, open_input
from pipeline.registry import stages
from pipeline.samples import Outcome, Row, Schema
from pipeline.stages import release

if TYPE_CHECKING:
    from pipeline.latents.encoding import Encoded, Encoding

_PATCH = 2
"""Edge in latents of a patch that becomes one token in :mod:`pipeline.models.dit` and in most other models."""
_BUFFER = 2**28  # bytes of GPU results that may wait for a disk with bursty writes


@dataclass(frozen=True)
class Captions:
    """Captions that are encoded with a batch, and those that can be forgotten after it."""

    new: list[str]
    forget: list[str]


@stages.register("precompute", PrecomputeConfig)
class Precompute(EncodingStage[PrecomputeConfig]):
    name = "precompute"
    version = 3

    @property
    def format(self) -> str:
        return "mds"

    def schema(self) -> Schema:
        self.images.require_columns("key", "jpg", "caption")
        schema: Schema = {"key": "str", "caption": "str", "min_side": "int"}
        latents = [f"latents_{r}" for r in self.config.image_resolutions]
        schema |= dict.fromkeys([*self.texts.shapes, *latents], "bytes")
        if self.texts.several:
            self.images.require_columns("captions")
        schema |= self.texts.of_several()
        schema |= dict.fromkeys(self._size_columns, "int")
        schema |= {BACK: "int"} if self.texts.shared else {}
        schema |= {"image_embedding": "bytes"} if self.config.image_encoder else {}
        if self.config.image_features:
            schema |= {f"{FEATURES}{r}": "bytes" for r in self.config.image_resolutions}
        return schema | ({"jpg": "jpeg"} if self.config.save_images else {})

    def extra(self) -> dict[str, Any]:
        """Shapes, dtype and encoders: what a reader needs to turn bytes into tensors and decode them."""
        shapes: dict[str, list[int | None]] = {name: [*shape] for name, shape in self.texts.shapes.items()}
        for resolution in self.config.image_resolutions:
            edges = [None, None] if self.buckets else self.vae.latent_shape(resolution)[1:]
            channels = self.vae.channels * (2 if self.config.latent == "moments" else 1)
            shapes[f"latents_{resolution}"] = [channels, *edges]
        extra: dict[str, Any] = {
            "dtype": self.config.save_dtype,
            "latent": self.config.latent,
            "vae": self.vae.describe(),
            **self.texts.extra(),
        }
        if self.buckets:
            extra["buckets"] = {f"latents_{each.resolution}": each.describe() for each in self.buckets}
        if self.embedder is not None:
            shapes["image_embedding"] = [self.embedder.width]
            extra["image_encoder"] = self.embedder.describe()
        if self.patch_encoder is not None:
            width = self.patch_encoder.patch_width
            for name, grid in self.grids.items():
                shapes[name] = [None if self.buckets else grid.count(), width]
            extra["image_features"] = {
                **self.patch_encoder.describe_patches(),
                "storage": self.config.features_storage,
                "patches": {name: grid.describe() for name, grid in self.grids.items()},
            }
        if self.config.batch_size == "auto":
            extra["batch_size"] = self.batch_size
        return {"shapes": shapes, **extra}

    def model_files(self) -> dict[str, str]:
        texts = self.config.text_encoder if self.texts.encodes else ()
        return model_files([self.config.vae, *texts, self.config.image_encoder, self.config.image_features])

    # ---- buckets

    @cached_property
    def buckets(self) -> tuple[Buckets, ...]:
        """Buckets for each resolution; empty: images are square."""
        config = self.config
        if config.aspect == "square":
            return ()
        step = math.lcm(config.bucket_step, _PATCH * self.vae.downsample)
        shape = (step, config.max_aspect_ratio, config.bucket_upscale, config.bucket_crop)
        return tuple(Buckets(resolution, *shape) for resolution in config.image_resolutions)

    @property
    def _size_columns(self) -> list[str]:
        """Columns that record how an image was fitted to its bucket."""
        if not self.buckets:
            return []
        own = (f"{name}_{each.resolution}" for each in self.buckets for name in BUCKET_COLUMNS)
        return [*ORIGINAL_COLUMNS, *own]

    # ---- encoders

    @cached_property
    def vae(self) -> Autoencoder:
        dtype = self.config.vae_dtype if self.on_gpu else "float32"
        return autoencoder(self.config.vae, self.rank.device, dtype)

    @cached_property
    def texts(self) -> TextStates:
        """Text states, computed here or by stage=texts."""
        if self.upstream.stage == TEXTS:
            return StoredTextStates(self.config, lambda: self.upstream)
        return TextStates(self.config, lambda: self.upstream, self.rank.device, self._dtype)

    @cached_property
    def embedder(self) -> ImageEncoder | None:
        name = self.config.image_encoder
        return image_encoder(name, self.rank.device, self._dtype) if name else None

    @cached_property
    def patch_encoder(self) -> ImageEncoder | None:
        name = self.config.image_features
        return patch_encoder(name, self.rank.device, self._dtype) if name else None

    @cached_property
    def grids(self) -> dict[str, PatchGrid]:
        """Of image features, by column; none without."""
        if self.patch_encoder is None:
            return {}
        config, patch = self.config, self.patch_encoder.patch
        resolutions, edges = config.image_resolutions, config.features_resolution
        if edges and (len(edges) != len(resolutions) or any(edge % patch for edge in edges)):
            raise ConfigError(
                f"features_resolution={list(edges)}: give a multiple of {patch}, the edge of a patch of "
                f"image_features={config.image_features}, for each of image_resolutions={list(resolutions)}"
            )
        pixels = _PATCH * self.vae.downsample
        edges = edges or tuple(max(1, round(resolution / pixels)) * patch for resolution in resolutions)
        return {f"{FEATURES}{r}": PatchGrid(r, edge, patch) for r, edge in zip(resolutions, edges, strict=True)}

    @property
    def _dtype(self) -> str:
        return str(self.config.model_dtype) if self.on_gpu else "float32"

    @cached_property
    def encoding(self) -> Encoding:
        from pipeline.latents.encoding import Encoding

        config = self.config
        evaluate(self._ideal)  # before compiling, as FLOPs of compiled networks cannot be counted
        if config.compile:
            allow_graphs(8 + sum(len(each.sizes) for each in self.buckets))  # one graph per shape
            self.vae.compile()
            for text in self.texts.encoders.values():
                text.compile()
            if self.patch_encoder is not None:
                self.patch_encoder.compile()
        return Encoding(
            device=self.rank.device,
            vae=self.vae,
            texts=self.texts.encoders,
            image_encoder=self.embedder,
            resolutions=config.image_resolutions,
            moments=config.latent == "moments",
            storage=config.text_storage,
            dtype=config.save_dtype,
            seed=config.seed if config.latent == "sample" else None,
            pooled=self.texts.pooled,
            buckets=self.buckets,
            crop_seed=config.seed,
            patch_encoder=self.patch_encoder,
            grids=tuple(self.grids.values()),
            features_storage=config.features_storage,
        )

    @cached_property
    def _ideal(self) -> tuple[float, float]:
        """Seconds per image and per caption at the device's peak throughput; 0 if unknown."""
        if not self.on_gpu:
            return 0.0, 0.0
        import torch

        from pipeline.training.loggers import flop_counter, peak_flops

        device = self.rank.device
        precision = {"float32": "tf32", "float16": "bfloat16", "bfloat16": "bfloat16"}
        peaks = [peak_flops(device, precision[dtype]) for dtype in (self.config.vae_dtype, self.config.model_dtype)]
        if not all(peaks):
            return 0.0, 0.0
        with torch.inference_mode(), flop_counter() as images:
            for resolution in self.config.image_resolutions:
                edge = resolution - resolution % self.vae.downsample
                self.vae.moments(torch.zeros((1, 3, edge, edge), device=device))
        with torch.inference_mode(), flop_counter() as features:
            if self.patch_encoder is not None:
                for grid in self.grids.values():
                    self.patch_encoder.encode_patches(torch.zeros((1, 3, grid.edge, grid.edge), device=device))
        with torch.inference_mode(), flop_counter() as captions:
            for text in self.texts.encoders.values():
                text.encode(self.texts.first_captions[:1])
        for_image = images.get_total_flops() / peaks[0] + features.get_total_flops() / peaks[1]
        return for_image, captions.get_total_flops() / peaks[1]

    @property
    def slot(self) -> Layout:
        return self.encoding.slot

    @property
    def batch_size(self) -> int:
        """The given batch size; for ``auto``, the one that the planning rank measured, so that all ranks agree."""
        given = self.config.batch_size
        if given == "auto":
            known = self.planned_extra.get("batch_size")
            return int(known) if known else self._measured_batch
        return int(given)

    @cached_property
    def _measured_batch(self) -> int:
        return self.encoding.find_batch_size()

    # ---- input

    @cached_property
    def upstream(self) -> Dataset:
        """The output of stage=texts, whose captions are encoded, if it was run; else samples with images.

        Raises:
            Unfinished: it is missing or incomplete, or its texts do not cover all current samples.
        """
        upstream = open_input(self.config, self.name)
        images_of(upstream)
        return upstream

    @cached_property
    def images(self) -> Dataset:
        """The samples with images."""
        return images_of(self.upstream)

    def forget_upstream(self) -> None:
        super().forget_upstream()
        self.__dict__.pop("images", None)

    def samples(self, index: int) -> Iterator[Stored]:
        if self.upstream.stage == TEXTS:
            return with_images(self.upstream, self.images, index)
        return super().samples(index)

    # ---- work

    def validate(self) -> None:
        if not self.config.image_resolutions:
            raise ConfigError("image_resolutions=[]: name at least one")
        self.texts.validate()
        self.images.require_data()

    @property
    def reads(self) -> tuple[str, ...]:  # type: ignore[override]
        there = {*self.upstream.schema, *self.images.schema}
        return tuple(name for name in ("min_side", *self.texts.reads) if name in there)

    def prepare(self) -> None:
        self.allow_tf32()
        evaluate(self.encoding, self.depth)

    @cached_property
    def depth(self) -> int:
        if not self.on_gpu:
            return AHEAD
        extra = self.extra()
        largest = {name: each.largest // self.vae.downsample**2 for name, each in buckets_in(extra).items()}
        shapes = {name: shape for name, shape in extra["shapes"].items() if name not in self.grids}
        numbers = [largest[name] * shape[0] if name in largest else math.prod(shape) for name, shape in shapes.items()]
        sizes = {each.resolution: each.sizes for each in self.buckets}
        for name, grid in self.grids.items():
            patches = max(map(grid.count, sizes.get(grid.resolution, (None,))))
            numbers.append(patches * extra["shapes"][name][1])
        return int(min(64, max(AHEAD, _BUFFER // (self.batch_size * sum(numbers) * 4))))

    def batches(self, rows: Iterator[Job], size: int) -> Iterator[tuple[list[Job], Captions]]:
        known: OrderedDict[str, None] = OrderedDict()
        batches = of_one_shape(rows, size)
        if not self.texts.encodes:
            yield from ((batch, Captions([], [])) for batch in batches)
            return
        rows_ahead = WINDOW // PER_SAMPLE if self.texts.several else WINDOW
        while window := list(islice(batches, max(1, rows_ahead // size))):
            texts = [text for batch in window for job in batch if job.row for text in self.texts.captions_of(job.row)]
            new, forget = news(known, texts)
            for number, batch in enumerate(window, 1):
                yield batch, Captions(new if number == 1 else [], forget if number == len(window) else [])

    def padded(self, count: int) -> int:
        """Batch size for ``count`` samples. With buckets, which leave partial batches in each partition, powers of two
        are also used, unless compiling, where each size would need its own graph."""
        if not self.buckets or self.config.compile:
            return self.batch_size
        return min(self.batch_size, 1 << (count - 1).bit_length())

    def rows(self, partition: Partition) -> Iterator[Job]:
        if not self.buckets:
            yield from super().rows(partition)
            return
        wanted = (s for s in self.samples(partition.inputs[0].start) if partition.wants(s.key))
        for stored, sizes, size in by_bucket(wanted, self.buckets, self._headers):
            if size is None or sizes:
                job = read(stored, {"jpg", *self.reads})
            else:
                job = Job(Outcome(stored.key, "dropped", source=stored.source, offset=stored.offset), {})
                job.outcome.height, job.outcome.width = size
                job.outcome.reason, job.outcome.detail = "smaller_than_bucket", f"{size[1]}x{size[0]}"
            job.sizes = sizes
            yield job

    @cached_property
    def _headers(self) -> Pool | None:
        if {"width", "height"} <= set(self.images.schema):
            return None
        return header_pool(self.decoding_processes(), WorkerLimits.of(self.config))

    def close(self) -> None:
        super().close()
        headers = self.__dict__.pop("_headers", None)
        if headers is not None:
            headers.close()

    def encode(self, work: Work, slots: npt.NDArray[Any]) -> Encoded:
        import torch

        from pipeline.latents.encoding import Batch

        return self.encoding.encode(Batch(torch.from_numpy(slots), work.more.new, work.copied, work.jobs[0].sizes))

    def begin(self) -> None:
        self._memory = _Memory(self)

    def finish(self, work: Work, encoded: Encoded) -> Iterator[Outcome]:
        encoded.wait()
        return self._memory.outcomes(work, encoded)

    def lap_done(self, lap: Lap, busy: float, images: int, notes: dict[str, Any]) -> None:
        super().lap_done(lap, busy, images, notes)
        rate = images / lap.seconds
        for_image, for_caption = self._ideal
        if for_image:
            ideal = images * for_image + self._memory.texts.captions * for_caption
            notes["speed"]["mfu"] = round(ideal / lap.seconds, 4)
        if self.config.gpu_hour_price and rate:
            notes["speed"]["cost_per_million"] = round(1e6 / rate / 3600 * self.config.gpu_hour_price, 4)
        noted, self.encoding.notes = self.encoding.notes, Counter()
        if noted:
            notes["noted"] = dict(noted)


class _Memory:
    """Turns encoded batches into rows."""

    def __init__(self, stage: Precompute) -> None:
        self.texts = stage.texts.rows()
        self._buckets = stage.buckets
        self._seed = stage.config.seed
        self._copied = [name for name in ("caption", "jpg") if name in stage.schema()]

    def outcomes(self, work: Work, result: Encoded) -> Iterator[Outcome]:
        self.texts.learn(work.more.new, result)
        columns = {name: values.numpy() for name, values in result.columns.items()}
        finite = result.finite.tolist()
        for place, job in enumerate(work.jobs):
            if job.good and self._buckets and self._sizes(job) != job.sizes:
                job.outcome.reason = "size_mismatch"
                job.outcome.detail = f"{job.outcome.width}x{job.outcome.height}, its row or header says otherwise"
            elif job.good:
                texts, text_fault = self.texts.of(job.row)
                fault = fault_of(*finite[place]) or text_fault
                if fault:
                    job.outcome.reason, job.outcome.detail = "not_finite", fault
                else:
                    row = self._row(job, self.texts.kept(job.row, texts))
                    job.outcome.row = row | {name: values[place].tobytes() for name, values in columns.items()}
                    job.outcome.status = "kept"
            yield job.outcome
        self.texts.forget(work.more.forget)

    def _sizes(self, job: Job) -> tuple[Size | None, ...]:
        return tuple(buckets.size_of(job.outcome.height, job.outcome.width) for buckets in self._buckets)

    def _row(self, job: Job, texts: Row) -> Row:
        outcome = job.outcome
        row: Row = {"key": outcome.key, **texts}
        for name in self._copied:
            row[name] = job.row[name]
        row["min_side"] = job.row.get("min_side", min(outcome.width, outcome.height))
        if self._buckets:
            row["original_height"], row["original_width"] = outcome.height, outcome.width
        for buckets in self._buckets:
            place = buckets.place_of(outcome.height, outcome.width, self._seed, outcome.key)
            assert place is not None
            values = (*place.size, place.top, place.left)
            row |= {f"{name}_{buckets.resolution}": value for name, value in zip(BUCKET_COLUMNS, values, strict=True)}
        return row


@distributed
def main(rank: Rank, config: PrecomputeConfig) -> None:
    release.main(Precompute, config, rank, release_raw=config.keep == "latents", whole_line=True)


if __name__ == "__main__":
    main(config_for("precompute"))
