"""Batches of stored latents for training, from local and remote folders.

Any folder of MDS shards with an ``index.json`` can be read; for a dataset directory, shapes, dtypes and the storage of
captions are read from its manifest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.config.cli import nearest
from pipeline.config.schema import ConfigError
from pipeline.imaging.buckets import Size
from pipeline.loading import Epochs, Parts, ShardLocal, Stream, text_storage
from pipeline.loading.bucket_loader import BucketLoader
from pipeline.loading.bucketed import BucketMajor, BucketSlots
from pipeline.loading.caption_choice import CHOICES, checked_weights, chosen
from pipeline.loading.epoch_slots import Slots, shuffle_window
from pipeline.loading.latent_folder import TEXT as _TEXT
from pipeline.loading.latent_folder import Expected, LatentFolder, Layout
from pipeline.loading.latent_loader import LatentLoader
from pipeline.partitions.bucket_index import BucketIndex
from pipeline.randomness import normals
from pipeline.samples.captions import ORIGINAL

__all__ = [
    "BucketLoader",
    "Expected",
    "LatentDataset",
    "LatentFolder",
    "LatentLoader",
    "Layout",
    "Slots",
    "TrainingLatents",
    "build_streaming_latents_dataloader",
]

_KNOWN = ("pin_memory", "prefetch", "num_workers", "prefetch_factor")
_IGNORED = ("persistent_workers",)  # an option of DataLoader without effect here, as there are no worker processes


@dataclass
class TrainingLatents:
    """Latents for the training loop: one resolution of a folder, with moments as stored.

    Attributes:
        captions, caption_weights, seed: as for :class:`LatentDataset`, with ``captions`` ``draw`` or ``first``.
    """

    folder: LatentFolder
    resolution: int
    captions: str = "draw"
    caption_weights: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0

    def __len__(self) -> int:
        return len(self.folder)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.folder.layout.image_shape(self.folder.column_of(self.resolution))

    @cached_property
    def order(self) -> BucketMajor:
        """With buckets, the order of positions: bucket by bucket."""
        return BucketMajor(self.folder.bucket_index(self.folder.column_of(self.resolution)))

    @property
    def bucket_starts(self) -> tuple[int, ...]:
        """First position of each bucket, followed by the number of samples; empty without buckets."""
        has_buckets = self.folder.column_of(self.resolution) in self.folder.layout.buckets
        return tuple(self.order.starts.tolist()) if has_buckets else ()

    @property
    def stream(self) -> Callable[[int], Stream] | None:
        """For remote latents, seed → an order in which few shards are needed at a time; else None."""
        starts = self.folder.starts
        if not self.folder.is_far or self.bucket_starts:
            return None
        window = shuffle_window(len(self), len(starts) - 1)
        return lambda seed: Epochs(len(self), seed, ShardLocal(starts, window))

    def require(self, positions: npt.NDArray[Any]) -> None:
        """Announce that these samples will be read soon."""
        self.folder.require(self.order.positions(positions) if self.bucket_starts else positions)

    def batch(self, positions: npt.NDArray[Any], epochs: npt.NDArray[Any] | None = None) -> dict[str, Tensor]:
        """Read a batch.

        ``image_latents``, (b, c, h, w) or moments (b, 2c, h, w), are float32. ``caption_latents``, (b, l, d), keep
        their stored precision, as they are most of the bytes copied to the device; the padding of ragged ones is zero.
        With buckets, all positions must be in one, and there are ``size_conditions``, float32 (b, 6): see
        :meth:`LatentFolder.size_conditions`.

        Args:
            epochs: how often each sample was seen before, int64 (b,); together with the seed and the sample's key, it
                determines the caption drawn. None: the first caption.
        """
        column, layout, size = self.folder.column_of(self.resolution), self.folder.layout, None
        has_buckets = column in layout.buckets
        if has_buckets:
            size = self.order.size_of(positions)
            positions = self.order.positions(positions)
        which = None
        if epochs is not None and self.captions == "draw":
            which = drawn_captions(self.folder, positions.tolist(), epochs.tolist(), self.caption_weights, self.seed)
        raw = self.folder.read(positions.tolist(), [column, _TEXT], size, which)
        image = layout.stored_image(raw[column], column, size)
        batch = {"image_latents": image.float(), "caption_latents": layout.text(raw[_TEXT])}
        if has_buckets:
            batch["size_conditions"] = self.folder.size_conditions(positions.tolist(), column).float()
        return batch


def drawn_captions(
    folder: LatentFolder, positions: Sequence[int], epochs: Sequence[int], weights: Mapping[str, float], seed: int
) -> list[int] | None:
    """Index of the caption that each sample uses, see :func:`pipeline.loading.caption_choice.chosen`; None if only one
    caption's text states are stored."""
    if not folder.layout.sources:
        return None
    return [
        chosen(folder.key(at), folder.caption_sources(at), weights, seed, epoch)
        for at, epoch in zip(positions, epochs, strict=True)
    ]


