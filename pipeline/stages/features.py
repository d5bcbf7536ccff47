"""stage=features: a frozen encoder's features of each picture, once, so that training never pays for them; as MDS."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from pipeline.cli import config_for
from pipeline.config import FeaturesConfig
from pipeline.distributed import Rank, distributed
from pipeline.encoders.vision import VisionEncoder, vision_encoder
from pipeline.partitions import engine
from pipeline.samples import Row, Schema
from pipeline.stages.pictures import PictureStage

_COPIED = ("key", "caption", "captions", "questions")


class Features(PictureStage):
    name = "features"

    @property
    def format(self) -> str:
        return "mds"

    @cached_property
    def encoder(self) -> VisionEncoder:
        return vision_encoder(self.config.encoder, self.config.features, self.rank.device)

    def schema(self) -> Schema:
        self.upstream.require_columns("key", "jpg", "captions")
        copied = {name: kind for name, kind in self.upstream.schema.items() if name in _COPIED}
        return {**copied, "features": "bytes"}

    def extra(self) -> dict[str, Any]:
        shapes = {"features": [self.encoder.tokens, self.encoder.width]}
        return {"shapes": shapes, "dtype": self.config.save_dtype, "encoder": self.encoder.describe()}

    def describe_batch(self, rows: Sequence[Row], pictures: Sequence[np.ndarray]) -> list[Row]:
        features = self.encoder.encode(self.encoder.preprocess(pictures)).cpu().numpy().astype(self.config.save_dtype)
        return [
            {name: row[name] for name in _COPIED if name in row} | {"features": values.tobytes()}
            for row, values in zip(rows, features, strict=True)
        ]


@distributed
def main(rank: Rank, config: FeaturesConfig) -> None:
    engine.main(Features, config, rank)


if __name__ == "__main__":
    main(config_for("features"))
