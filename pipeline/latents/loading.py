"""Batches of stored latents for training: from local disks without copies in between, from elsewhere by streaming.

Any folder of MDS shards with an ``index.json`` can be read; of a dataset directory, shapes, dtypes and how captions are
stored come from its manifest.
"""

from __future__ import annotations

import json
import os
import struct
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.cli import nearest
from pipeline.config import ConfigError
from pipeline.encoders.base import sampled
from pipeline.latents import text_storage
from pipeline.latents.ahead import Ahead
from pipeline.loading import Epochs, Mixture, Parts, Stream, order, sequential
from pipeline.partitions.dataset import Dataset
from pipeline.randomness import keyed_seed, normals, uniforms

_OPEN_FILES = 4096
_BLOCK = 1024  # slots that random numbers are drawn for at once
_IMAGE, _TEXT, _BACK = "latents_", "caption_latents", "caption_back"


@dataclass(frozen=True)
class Layout:
    """How the latents of a folder are stored.

    Attributes:
        shapes: by column.
        dtype: of latents, and of text states that are not packed.
        latent: sample, mode or moments.
        storage: of text states, see :mod:`pipeline.latents.text_storage`.
    """

    shapes: Mapping[str, tuple[int, ...]]
    dtype: str = "float16"
    latent: str = "sample"
    storage: str = "dense"

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> Layout:
        shapes = {name: tuple(shape) for name, shape in manifest["shapes"].items()}
        storage = manifest.get("text_storage", {}).get("kind", "dense")
        return cls(shapes, manifest["dtype"], manifest.get("latent", "sample"), storage)

    def bytes_of(self, column: str) -> int:
        shape = self.shapes[column]
        if column.startswith(_TEXT):
            return text_storage.size_of(shape, self.storage, self.dtype)
        return int(np.prod(shape)) * np.dtype(self.dtype).itemsize

    def image_shape(self, column: str) -> tuple[int, int, int]:
        """(c, h, w) of the latents that training sees."""
        channels, height, width = self.shapes[column]
        return (channels // 2 if self.latent == "moments" else channels, height, width)

    def image(self, raw: Tensor, column: str, noise: Tensor | None) -> Tensor:
        """uint8 (b, bytes) → (b, c, h, w)."""
        values = raw.view(getattr(torch, self.dtype)).reshape(-1, *self.shapes[column])
        return sampled(values.float(), noise).to(values.dtype) if self.latent == "moments" else values

    def text(self, raw: Tensor, column: str = _TEXT) -> Tensor:
        """uint8 (b, bytes) → (b, l, d)."""
        return text_storage.unpack(raw, self.shapes[column], self.storage, self.dtype)


class LatentFolder:
    """Stored latents in a local folder, by position; a column's bytes go from the page cache to the batch in one copy.

    Args:
        layout: of a folder that is no dataset directory.

    Raises:
        ConfigError: there is no such folder, it is not finished, or is of another format.
    """

    def __init__(self, path: str | Path, layout: Layout | None = None) -> None:
        self.path = Path(path)
        if (self.path / "plan").is_dir():
            dataset = Dataset.open(self.path)
            dataset.require_success()
            if "shapes" not in dataset.header["extra"]:
                raise ConfigError(f"{path} holds no latents: it is made by stage={dataset.stage}")
            layout = Layout.of(dataset.header["extra"])
        try:
            index = json.loads((self.path / "index.json").read_text())
        except OSError as error:
            raise ConfigError(f"{path}: no MDS folder: index.json: {error.strerror}") from None
        if layout is None:
            raise ConfigError(f"{path} is no dataset directory: say what the shapes are")
        self.layout = layout
        shards = index["shards"]
        if any(shard["zip_data"] for shard in shards):
            raise ConfigError(f"{path}: its shards are compressed: read it through StreamingDataset")
        self._files = [shard["raw_data"]["basename"] for shard in shards]
        self._starts = np.cumsum([0, *(shard["samples"] for shard in shards)])
        self._open: OrderedDict[int, np.ndarray] = OrderedDict()
        sizes = shards[0]["column_sizes"] if shards else []
        self.columns: list[str] = shards[0]["column_names"] if shards else []
        self._sizes: list[tuple[str, int | None]] = list(zip(self.columns, sizes, strict=True))
        self._head = struct.Struct(f"<{sum(size is None for size in sizes)}I")

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        """For worker processes, which open the files themselves."""
        return {**self.__dict__, "_open": OrderedDict(), "_head": self._head.format}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _head=struct.Struct(state["_head"]))

    def read(self, positions: Sequence[int], columns: Sequence[str]) -> dict[str, Tensor]:
        """The bytes of ``columns`` at ``positions``: uint8 (b, bytes) each.

        Raises:
            ValueError: a sample's bytes are not of the size that the layout says; names its key.
        """
        wanted = {column: self.layout.bytes_of(column) for column in columns}
        batch = {column: np.empty((len(positions), size), np.uint8) for column, size in wanted.items()}
        for place, position in enumerate(positions):
            data, spans = self._spans(int(position))
            for column, size in wanted.items():
                start, stop = spans[column]
                source = data
                if start == stop and column.startswith(_TEXT) and _BACK in spans:
                    back = int(data[slice(*spans[_BACK])].view(np.int64)[0])
                    source, home = self._spans(int(position) - back)
                    start, stop = home[column]
                if stop - start != size:
                    raise ValueError(
                        f"{self.path}: sample {self.key(int(position))!r}: {column} has {stop - start} bytes, "
                        f"expected {size} for {self.layout.shapes[column]}"
                    )
                batch[column][place] = source[start:stop]
        return {column: torch.from_numpy(values) for column, values in batch.items()}

    def key(self, position: int) -> str:
        data, spans = self._spans(position)
        return bytes(data[slice(*spans["key"])]).decode(errors="replace") if "key" in spans else str(position)

    def _spans(self, position: int) -> tuple[np.ndarray, dict[str, tuple[int, int]]]:
        """The file that holds the sample, and where its columns lie in it."""
        number = int(np.searchsorted(self._starts, position, "right")) - 1
        data = self._file(number)
        at = int(data[4 + 4 * (position - int(self._starts[number])) :][:4].view(np.uint32)[0])
        sizes = iter(self._head.unpack_from(data.data, at))
        at += self._head.size
        spans = {}
        for name, fixed in self._sizes:
            size = next(sizes) if fixed is None else fixed
            spans[name] = (at, at + size)
            at += size
        return data, spans

    def _file(self, number: int) -> np.ndarray:
        if number not in self._open:
            self._open[number] = np.memmap(self.path / self._files[number], np.uint8, "r").view(np.ndarray)
            if len(self._open) > _OPEN_FILES:
                self._open.popitem(last=False)
        return self._open[number]

    def column_of(self, image_size: int) -> str:
        """Raises ConfigError where there are no latents of that size."""
        column = f"{_IMAGE}{image_size}"
        if column not in self.columns:
            sizes = [name[len(_IMAGE) :] for name in self.columns if name.startswith(_IMAGE)]
            raise ConfigError(f"image_size={image_size}: {self.path} has {nearest(str(image_size), sizes)}")
        return column


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


