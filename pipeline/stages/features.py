"""stage=features: compute a frozen encoder's features of each image once, so that training need not; stored as MDS."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from pipeline.config.cli import config_for
from pipeline.config.schema import FeaturesConfig
from pipeline.distributed import Rank, distributed
from pipeline.encoders.base import model_files
from pipeline.encoders.vision import VisionEncoder, vision_encoder
from pipeline.latents.encoder_stage import EncodingStage, Work
from pipeline.latents.image_decoding import Layout
from pipeline.partitions import engine
from pipeline.partitions.stage import evaluate
from pipeline.registry import stages
from pipeline.samples import Outcome, Schema

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.latents.transfers import Transfers, Transit

_COPIED = ("key", "caption", "captions", "questions")


@dataclass
class Described:
    """Features, uint8 (n, bytes), and whether each is finite, bool (n,); valid once ``transit`` has been waited for."""

    features: Tensor
    finite: Tensor
    transit: Transit

    @property
    def seconds(self) -> float:
        return self.transit.seconds


@stages.register("features", FeaturesConfig)
class Features(EncodingStage[FeaturesConfig]):
    name = "features"
    version = 2

    @property
    def format(self) -> str:
        return "mds"

    @cached_property
    def encoder(self) -> VisionEncoder:
        dtype = self.config.model_dtype if self.on_gpu else "float32"
        return vision_encoder(self.config.encoder, self.config.features, self.rank.device, dtype)

    @cached_property
    def transfers(self) -> Transfers:
        from pipeline.latents.transfers import Transfers

        return Transfers(self.rank.device)

    def schema(self) -> Schema:
        self.upstream.require_columns("key", "jpg", "captions")
        copied = {name: kind for name, kind in self.upstream.schema.items() if name in _COPIED}
        return {**copied, "features": "bytes"}

    def extra(self) -> dict[str, Any]:
        shapes = {"features": [self.encoder.tokens, self.encoder.width]}
        return {"shapes": shapes, "dtype": self.config.save_dtype, "encoder": self.encoder.describe()}

    def model_files(self) -> dict[str, str]:
        return model_files([self.config.encoder])

    @property
    def batch_size(self) -> int:
        return self.config.batch_size

    @property
    def slot(self) -> Layout:
        return Layout((self.encoder.preprocessing.crop(self.encoder.resolution),))

    @property
    def reads(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(name for name in _COPIED if name in self.upstream.schema)

    def prepare(self) -> None:
        self.allow_tf32()
        evaluate(self.encoder, self.transfers)

    def encode(self, work: Work, slots: npt.NDArray[Any]) -> Described:
        import torch

        transfers, crop, edge = self.transfers, self.slot.crops[0], self.encoder.resolution
        with torch.inference_mode():
            (there,) = transfers.upload([torch.from_numpy(slots)], work.copied)
            transfers.begin()
            pixels = there[:, : crop.bytes].unflatten(1, (edge, edge, 3))
            values = self.encoder.encode(self.encoder.preprocessing.normalise(pixels))
            stored = values.to(getattr(torch, self.config.save_dtype)).flatten(1)
            features, finite = stored.contiguous().view(torch.uint8), torch.isfinite(stored).all(1)
            described = Described(transfers.download(features), transfers.download(finite), transfers.end())
        if not self.on_gpu:
            work.copied()
        return described

    def finish(self, work: Work, encoded: Described) -> Iterator[Outcome]:
        encoded.transit.wait()
        features = encoded.features.numpy()
        for place, (job, finite) in enumerate(zip(work.jobs, encoded.finite.tolist(), strict=False)):
            if job.good and finite:
                row = {name: job.row[name] for name in _COPIED if name in job.row}
                job.outcome.row = row | {"features": features[place].tobytes()}
                job.outcome.status = "kept"
            elif job.good:
                job.outcome.reason = "not_finite"
                job.outcome.detail = "a feature is NaN or too large for how it is stored: save_dtype=float32 may help"
            yield job.outcome


@distributed
def main(rank: Rank, config: FeaturesConfig) -> None:
    engine.main(Features, config, rank)


if __name__ == "__main__":
    main(config_for("features"))
