"""Batches of stored latents for training, from local disks and from elsewhere.

Any folder of MDS shards with an ``index.json`` can be read; of a dataset directory, shapes, dtypes and how captions are
stored come from its manifest.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.config.cli import nearest
from pipeline.config.schema import ConfigError
from pipeline.distributed import find_place
from pipeline.loading import Epochs, Mixture, Parts, ShardLocal, Stream, order, sequential
from pipeline.loading.latent_folder import TEXT as _TEXT
from pipeline.loading.latent_folder import Expected, LatentFolder, Layout
from pipeline.loading.prefetch import Ahead
from pipeline.randomness import keyed_seed, normals, uniforms

__all__ = [
    "Expected",
    "LatentDataset",
    "LatentFolder",
    "LatentLoader",
    "Layout",
    "Slots",
    "TrainingLatents",
    "build_streaming_latents_dataloader",
]

_BLOCK = 1024  # slots that random numbers are drawn for at once
_MIXED = 1 << 15  # samples that are shuffled among each other where shards come from elsewhere, at least
_KNOWN = ("pin_memory", "prefetch", "num_workers", "prefetch_factor")
_IGNORED = ("persistent_workers",)  # of DataLoader: there are no worker processes that could end


@dataclass
class TrainingLatents:
    """What the training loop reads: one resolution of a folder as float32, moments as they are stored."""

    folder: LatentFolder
    resolution: int

    def __len__(self) -> int:
        return len(self.folder)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.folder.layout.image_shape(self.folder.column_of(self.resolution))

    def batch(self, positions: np.ndarray) -> dict[str, Tensor]:
        """``image_latents`` (b, c, h, w), moments (b, 2c, h, w), and ``caption_latents`` (b, l, d), both float32."""
        column, layout = self.folder.column_of(self.resolution), self.folder.layout
        raw = self.folder.read(positions.tolist(), [column, _TEXT])
        image = raw[column].view(getattr(torch, layout.dtype)).reshape(-1, *layout.shapes[column])
        return {"image_latents": image.float(), "caption_latents": layout.text(raw[_TEXT]).float()}


# ---- which samples


@dataclass(frozen=True)
class Slots:
    """Which sample of which folder stands in each slot of an epoch; an epoch has as many slots as there are samples.

    Without weights every sample stands in an epoch once. With weights, each 1024 slots hold the folders in these
    shares, and each folder is gone through again and again, every sample once per round.

    Attributes:
        sizes: samples of each folder.
        blocks: of each folder the first sample of each shard, and the number of all at the end: samples are then
            shuffled within a window of shards, so that few shards are needed at a time. Empty: shuffled as a whole.
    """

    sizes: tuple[int, ...]
    seed: int
    shuffle: bool = True
    weights: tuple[float, ...] = ()
    blocks: tuple[tuple[int, ...], ...] = ()

    def __len__(self) -> int:
        return sum(self.sizes)

    def samples(self, epoch: int, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Folder and position (int64 both) of each of the ``slots`` of ``epoch``."""
        return self._parts.locate(self._stream.samples(epoch * len(self) + slots))

    @property
    def order(self) -> str:
        """Name of the order where it is not the usual one: a position in one order means nothing in another."""
        if not self.shuffle:
            return "sequential"
        return repr([ShardLocal(starts) for starts in self.blocks]) if self.blocks else ""

    @cached_property
    def _parts(self) -> Parts:
        return Parts(self.sizes)

    @cached_property
    def _stream(self) -> Stream:
        if not self.weights:
            firsts = self._parts.starts.tolist()
            starts = [first + start for first, own in zip(firsts, self.blocks, strict=False) for start in own[:-1]]
            return self._epochs(len(self), self.seed, [*starts, len(self)])
        rounds = [
            self._epochs(n, keyed_seed(self.seed, "folder", number), self.blocks[number] if self.blocks else ())
            for number, n in enumerate(self.sizes)
        ]
        return Mixture(rounds, self.weights, self.seed, _BLOCK)

    def _epochs(self, n: int, seed: int, starts: Sequence[int]) -> Epochs:
        if not self.shuffle:
            return Epochs(n, seed, sequential)
        if not self.blocks:
            return Epochs(n, seed, order)
        window = max(8, -(-_MIXED * (len(starts) - 1) // n))
        return Epochs(n, seed, ShardLocal(starts, window))


@lru_cache(maxsize=8)
def _uniforms(seed: int, epoch: int, block: int) -> np.ndarray:
    return uniforms(_BLOCK, seed, "drop", epoch, block)


# ---- the samples


@dataclass
class LatentDataset:
    """The samples of all folders, one folder after the other: a map-style dataset.

    Attributes:
        column: which latents, ``latents_<image_size>``.
        seed: of the samples that are drawn where moments are stored, with ``epoch``.
    """

    folders: Sequence[LatentFolder]
    column: str
    seed: int = 0
    epoch: int = 0

    def __len__(self) -> int:
        """Samples of all folders."""
        return int(self._parts.starts[-1])

    @cached_property
    def _parts(self) -> Parts:
        return Parts([len(folder) for folder in self.folders])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """``image_latents`` (c, h, w), ``caption_latents`` (1, l, d) and ``drop_caption_mask`` (), which is 1."""
        number = int(index) + len(self) if index < 0 else int(index)
        if not 0 <= number < len(self):
            raise IndexError(f"there is no sample {index}: the dataset has {len(self)}")
        batch = self.batch(self.epoch, *self._parts.locate(np.array([number])))
        return {**{name: tensor[0] for name, tensor in batch.items()}, "drop_caption_mask": torch.tensor(1.0)}

    def batch(self, epoch: int, folders: np.ndarray, positions: np.ndarray) -> dict[str, Tensor]:
        """``image_latents`` (b, c, h, w) and ``caption_latents`` (b, 1, l, d) of samples by folder and position."""
        parts, places = [], []
        for number in np.unique(folders):
            chosen = np.flatnonzero(folders == number)
            parts.append(self._part(epoch, int(number), positions[chosen].tolist()))
            places.append(chosen)
        if not parts:
            return self._part(epoch, 0, [])
        return parts[0] if len(parts) == 1 else _merged(parts, np.concatenate(places))

    def _part(self, epoch: int, number: int, positions: list[int]) -> dict[str, Tensor]:
        folder = self.folders[number]
        layout = folder.layout
        raw = folder.read(positions, [self.column, _TEXT])
        noise = None
        if layout.latent == "moments":
            noise = torch.empty(0, *layout.image_shape(self.column))
            if positions:
                noise = _noise(layout.image_shape(self.column), self.seed, epoch, [(number, at) for at in positions])
        image = layout.image(raw[self.column], self.column, noise)
        return {"image_latents": image, "caption_latents": layout.text(raw[_TEXT])[:, None]}


def _noise(shape: tuple[int, ...], seed: int, epoch: int, samples: Sequence[tuple[int, int]]) -> Tensor:
    """Standard normal float32 (b, *shape), keyed by seed, epoch, folder and position."""
    return torch.from_numpy(np.stack([normals(shape, seed, "moments", epoch, *sample) for sample in samples]))


def _merged(parts: list[dict[str, Tensor]], places: np.ndarray) -> dict[str, Tensor]:
    back = torch.from_numpy(np.argsort(places))
    return {name: torch.cat([part[name] for part in parts])[back] for name in parts[0]}


# ---- the loader


@dataclass
class LatentLoader:
    """Batches of latents, read ahead by a thread; each ``iter()`` gives one epoch, in an order of its own.

    It is used as torch's DataLoader is: an epoch that was left early is not gone on with, the next ``iter()`` begins
    the next one; only :meth:`load_state_dict` makes it go on where a state was taken. The batches of all ranks together
    are consecutive slots of the epoch; each rank has its part. So the state, one number of slots, means the same under
    any number of ranks.

    Attributes:
        batch_size: samples per batch of this rank.
        drop_last: leave out the last samples of an epoch that do not fill a batch on every rank. Without it every rank
            gets the same number of batches too; the last ones are then smaller, and where there are fewer samples than
            ranks left, a batch of some ranks has none, (0, c, h, w).
        epoch: the epoch that the next batch is of.
        position: slots of this epoch that all ranks have been through.
    """

    dataset: LatentDataset
    slots: Slots
    batch_size: int
    cap_drop_prob: float = 0.0
    drop_last: bool = True
    rank: int | None = None
    world_size: int | None = None
    prefetch: int = 4
    pin_memory: bool = False
    epoch: int = 0
    position: int = 0
    _going_on: bool = field(default=False, repr=False)
    _newest: int = field(default=0, repr=False)

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("prefetch", 1), ("world_size", 1)):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or int(value) != value or value < least):
                raise ConfigError(f"{name}={value}: must be a whole number of at least {least}")
        if (self.rank is None) != (self.world_size is None):
            raise ConfigError(f"rank={self.rank}, world_size={self.world_size}: give both, or none")
        if self.rank is not None and not 0 <= self.rank < (self.world_size or 1):
            raise ConfigError(f"rank={self.rank}: must be from 0 to {(self.world_size or 1) - 1}, as world_size says")
        if not 0 <= self.cap_drop_prob <= 1:
            raise ConfigError(f"cap_drop_prob={self.cap_drop_prob}: must be from 0 to 1")

    def place(self) -> tuple[int, int]:
        """Rank and world size: as given, else those of torch.distributed, else the launcher's, now."""
        if self.rank is not None and self.world_size is not None:
            return self.rank, self.world_size
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        here = find_place(os.environ)
        return here.rank, here.world_size

    def __len__(self) -> int:
        """Batches of a whole epoch, on every rank."""
        step = self.batch_size * self.place()[1]
        return len(self.slots) // step if self.drop_last else -(-len(self.slots) // step)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """An epoch, or the rest of the one that a loaded state is of: ``image_latents`` (b, c, h, w),
        ``caption_latents`` (b, 1, l, d), ``drop_caption_mask`` (b,), 0 where the caption is to be hidden, else 1."""
        epoch, position = (self.epoch + 1, 0) if self.position and not self._going_on else (self.epoch, self.position)
        self._newest += 1
        mine = self._newest
        if not len(self):
            raise ConfigError(
                f"batch_size={self.batch_size} on {self.place()[1]} ranks is more than the {len(self.slots)} samples: "
                "give a smaller one, or drop_last=False"
            )
        with closing(Ahead(self._batches(epoch, position), self.prefetch)) as batches:
            for stop, batch in batches:
                self._reached(mine, epoch, stop)
                yield batch
        self._reached(mine, epoch, len(self.slots))  # also where nothing was left of a state's epoch

    def _reached(self, iterator: int, epoch: int, stop: int) -> None:
        """Keep the state, which is that of the iterator that was made last."""
        if iterator == self._newest:
            self.epoch, self.position = (epoch + 1, 0) if stop == len(self.slots) else (epoch, stop)
            self._going_on = False

    def _batches(self, epoch: int, position: int) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Batches, each with the slot at which what is handed out with it ends: the last with that of the epoch."""
        rank, world_size = self.place()
        total, step = len(self.slots), self.batch_size * world_size
        required = position
        while position + step <= total if self.drop_last else position < total:
            stop = self._stop(position, world_size)
            required = self._require(epoch, required, stop)
            first, last = (position + (stop - position) * r // world_size for r in (rank, rank + 1))
            left = total - stop
            over = left < step if self.drop_last else not left
            yield total if over else stop, self._batch(epoch, np.arange(first, last))
            position = stop

    def _stop(self, position: int, world_size: int) -> int:
        """Where the global batch that begins at ``position`` ends: it leaves none, or enough for all ranks."""
        total = len(self.slots)
        stop = min(position + self.batch_size * world_size, total)
        missing = world_size - (total - stop)
        if not self.drop_last and 0 < missing < world_size <= stop - position - missing:
            stop -= missing
        return stop

    def _require(self, epoch: int, first: int, stop: int) -> int:
        """Have the shards from elsewhere that hold the slots from ``first`` to some way behind ``stop`` brought here;
        where these end."""
        if not self.slots.blocks:
            return first
        last = min(stop + _MIXED, len(self.slots))
        folders, positions = self.slots.samples(epoch, np.arange(first, last))
        for number in np.unique(folders):
            self.dataset.folders[number].require(positions[folders == number])
        return max(first, last)

    def _batch(self, epoch: int, slots: np.ndarray) -> dict[str, Tensor]:
        batch = self.dataset.batch(epoch, *self.slots.samples(epoch, slots))
        drawn = np.array([_uniforms(self.slots.seed, epoch, int(s) // _BLOCK)[s % _BLOCK] for s in slots])
        batch["drop_caption_mask"] = torch.from_numpy((drawn >= self.cap_drop_prob).astype(np.float32))
        return {name: tensor.pin_memory() for name, tensor in batch.items()} if self.pin_memory else batch

    # ---- where it stands

    def set_epoch(self, epoch: int) -> None:
        """Let the next ``iter()`` give this epoch: from its beginning, unless a state of just this epoch was loaded."""
        if epoch < 0:
            raise ValueError(f"epoch={epoch}: must be at least 0")
        if not (self._going_on and epoch == self.epoch):
            self.epoch, self.position, self._going_on = int(epoch), 0, False
            self._newest += 1

    def state_dict(self) -> dict[str, Any]:
        """Where the batches that were handed out end; the same on every rank."""
        state = {
            "seed": self.slots.seed,
            "samples": len(self.slots),
            "epoch": self.epoch,
            "position": self.position,
        }
        return state | ({"order": self.slots.order} if self.slots.order else {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next ``iter()`` go on where ``state`` was taken, on any number of ranks.

        Raises:
            ValueError: it was taken with other data, another seed or another order.
        """
        own = self.state_dict()
        for name in ("seed", "samples", "order"):
            if state.get(name) != own.get(name) and not (name not in state and not self.slots.blocks):
                raise ValueError(
                    f"cannot go on: the state has {name}={state.get(name)}, this loader {name}={own.get(name)}"
                )
        self.epoch, self.position, self._going_on = state["epoch"], state["position"], True
        self._newest += 1


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
    latent_shape: Sequence[int] = (),
    dtype: str = "",
    **options: Any,
) -> LatentLoader:
    """A loader of latents that micro_diffusion's training code takes as its own.

    Args:
        datadir: a folder, or several; with ``://`` in it, a place elsewhere (``s3://…``, ``gs://…``, ``hf://…``, …),
            whose shards are brought to ``cache`` as they are needed.
        batch_size: samples per batch of this rank.
        image_size: which ``latents_<image_size>``.
        cap_seq_size, cap_emb_dim: shape of the text states, checked against what is stored.
        cap_drop_prob: fraction of captions to hide.
        weights: shares of several folders; none: each sample once per epoch.
        rank, world_size: those of torch.distributed, or the launcher's, when an epoch begins, by default.
        cache: local folder for shards from elsewhere.
        latent_shape, dtype: of latents in a folder that was not made by stage=precompute: by default those of an
            autoencoder that makes images 8 times smaller, in float16.
        options: ``pin_memory`` and ``prefetch`` (batches to read ahead) of :class:`LatentLoader`; or, as for torch's
            DataLoader, ``num_workers`` and ``prefetch_factor``, whose product is ``prefetch``, and
            ``persistent_workers``, which changes nothing as a thread reads.

    Raises:
        ConfigError: a folder is missing or not finished, has no such latents, or ones of another shape; an argument is
            wrong.
    """
    places = [datadir] if isinstance(datadir, str | Path) else list(datadir)
    if not places or (weights and (len(weights) != len(places) or min(weights) <= 0)):
        raise ConfigError(f"weights={list(weights)}: give a positive one for each of {len(places)} folders")
    expected = Expected((cap_seq_size, cap_emb_dim), tuple(latent_shape), dtype)
    folders = [_opened(place, expected, cache) for place in places]
    columns = {folder.column_of(image_size) for folder in folders}
    shapes = {folder.layout.image_shape(column) for folder in folders for column in columns}
    if len(shapes) > 1:
        raise ConfigError(f"the folders' latents differ in shape: {', '.join(map(str, sorted(shapes)))}")
    far = any("://" in str(place) for place in places)
    blocks = tuple(tuple(folder.starts.tolist()) for folder in folders) if far else ()
    slots = Slots(tuple(len(folder) for folder in folders), seed, shuffle, tuple(weights), blocks)
    dataset = LatentDataset(folders, columns.pop(), seed)
    return LatentLoader(dataset, slots, batch_size, cap_drop_prob, drop_last, rank, world_size, **_ahead(options))


def _opened(place: str | Path, expected: Expected, cache: str | Path) -> LatentFolder:
    if "://" not in str(place):
        return LatentFolder(place, expected)
    from pipeline.loading.streaming import RemoteFolder

    return RemoteFolder(str(place), expected, cache)


def _ahead(options: Mapping[str, Any]) -> dict[str, Any]:
    """``pin_memory`` and ``prefetch`` of DataLoader's options or our own.

    Raises:
        ConfigError: an option that has no meaning here.
    """
    known = {name: options[name] for name in ("pin_memory", "prefetch") if name in options}
    workers, factor = options.get("num_workers"), options.get("prefetch_factor")
    if "prefetch" not in known and (workers or factor):
        known["prefetch"] = max(1, workers or 1) * (factor or 2)
    for name in options:
        if name not in (*_KNOWN, *_IGNORED):
            raise ConfigError(f"{name}={options[name]}: {nearest(name, (*_KNOWN, *_IGNORED))}")
    return known