def _noise(shape: tuple[int, ...], seed: int, epoch: int, samples: Sequence[tuple[int, int]]) -> Tensor:
    """Standard normal float32 (b, *shape), keyed by seed, epoch, folder and position."""
    return torch.from_numpy(np.stack([normals(shape, seed, "moments", epoch, *sample) for sample in samples]))


# ---- which samples


@dataclass(frozen=True)
class Slots:
    """Which sample of which folder stands in each slot of an epoch; an epoch has as many slots as there are samples.

    Without weights every sample stands in an epoch once. With weights, each 1024 slots hold the folders in these
    shares, and each folder is gone through again and again, every sample once per round.
    """

    sizes: tuple[int, ...]
    seed: int
    shuffle: bool = True
    weights: tuple[float, ...] = ()

    def __len__(self) -> int:
        return sum(self.sizes)

    def samples(self, epoch: int, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Folder and position (int64 both) of each of the ``slots`` of ``epoch``."""
        return self._parts.locate(self._stream.samples(epoch * len(self) + slots))

    @cached_property
    def _parts(self) -> Parts:
        return Parts(self.sizes)

    @cached_property
    def _stream(self) -> Stream:
        kind = order if self.shuffle else sequential
        if not self.weights:
            return Epochs(len(self), self.seed, kind)
        rounds = [Epochs(n, keyed_seed(self.seed, "folder", number), kind) for number, n in enumerate(self.sizes)]
        return Mixture(rounds, self.weights, self.seed, _BLOCK)


@lru_cache(maxsize=8)
def _uniforms(seed: int, epoch: int, block: int) -> np.ndarray:
    return uniforms(_BLOCK, seed, "drop", epoch, block)


# ---- the loader


@dataclass
class LatentLoader:
    """Batches of one epoch after the other, read ahead by a thread.

    The batches of all ranks together are consecutive slots of the epoch; each rank has its part. So the state, one
    number of slots, means the same under any number of ranks.

    Attributes:
        batch_size: samples per batch of this rank.
        position: slots of the epoch that all ranks have been through.
    """

    folders: Sequence[LatentFolder]
    slots: Slots
    column: str
    batch_size: int
    cap_drop_prob: float = 0.0
    drop_last: bool = True
    rank: int = 0
    world_size: int = 1
    prefetch: int = 4
    pin_memory: bool = False
    epoch: int = 0
    position: int = 0
    _fields: tuple[str, ...] = field(default=("seed", "samples"), repr=False)

    @property
    def _step(self) -> int:
        return self.batch_size * self.world_size

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return len(self.slots) // self._step if self.drop_last else -(-len(self.slots) // self._step)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """The rest of the epoch: ``image_latents`` (b, c, h, w), ``caption_latents`` (b, 1, l, d),
        ``drop_caption_mask`` (b,), 0 where the caption is to be hidden, else 1."""
        with closing(Ahead(self._batches(self.epoch, self.position), self.prefetch)) as batches:
            for stop, batch in batches:
                self.position = stop
                yield batch
        self.epoch, self.position = self.epoch + 1, 0

    def _batches(self, epoch: int, position: int) -> Iterator[tuple[int, dict[str, Tensor]]]:
        total = len(self.slots)
        while position < total and (position + self._step <= total or not self.drop_last):
            stop = min(position + self._step, total)
            first, last = (position + (stop - position) * r // self.world_size for r in (self.rank, self.rank + 1))
            if first < last:
                yield stop, self._batch(epoch, np.arange(first, last))
            position = stop

    def _batch(self, epoch: int, slots: np.ndarray) -> dict[str, Tensor]:
        folders, positions = self.slots.samples(epoch, slots)
        parts, places = [], []
        for number in np.unique(folders):
            chosen = np.flatnonzero(folders == number)
            parts.append(self._part(epoch, int(number), positions[chosen].tolist()))
            places.append(chosen)
        batch = parts[0] if len(parts) == 1 else _merged(parts, np.concatenate(places))
        drawn = np.array([_uniforms(self.slots.seed, epoch, int(s) // _BLOCK)[s % _BLOCK] for s in slots])
        batch["drop_caption_mask"] = torch.from_numpy((drawn >= self.cap_drop_prob).astype(np.float32))
        return {name: tensor.pin_memory() for name, tensor in batch.items()} if self.pin_memory else batch

    def _part(self, epoch: int, number: int, positions: list[int]) -> dict[str, Tensor]:
        folder = self.folders[number]
        layout = folder.layout
        raw = folder.read(positions, [self.column, _TEXT])
        noise = None
        if layout.latent == "moments":
            samples = [(number, position) for position in positions]
            noise = _noise(layout.image_shape(self.column), self.slots.seed, epoch, samples)
        image = layout.image(raw[self.column], self.column, noise)
        return {"image_latents": image, "caption_latents": layout.text(raw[_TEXT])[:, None]}

    def state_dict(self) -> dict[str, int]:
        return {
            "seed": self.slots.seed,
            "samples": len(self.slots),
            "epoch": self.epoch,
            "position": self.position,
        }

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on where ``state`` was taken, on any number of ranks.

        Raises:
            ValueError: it was taken with other data or another seed.
        """
        own = self.state_dict()
        for name in self._fields:
            if state[name] != own[name]:
                raise ValueError(f"cannot go on: the state has {name}={state[name]}, this loader {name}={own[name]}")
        self.epoch, self.position = state["epoch"], state["position"]


def _merged(parts: list[dict[str, Tensor]], places: np.ndarray) -> dict[str, Tensor]:
    back = torch.from_numpy(np.argsort(places))
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
    **options: Any,
) -> Any:
    """A loader of latents that micro_diffusion's training code takes as its own.

    Args:
        datadir: a folder, or several; with ``://`` in it, a place that StreamingDataset reads.
        batch_size: samples per batch of this rank.
        image_size: which ``latents_<image_size>``.
        cap_seq_size, cap_emb_dim: shape of the text states, checked against the manifest.
        cap_drop_prob: fraction of captions to hide.
        weights: shares of several folders; none: each sample once per epoch.
        rank, world_size: torch.distributed's, or the launcher's, by default.
        cache: local folder for what is streamed.
        options: ``pin_memory`` and ``prefetch`` of :class:`LatentLoader`; for what is streamed, those of torch's
            ``DataLoader``.

    Raises:
        ConfigError: a folder is missing or not finished, has no such latents, or ones of another shape.
    """
    places = [datadir] if isinstance(datadir, str | Path) else list(datadir)
    if not places or (weights and (len(weights) != len(places) or min(weights) <= 0)):
        raise ConfigError(f"weights={list(weights)}: give a positive one for each of {len(places)} folders")
    foreign = Layout(
        {f"{_IMAGE}{image_size}": (4, image_size // 8, image_size // 8), _TEXT: (cap_seq_size, cap_emb_dim)}
    )
    expected = (cap_seq_size, cap_emb_dim)
    if any("://" in str(place) for place in places):
        from pipeline.latents import streaming

        return streaming.build(
            [str(place) for place in places], batch_size, image_size, expected, foreign,
            cap_drop_prob=cap_drop_prob, shuffle=shuffle, drop_last=drop_last, weights=weights, seed=seed,
            cache=cache, options=options,
        )  # fmt: skip
    folders = [LatentFolder(place, foreign) for place in places]
    columns = {folder.column_of(image_size) for folder in folders}
    shapes = {folder.layout.image_shape(column) for folder in folders for column in columns}
    if len(shapes) > 1:
        raise ConfigError(f"the folders' latents differ in shape: {', '.join(map(str, sorted(shapes)))}")
    for folder in folders:
        check_text(folder.path, folder.layout, expected)
    here = _place()
    rank, world_size = here[0] if rank is None else rank, here[1] if world_size is None else world_size
    known = {name: options.pop(name) for name in ("pin_memory", "prefetch") if name in options}
    slots = Slots(tuple(len(folder) for folder in folders), seed, shuffle, tuple(weights))
    return LatentLoader(folders, slots, columns.pop(), batch_size, cap_drop_prob, drop_last, rank, world_size, **known)


def check_text(place: object, layout: Layout, expected: tuple[int, int]) -> None:
    """Raises ConfigError unless text states are of the shape that the caller expects."""
    if layout.shapes[_TEXT] != expected:
        length, width = layout.shapes[_TEXT]
        raise ConfigError(
            f"{place}: text states are {length} x {width}: give cap_seq_size={length} and cap_emb_dim={width}"
        )


def _place() -> tuple[int, int]:
    """Rank and world size."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