def caption_weights_for(weights: Mapping[str, float], folders: Sequence[LatentFolder]) -> dict[str, float]:
    """Check ``weights`` against the caption sources of all ``folders``, and return them.

    Raises:
        ConfigError: they do not match, see :func:`pipeline.loading.caption_choice.checked_weights`; or all folders have
            text states of only one caption per sample, so that there is nothing to draw.
    """
    if weights and not any(folder.layout.sources for folder in folders):
        names = ", ".join(folder.name for folder in folders)
        raise ConfigError(f"caption_weights: {names}: made with encode_captions=first, so there is nothing to draw")
    sources = list(dict.fromkeys(source for folder in folders for source in folder.layout.sources or (ORIGINAL,)))
    return checked_weights(weights, sources)


# ---- samples


@dataclass
class LatentDataset:
    """A map-style dataset of the samples of all folders, one folder after the other.

    Attributes:
        column: of the latents, ``latents_<image_size>``.
        seed: with ``epoch``, keys the posterior samples that are drawn from stored moments.
        size_conditions: whether batches include them, see :meth:`LatentFolder.size_conditions`.
        image_features: whether batches include the image features stored with the latents.
        captions: if text states of several captions are stored: ``draw`` one in each epoch by the sample's key, use the
            ``first``, or ``all``.
        caption_weights: for drawing, by caption source; see :func:`pipeline.loading.caption_choice.chosen`.
    """

    folders: Sequence[LatentFolder]
    column: str
    seed: int = 0
    epoch: int = 0
    size_conditions: bool = False
    image_features: bool = False
    captions: str = "draw"
    caption_weights: Mapping[str, float] = field(default_factory=dict)

    def __len__(self) -> int:
        """Number of samples in all folders."""
        return int(self._parts.starts[-1])

    @cached_property
    def _parts(self) -> Parts:
        return Parts([len(folder) for folder in self.folders])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One sample: ``image_latents`` (c, h, w), ``caption_latents`` (1, l, d) and ``drop_caption_mask`` (), which is
        1; for ragged text states also ``caption_mask``, bool (l,)."""
        number = int(index) + len(self) if index < 0 else int(index)
        if not 0 <= number < len(self):
            raise IndexError(f"there is no sample {index}: the dataset has {len(self)}")
        folders, positions = self._parts.locate(np.array([number]))
        size = self.indexes[int(folders[0])].size_at(int(positions[0]))
        batch = self.batch(self.epoch, folders, positions, size)
        return {**{name: tensor[0] for name, tensor in batch.items()}, "drop_caption_mask": torch.tensor(1.0)}

    @cached_property
    def indexes(self) -> list[BucketIndex]:
        """The bucket index of each folder."""
        return [folder.bucket_index(self.column) for folder in self.folders]

    def batch(
        self, epoch: int, folders: npt.NDArray[Any], positions: npt.NDArray[Any], size: Size | None = None
    ) -> dict[str, Tensor]:
        """Read samples by folder and position, all from the bucket with this ``size`` in pixels.

        Returns:
            ``image_latents`` (b, c, h, w) and ``caption_latents`` (b, 1, l, d); for ragged text states also
            ``caption_mask``, bool (b, l), True at tokens; with ``size_conditions`` also these, int64 (b, 6);
            with ``image_features`` also these, (b, n, d).
        """
        parts, places = [], []
        for number in np.unique(folders):
            chosen = np.flatnonzero(folders == number)
            parts.append(self._part(epoch, int(number), positions[chosen].tolist(), size))
            places.append(chosen)
        if not parts:
            return self._part(epoch, 0, [], size)
        return parts[0] if len(parts) == 1 else _merged(parts, np.concatenate(places))

    def _part(self, epoch: int, number: int, positions: list[int], size: Size | None) -> dict[str, Tensor]:
        folder = self.folders[number]
        layout = folder.layout
        which = self._captions(folder, epoch, positions)
        features = folder.features_column(self.column) if self.image_features else ""
        raw = folder.read(positions, [self.column, _TEXT, *([features] if features else [])], size, which)
        noise = None
        if layout.latent == "moments":
            shape = layout.image_shape(self.column, size)
            noise = torch.empty(0, *shape)
            if positions:
                noise = _noise(shape, self.seed, epoch, [(number, at) for at in positions])
        image = layout.image(raw[self.column], self.column, noise, size)
        batch = {"image_latents": image, "caption_latents": layout.text(raw[_TEXT])[:, None]}
        tokens = None
        if any(text_storage.is_ragged(other.layout.storage) for other in self.folders):
            tokens = torch.from_numpy(folder.tokens(positions, captions=which))[:, None]
        if self.captions == "all":
            more, tokens = self._all_captions(folder, positions, batch["caption_latents"], tokens)
            batch |= more
        if tokens is not None:
            mask = torch.arange(layout.shapes[_TEXT][0]) < tokens[:, :, None]
            batch["caption_mask"] = mask if self.captions == "all" else mask[:, 0]
        if self.size_conditions:
            batch["size_conditions"] = folder.size_conditions(positions, self.column)
        if features:
            batch["image_features"] = layout.image_features(raw[features], features, size)
        return batch

    def _captions(self, folder: LatentFolder, epoch: int, positions: list[int]) -> list[int] | None:
        """Index of the caption used for each sample; None: the first."""
        if self.captions != "draw":
            return None
        return drawn_captions(folder, positions, [epoch] * len(positions), self.caption_weights, self.seed)

    def _all_captions(
        self, folder: LatentFolder, positions: list[int], first: Tensor, tokens: Tensor | None
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Text states of all captions, ``caption_latents`` (b, n, l, d), zero-padded to the largest number n of
        captions, with ``caption_counts`` (b,); and for ragged ones the ``tokens`` (b, n).

        Args:
            first: states of the first captions, (b, 1, l, d).
            tokens: number of tokens of the first captions, (b, 1).
        """
        counts = np.array([len(folder.caption_sources(at)) for at in positions], np.int64)
        most = int(counts.max(initial=1))
        texts = first.new_zeros((len(positions), most, *first.shape[2:]))
        texts[:, :1] = first
        lengths = None
        if tokens is not None:
            lengths = tokens.new_zeros((len(positions), most))
            lengths[:, :1] = tokens
        for number in range(1, most):
            places = np.flatnonzero(counts > number)
            there = [positions[place] for place in places]
            which = [number] * len(there)
            at = torch.from_numpy(places)
            texts[at, number] = folder.layout.text(folder.read(there, [_TEXT], None, which)[_TEXT])
            if lengths is not None:
                lengths[at, number] = torch.from_numpy(folder.tokens(there, captions=which))
        return {"caption_latents": texts, "caption_counts": torch.from_numpy(counts)}, lengths


