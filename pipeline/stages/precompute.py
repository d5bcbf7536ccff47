"""stage=precompute: image latents at each resolution and text-encoder states, stored as MDS."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any

from pipeline.config.cli import config_for
from pipeline.config.schema import ConfigError, PrecomputeConfig
from pipeline.distributed import Rank, distributed
from pipeline.encoders.base import (
    Autoencoder,
    ImageEncoder,
    TextEncoder,
    autoencoder,
    image_encoder,
    text_encoder,
)
from pipeline.latents.decoding import Layout
from pipeline.latents.stage import AHEAD, EncodingStage, Job, Lap, Work
from pipeline.partitions.plan import Partition
from pipeline.samples import Outcome, Row, SampleError, Schema
from pipeline.stages import release

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.latents.encoding import Encoded, Encoding

_WINDOW = 512
"""Rows that are read ahead, so that captions of like length can be encoded together."""
_REMEMBERED = 2048
"""Captions of a partition whose states are kept for the next sample that has the same."""
_BUFFER = 2**28  # bytes of results of a GPU that may wait for a disk that writes in bursts


@dataclass(frozen=True)
class Captions:
    """Of a batch: captions that are encoded along with it, and those that are not needed after it."""

    new: list[str]
    forget: list[str]


class Precompute(EncodingStage):
    name = "precompute"
    version = 3

    @property
    def format(self) -> str:
        return "mds"

    def schema(self) -> Schema:
        self.upstream.require_columns("key", "jpg", "caption")
        schema: Schema = {"key": "str", "caption": "str", "min_side": "int"}
        latents = [f"latents_{r}" for r in self.config.image_resolutions]
        schema |= dict.fromkeys([*self.texts, *self.pooled.values(), *latents], "bytes")
        schema |= {"caption_back": "int"} if self.dedup else {}
        schema |= {"image_embedding": "bytes"} if self.config.image_encoder else {}
        return schema | ({"jpg": "jpeg"} if self.config.save_images else {})

    def extra(self) -> dict[str, Any]:
        """Shapes, dtype and encoders: what a reader needs to make tensors of the bytes and to decode them."""
        shapes: dict[str, list[int]] = {name: [text.length, text.width] for name, text in self.texts.items()}
        shapes |= {pooled: [self.texts[name].pooled_width] for name, pooled in self.pooled.items()}
        for resolution in self.config.image_resolutions:
            channels, *edges = self.vae.latent_shape(resolution)
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
        if self.config.batch_size == "auto":
            extra["batch_size"] = self.batch_size
        return {"shapes": shapes, **extra}

    def _describe_storage(self) -> dict[str, Any]:
        """How text states are stored, and what that costs: measured on the first captions."""
        from pipeline.loading import text_storage

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
        dtype = self.config.vae_dtype if self.on_gpu else "float32"
        return autoencoder(self.config.vae, self.rank.device, dtype)

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
    def pooled(self) -> dict[str, str]:
        """Columns of pooled embeddings, by the column of the encoder's states."""
        if not self.config.pooled:
            return {}
        columns = {name: name.replace("latents", "pooled") for name, text in self.texts.items() if text.pooled_width}
        if not columns:
            raise ConfigError("pooled=true: none of the text encoders has pooled embeddings; CLIPs have")
        return columns

    @cached_property
    def embedder(self) -> ImageEncoder | None:
        name = self.config.image_encoder
        return image_encoder(name, self.rank.device, self._dtype) if name else None

    @property
    def _dtype(self) -> str:
        return str(self.config.model_dtype) if self.on_gpu else "float32"

    @property
    def dedup(self) -> bool:
        return str(self.config.text_storage).endswith("dedup")

    @cached_property
    def encoding(self) -> Encoding:
        from pipeline.latents.encoding import Encoding

        config = self.config
        self._ideal  # noqa: B018 - compiled networks cannot be counted
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
            config.seed if config.latent == "sample" else None,
            self.pooled,
        )

    @cached_property
    def _ideal(self) -> tuple[float, float]:
        """Seconds that the device would need at its peak for an image, and for a caption; 0 where that is not known."""
        if not self.on_gpu:
            return 0.0, 0.0
        import torch

        from pipeline.training.logs import flop_counter, peak_flops

        device = self.rank.device
        precision = {"float32": "tf32", "float16": "bfloat16", "bfloat16": "bfloat16"}
        peaks = [peak_flops(device, precision[dtype]) for dtype in (self.config.vae_dtype, self.config.model_dtype)]
        if not all(peaks):
            return 0.0, 0.0
        with torch.inference_mode(), flop_counter() as images:
            for resolution in self.config.image_resolutions:
                self.vae.moments(torch.zeros((1, 3, resolution, resolution), device=device))
        with torch.inference_mode(), flop_counter() as captions:
            for text in self.texts.values():
                text.encode(self._first_captions[:1])
        return images.get_total_flops() / peaks[0], captions.get_total_flops() / peaks[1]

    @property
    def slot(self) -> Layout:
        return self.encoding.slot

    @property
    def batch_size(self) -> int:
        """As given; of ``auto`` what the rank that made the plan has found out, the same for all."""
        given = self.config.batch_size
        if given == "auto":
            known = self.planned.get("extra", {}).get("batch_size")
            return int(known) if known else self._measured_batch
        return int(given)

    @cached_property
    def _measured_batch(self) -> int:
        return self.encoding.find_batch_size()

    # ---- work

    def plan(self, since: int = 0) -> Iterator[Partition]:
        if not self.config.image_resolutions:
            raise ConfigError("image_resolutions=[]: name at least one")
        return super().plan(since)

    @property
    def reads(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(name for name in ("caption", "min_side") if name in self.upstream.schema)

    def prepare(self) -> None:
        self.allow_tf32()
        self.encoding  # noqa: B018
        self.depth  # noqa: B018

    @cached_property
    def depth(self) -> int:
        if not self.on_gpu:
            return AHEAD
        shapes = self.extra()["shapes"].values()
        size = self.batch_size * sum(math.prod(shape) for shape in shapes) * 4
        return int(min(64, max(AHEAD, _BUFFER // size)))

    def batches(self, rows: Iterator[Job], size: int) -> Iterator[tuple[list[Job], Captions]]:
        known: OrderedDict[str, None] = OrderedDict()
        while window := list(islice(rows, size * max(1, _WINDOW // size))):
            new, forget = _news(known, [job.row["caption"] for job in window if job.row])
            for start in range(0, len(window), size):
                first, last = start == 0, start + size >= len(window)
                yield window[start : start + size], Captions(new if first else [], forget if last else [])

    def encode(self, work: Work, slots: Tensor) -> Encoded:
        from pipeline.latents.encoding import Batch

        return self.encoding.encode(Batch(slots, work.more.new, work.copied))

    def begin(self) -> None:
        self._memory = _Memory(self)

    def finish(self, work: Work, encoded: Encoded) -> Iterator[Outcome]:
        encoded.wait()
        return self._memory.outcomes(work, encoded)

    def lap_done(self, lap: Lap, busy: float, images: int) -> None:
        super().lap_done(lap, busy, images)
        rate = images / lap.seconds
        for_image, for_caption = self._ideal
        if for_image:
            ideal = images * for_image + self._memory.captions * for_caption
            self.notes["speed"]["mfu"] = round(ideal / lap.seconds, 4)
        if self.config.gpu_hour_price and rate:
            self.notes["speed"]["cost_per_million"] = round(1e6 / rate / 3600 * self.config.gpu_hour_price, 4)
        noted, self.encoding.notes = self.encoding.notes, Counter()
        if noted:
            self.notes["noted"] = dict(noted)


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


class _Memory:
    """Makes rows of encoded batches: knows the states of captions that may come again, and where they were stored."""

    def __init__(self, stage: Precompute) -> None:
        self.captions = 0
        self._dedup = stage.dedup
        self._copied = [name for name in ("caption", "jpg") if name in stage.schema()]
        self._states: dict[str, tuple[Row, str]] = {}
        self._stored: dict[str, int] = {}
        self._kept = 0

    def outcomes(self, work: Work, result: Encoded) -> Iterator[Outcome]:
        self.captions += len(work.more.new)
        flags = result.texts_finite.tolist()
        texts = {name: values.numpy() for name, values in result.texts.items()}
        for number, caption in enumerate(work.more.new):
            packed = {name: values[number].tobytes() for name, values in texts.items()}
            self._states[caption] = (packed, _fault(*flags[number]))
        columns = {name: values.numpy() for name, values in result.columns.items()}
        for place, (job, finite) in enumerate(zip(work.jobs, result.finite.tolist(), strict=False)):
            if job.good:
                states, fault = self._states[job.row["caption"]]
                fault = _fault(*finite) or fault
                if fault:
                    job.outcome.reason, job.outcome.detail = "not_finite", fault
                else:
                    row = self._row(job, states)
                    job.outcome.row = row | {name: values[place].tobytes() for name, values in columns.items()}
                    job.outcome.status = "kept"
            yield job.outcome
        for caption in work.more.forget:
            del self._states[caption]

    def _row(self, job: Job, texts: Row) -> Row:
        caption, outcome = job.row["caption"], job.outcome
        row: Row = {"key": outcome.key, **texts}
        for name in self._copied:
            row[name] = job.row[name]
        row["min_side"] = job.row.get("min_side", min(outcome.width, outcome.height))
        if self._dedup:
            row["caption_back"] = self._kept - self._stored.setdefault(caption, self._kept)
            if row["caption_back"]:
                row.update(dict.fromkeys(texts, b""))
        self._kept += 1
        return row


def _fault(computed: bool, stored: bool) -> str:
    """What to say of values that are not all finite; empty if they are."""
    if not computed:
        return "a latent is NaN or infinite; model_dtype=float32 may help"
    return "" if stored else "a latent is too large for the precision that it is stored in: save_dtype=float32 helps"


@distributed
def main(rank: Rank, config: PrecomputeConfig) -> None:
    release.main(Precompute, config, rank, release_raw=config.keep == "latents", whole_line=True)


if __name__ == "__main__":
    main(config_for("precompute"))
