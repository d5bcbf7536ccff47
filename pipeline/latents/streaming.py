"""The same batches from folders elsewhere, by StreamingDataset of mosaicml-streaming."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from streaming import Stream, StreamingDataLoader, StreamingDataset
from streaming.base.constant import SHM_TO_CLEAN
from streaming.base.storage.download import CloudDownloader

from pipeline.cli import nearest
from pipeline.config import ConfigError
from pipeline.latents.loading import _BACK, _IMAGE, _TEXT, Layout, check_text
from pipeline.latents.stale import remove_stale
from pipeline.randomness import normals, uniforms

_LOCAL = "file://"


class RemoteLatents(StreamingDataset):
    """Samples as dicts: ``image_latents`` (c, h, w), ``caption_latents`` (1, l, d), ``drop_caption_mask`` ().

    Moments give a sample of their own each epoch.
    """

    def __init__(self, layouts: Sequence[Layout], column: str, cap_drop_prob: float, **given: Any) -> None:
        super().__init__(**given)
        self._layouts = layouts
        self._column = column
        self._cap_drop_prob = cap_drop_prob
        self._seed = int(given["shuffle_seed"])

    def __getitem__(self, at: int) -> dict[str, torch.Tensor]:  # type: ignore[override]
        row = super().__getitem__(at)
        layout = self._layouts[self._folder(at)]
        text = row[_TEXT] or super().__getitem__(at - row.get(_BACK, 0))[_TEXT]
        image = layout.image(_raw(row[self._column]), self._column, self._noise(layout, int(at)))
        drawn = uniforms(1, self._seed, "drop", self.next_epoch, int(at))[0]
        return {
            "image_latents": image[0],
            "caption_latents": layout.text(_raw(text)),
            "drop_caption_mask": torch.tensor(float(drawn >= self._cap_drop_prob)),
        }

    def _folder(self, at: int) -> int:
        shard, _ = self.spanner[at]
        return int(self.stream_per_shard[shard])

    def _noise(self, layout: Layout, at: int) -> torch.Tensor | None:
        if layout.latent != "moments":
            return None
        shape = layout.image_shape(self._column)
        return torch.from_numpy(normals(shape, self._seed, "moments", self.next_epoch, at))[None]


def _raw(data: bytes) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy())[None]


def build(
    places: Sequence[str],
    batch_size: int,
    image_size: int,
    text_shape: tuple[int, int],
    foreign: Layout,
    *,
    cap_drop_prob: float,
    shuffle: bool,
    drop_last: bool,
    weights: Sequence[float],
    seed: int,
    cache: str | Path,
    options: Mapping[str, Any],
) -> StreamingDataLoader:
    """See :func:`pipeline.latents.loading.build_streaming_latents_dataloader`.

    What crashed runs have left in the shared memory is taken away first.

    Raises:
        ConfigError: also if another job on this machine streams to the same ``cache``.
    """
    remove_stale(SHM_TO_CLEAN)
    column = f"{_IMAGE}{image_size}"
    root = Path(cache or Path(tempfile.gettempdir()) / "latentmill")
    streams, layouts = [], []
    for number, place in enumerate(places):
        local = root / hashlib.sha256(place.encode()).hexdigest()[:16]
        layout = _layout(place, local, foreign)
        if column not in layout.shapes:
            sizes = [name[len(_IMAGE) :] for name in layout.shapes if name.startswith(_IMAGE)]
            raise ConfigError(f"image_size={image_size}: {place} has {nearest(str(image_size), sizes)}")
        check_text(place, layout, text_shape)
        layouts.append(layout)
        share: dict[str, Any] = {"proportion": weights[number] / sum(weights)} if weights else {}
        streams.append(Stream(remote=_remote(place), local=str(local), **share))
    try:
        dataset = RemoteLatents(
            layouts,
            column,
            cap_drop_prob,
            streams=streams,
            batch_size=batch_size,
            shuffle=shuffle,
            shuffle_seed=seed,
            num_canonical_nodes=1,
        )
    except ValueError as error:
        if "Reused local directory" not in str(error):
            raise
        raise ConfigError(f"cache={root}: another job on this machine streams to it: give this one another") from None
    return StreamingDataLoader(dataset, batch_size=batch_size, drop_last=drop_last, **options)


def _remote(place: str) -> str:
    return place.removeprefix(_LOCAL)


def _layout(place: str, local: Path, foreign: Layout) -> Layout:
    """What the manifest there says; ``foreign`` where there is none."""
    path = local / "manifest.json"
    if not path.exists():
        local.mkdir(parents=True, exist_ok=True)
        remote = f"{_remote(place).rstrip('/')}/manifest.json"
        downloader = CloudDownloader.get(remote)
        try:
            downloader.download(remote, str(path), 60.0)
        except Exception:  # each kind of storage has its own for a file that is not there
            return foreign
    return Layout.of(json.loads(path.read_text()))