def _noise(shape: tuple[int, ...], seed: int, epoch: int, samples: Sequence[tuple[int, int]]) -> Tensor:
    """Standard normal noise, float32 (b, *shape), keyed by seed, epoch, folder and position."""
    return torch.from_numpy(np.stack([normals(shape, seed, "moments", epoch, *sample) for sample in samples]))


def _padded(name: str, tensor: Tensor, captions: int) -> Tensor:
    """Pad a tensor of a batch to ``captions`` captions per sample, if it has a caption dimension."""
    if name not in ("caption_latents", "caption_mask"):
        return tensor
    missing = (len(tensor), captions - tensor.shape[1], *tensor.shape[2:])
    return torch.cat([tensor, tensor.new_zeros(missing)], 1)


def _merged(parts: list[dict[str, Tensor]], places: npt.NDArray[Any]) -> dict[str, Tensor]:
    back = torch.from_numpy(np.argsort(places))
    if "caption_counts" in parts[0]:
        most = max(part["caption_latents"].shape[1] for part in parts)
        parts = [{name: _padded(name, tensor, most) for name, tensor in part.items()} for part in parts]
    return {name: torch.cat([part[name] for part in parts])[back] for name in parts[0]}


def build_streaming_latents_dataloader(
    datadir: str | Path | Sequence[str | Path],
    batch_size: int,
    image_size: int = 256,
    cap_seq_size: int = 77,
    cap_emb_dim: int = 1024,
    cap_drop_prob: float = 0.0,
    shuffle: bool = True,
    drop_last: bool = True,
    *,
    weights: Sequence[float] = (),
    seed: int = 0,
    rank: int | None = None,
    world_size: int | None = None,
    cache: str | Path = "",
    cache_limit: int = 0,
    latent_shape: Sequence[int] = (),
    dtype: str = "",
    buckets: bool = False,
    balance: str = "samples",
    size_conditions: bool = False,
    image_features: bool = False,
    captions: str = "draw",
    caption_weights: Mapping[str, float] | None = None,
    **options: Any,
) -> LatentLoader:
    """Return a loader of latents that can replace the one in micro_diffusion's training code.

    Args:
        datadir: Folder or list of folders; a URL (``s3://…``, ``gs://…``, ``hf://…``, …) is a remote folder, whose
            shards are downloaded to ``cache`` as they are needed.
        batch_size: Number of samples per batch of this rank.
        image_size: Selects the column ``latents_<image_size>``.
        cap_seq_size, cap_emb_dim: Shape of the text states, checked against the stored shape.
        cap_drop_prob: Fraction of captions to drop.
        weights: Proportions of several folders; by default, each sample is used once per epoch.
        rank, world_size: By default, those of torch.distributed or of the launcher when an epoch begins.
        cache, cache_limit: Local folder for remote shards, shared by the processes of a machine, and the number of
            bytes that it may hold (0: 64 GiB, or ``LATENTMILL_CACHE_BYTES``).
        latent_shape, dtype: Of latents in a folder that was not made by stage=precompute; by default, those of an
            autoencoder that downsamples by 8, in float16.
        buckets: For latents made with ``aspect=buckets``: each batch has one shape, but shapes differ between batches.
            Folders with square latents are one bucket.
        balance: With buckets, ``samples`` (all batches have ``batch_size``) or ``tokens``: see :class:`BucketLoader`.
        size_conditions: Whether batches have ``size_conditions``, int64 (b, 6): see
            :meth:`LatentFolder.size_conditions`.
        image_features: For latents made with ``image_features=``: batches also have ``image_features`` (b, n, d) of
            n patches, row by row, of the same part of each image.
        captions: For latents made with ``encode_captions=all``: ``draw`` one of a sample's captions in each epoch,
            keyed by the seed and the sample's key; use the ``first``; or use ``all``: then ``caption_latents`` are
            (b, n, l, d), zero-padded to the largest number n of captions, with ``caption_counts`` (b,) and masks
            (b, n, l).
        caption_weights: Weights with which captions of each source are drawn, as ``{"original": 1, "recaption": 3}``;
            by default, all captions of a sample are equally likely.
        options: ``pin_memory`` and ``prefetch`` (number of batches to read ahead) of :class:`LatentLoader`; or, as for
            torch's DataLoader, ``num_workers`` and ``prefetch_factor``, whose product is ``prefetch``, and
            ``persistent_workers``, which has no effect, as a thread reads.

    Raises:
        ConfigError: A folder is missing or not finished, its latents are missing or have a different shape, or an
            argument is invalid.
    """
    places = [datadir] if isinstance(datadir, str | Path) else list(datadir)
    if not places or (weights and (len(weights) != len(places) or min(weights) <= 0)):
        raise ConfigError(f"weights={list(weights)}: give a positive one for each of {len(places)} folders")
    expected = Expected((cap_seq_size, cap_emb_dim), tuple(latent_shape), dtype)
    folders = [open_latents(place, expected, cache, cache_limit) for place in places]
    columns = {folder.column_of(image_size) for folder in folders}
    shapes = {folder.layout.image_shape(column) for folder in folders for column in columns}
    if len(shapes) > 1:
        raise ConfigError(f"the folders' latents differ in shape: {', '.join(map(str, sorted(shapes)))}")
    far = any("://" in str(place) for place in places)
    if captions not in CHOICES:
        raise ConfigError(f"captions={captions}: {nearest(captions, CHOICES)}")
    if caption_weights and captions != "draw":
        raise ConfigError(f"caption_weights have no effect with captions={captions}")
    drawn = caption_weights_for(caption_weights or {}, folders)
    column = columns.pop()
    if image_features:
        _check_features(folders, column)
    dataset = LatentDataset(
        folders,
        column,
        seed,
        size_conditions=size_conditions,
        image_features=image_features,
        captions=captions,
        caption_weights=drawn,
    )
    if buckets:
        order = BucketSlots(tuple(dataset.indexes), seed, shuffle, tuple(weights), far)
        given = (batch_size, cap_drop_prob, drop_last, rank, world_size)
        return BucketLoader(dataset, order, *given, **_ahead(options), balance=balance, resolution=image_size)
    for folder in folders:
        if dataset.column in folder.layout.buckets:
            raise ConfigError(f"{folder.name}: its latents have several shapes: give buckets=True")
    if balance != "samples":
        raise ConfigError(f"balance={balance}: needs buckets=True")
    blocks = tuple(tuple(folder.starts.tolist()) for folder in folders) if far else ()
    slots = Slots(tuple(len(folder) for folder in folders), seed, shuffle, tuple(weights), blocks)
    return LatentLoader(dataset, slots, batch_size, cap_drop_prob, drop_last, rank, world_size, **_ahead(options))


