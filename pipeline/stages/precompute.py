"""stage=precompute: image latents at each resolution and text-encoder states, stored as MDS."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline import images
from pipeline.cli import config_for
from pipeline.config import ConfigError, PrecomputeConfig
from pipeline.distributed import Rank, distributed
from pipeline.encoders.base import Autoencoder, TextEncoder, autoencoder, posterior_noise, text_encoder
from pipeline.partitions import engine
from pipeline.partitions.plan import Partition
from pipeline.partitions.stage import Stage, follow_upstream
from pipeline.samples import Outcome, Row, SampleError, Schema, content_hash

if TYPE_CHECKING:
    from torch import Tensor

Decoded = tuple[Outcome, Row, np.ndarray]
"""A sample on its way: its outcome so far, its row, its picture as uint8 (h, w, 3)."""


class Precompute(Stage):
    name = "precompute"

    @property
    def format(self) -> str:
        return "mds"

    def schema(self) -> Schema:
        self.upstream.require_columns("key", "jpg", "caption")
        latents = {f"latents_{resolution}": "bytes" for resolution in self.config.image_resolutions}
        more = {"min_side": "int"} if "min_side" in self.upstream.schema else {}
        more |= {"jpg": "jpeg"} if self.config.save_images else {}
        return {"key": "str", "caption": "str", "caption_latents": "bytes", **latents, **more}

    def extra(self) -> dict[str, Any]:
        """Shapes, dtype and encoders: what a reader needs to make tensors of the bytes and to decode them."""
        vae, text = self.vae, self.text
        shapes = {f"latents_{r}": list(self._shape(r)) for r in self.config.image_resolutions}
        return {
            "shapes": {"caption_latents": [text.length, text.width], **shapes},
            "dtype": self.config.save_dtype,
            "vae": vae.describe(),
            "text_encoder": text.describe(),
        }

    # ---- encoders

    @cached_property
    def vae(self) -> Autoencoder:
        return autoencoder(self.config.vae, self.rank.device, self._dtype)

    @cached_property
    def text(self) -> TextEncoder:
        return text_encoder(self.config.text_encoder, self.rank.device, self._dtype)

    @property
    def _dtype(self) -> str:
        return "float32" if self.rank.device.type == "cpu" else str(self.config.model_dtype)

    def _shape(self, resolution: int) -> tuple[int, int, int]:
        if resolution < 1 or resolution % self.vae.downsample:
            raise ConfigError(f"image_resolutions={resolution}: must be a multiple of {self.vae.downsample}")
        edge = resolution // self.vae.downsample
        return (self.vae.channels, edge, edge)

    # ---- work

    def plan(self, since: int = 0) -> Iterator[Partition]:
        if self.config.batch_size < 1:
            raise ConfigError(f"batch_size={self.config.batch_size}: must be at least 1")
        return follow_upstream(self.upstream, since)

    def process(self, partition: Partition) -> Iterator[Outcome]:
        """Batches never reach over partitions, so that the result does not depend on who does which of them."""
        import torch

        torch.set_num_threads(self.config.threads)
        samples = self._decoded(partition)
        while batch := self._next(samples):
            good = [sample for sample in batch if not isinstance(sample, Outcome)]
            rows = iter(self._encode(good)) if good else iter(())
            for sample in batch:
                if isinstance(sample, Outcome):
                    yield sample
                    continue
                outcome = sample[0]
                outcome.row = next(rows)
                if outcome.row is None:
                    outcome.status, outcome.reason = "failed", "not_finite"
                    outcome.detail = "a latent is NaN or infinite; model_dtype=float32 may help"
                yield outcome

    def _next(self, samples: Iterator[Decoded | Outcome]) -> list[Decoded | Outcome]:
        with self.rank.waiting() if self.rank.device.type == "cuda" else nullcontext():  # the GPU waits
            return list(islice(samples, self.config.batch_size))

    def _decoded(self, partition: Partition) -> Iterator[Decoded | Outcome]:
        for stored in self.upstream.samples(partition.inputs[0].start):
            if not partition.wants(stored.key):
                continue
            outcome = Outcome(stored.key, "failed", source=stored.source, offset=stored.offset)
            try:
                row = stored.read()
                outcome.source_bytes, outcome.source_hash = len(row["jpg"]), content_hash(row["jpg"])
                picture = images.decode(row["jpg"], images.probe(row["jpg"], images.Limits()))
            except (SampleError, images.ImageError) as error:
                outcome.reason, outcome.detail = error.reason, error.detail
                outcome.retryable = getattr(error, "retryable", False)
                yield outcome
                continue
            outcome.status = "kept"
            outcome.height, outcome.width = picture.shape[:2]
            yield outcome, row, picture

    def _encode(self, batch: list[Decoded]) -> list[Row | None]:
        """Rows with latents for a batch of decoded samples; None where a latent is not finite."""
        import torch

        keys = [row["key"] for _, row, _ in batch]
        columns: dict[str, np.ndarray] = {}
        with torch.inference_mode():
            states = self.text.encode([row["caption"] for _, row, _ in batch])
            columns["caption_latents"] = self._stored(states)
            for resolution in self.config.image_resolutions:
                pixels = self.vae.preprocess([picture for _, _, picture in batch], resolution)
                latents = self.vae.encode(pixels, self._noise(keys, resolution))
                columns[f"latents_{resolution}"] = self._stored(latents)
        copied = [name for name in ("key", "caption", "min_side", "jpg") if name in self.schema_of_rows]
        finite = np.logical_and.reduce([_finite(values) for values in columns.values()])
        return [
            {name: row[name] for name in copied} | {name: values[i].tobytes() for name, values in columns.items()}
            if finite[i]
            else None
            for i, (_, row, _) in enumerate(batch)
        ]

    @cached_property
    def schema_of_rows(self) -> Schema:
        return self.schema()

    def _noise(self, keys: list[str], resolution: int) -> Tensor | None:
        """What makes a latent a sample of its posterior, keyed by seed and sample: every rank draws the same."""
        if self.config.latent == "mode":
            return None
        return posterior_noise(self.config.seed, keys, resolution, self._shape(resolution)).to(self.rank.device)

    def _stored(self, values: Tensor) -> np.ndarray:
        """(b, ...) in the precision that is stored."""
        array: np.ndarray = values.float().cpu().numpy().astype(self.config.save_dtype)
        return array


def _finite(values: np.ndarray) -> np.ndarray:
    """Which samples of (b, ...) hold neither NaN nor infinity: bool (b,)."""
    result: np.ndarray = np.isfinite(values).reshape(len(values), -1).all(axis=1)
    return result


@distributed
def main(rank: Rank, config: PrecomputeConfig) -> None:
    engine.main(Precompute, config, rank)


if __name__ == "__main__":
    main(config_for("precompute"))