def _check_features(folders: Sequence[LatentFolder], column: str) -> None:
    """Raises ConfigError unless all folders have image features of the same patches by the same encoder."""
    first = None
    for folder in folders:
        name, encoder = folder.features_column(column), folder.layout.features
        weights = encoder.get("weights_xxh3") or encoder["name"]
        found = {"weights": weights, "width": encoder["width"], **folder.layout.patches[name].describe()}
        first = first or found
        if wrong := [f"{key} {found[key]}, not {first[key]}" for key in found if found[key] != first[key]]:
            raise ConfigError(f"{folder.name}: its image features have {', '.join(wrong)} as in {folders[0].name}")


def open_latents(
    place: str | Path, expected: Expected | None = None, cache: str | Path = "", cache_limit: int = 0
) -> LatentFolder:
    """Open a local or remote folder of latents; raises ConfigError as :class:`LatentFolder` does, or if the cache is
    too small for the shards that are needed at a time."""
    if "://" not in str(place):
        return LatentFolder(place, expected)
    from pipeline.loading.streaming import RemoteFolder

    folder = RemoteFolder(str(place), expected, cache, cache_limit)
    folder.check_cache(shuffle_window(len(folder), len(folder.starts) - 1))
    return folder


def _ahead(options: Mapping[str, Any]) -> dict[str, Any]:
    """``pin_memory`` and ``prefetch`` from our own options or DataLoader's.

    Raises:
        ConfigError: an option is not supported.
    """
    known = {name: options[name] for name in ("pin_memory", "prefetch") if name in options}
    workers, factor = options.get("num_workers"), options.get("prefetch_factor")
    if "prefetch" not in known and (workers or factor):
        known["prefetch"] = max(1, workers or 1) * (factor or 2)
    for name in options:
        if name not in (*_KNOWN, *_IGNORED):
            raise ConfigError(f"{name}={options[name]}: {nearest(name, (*_KNOWN, *_IGNORED))}")
    return known
