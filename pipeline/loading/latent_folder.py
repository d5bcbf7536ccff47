"""A folder of stored latents: its columns, and the conversion of their bytes to tensors."""

from __future__ import annotations

import json
import struct
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.config.cli import nearest
from pipeline.config.schema import ConfigError
from pipeline.encoders.base import sampled
from pipeline.imaging.buckets import BUCKET_COLUMNS, ORIGINAL_COLUMNS, Buckets, Size, buckets_in
from pipeline.imaging.patches import FEATURES, PatchGrid, grids_in
from pipeline.loading import text_storage
from pipeline.loading.caption_choice import TOKENS, ends_of, tokens_column
from pipeline.partitions.bucket_index import NAME as BUCKETS
from pipeline.partitions.bucket_index import BucketIndex
from pipeline.partitions.dataset import Dataset
from pipeline.samples.captions import ORIGINAL, SOURCES
from pipeline.storage import StorageError

_OPEN_FILES = 4096
_DTYPES = ("float16", "float32")
_DOWNSAMPLE = 8  # of Stable Diffusion's autoencoders, which are assumed for latents without a manifest
_LEAST_CHANNELS = 4  # of these autoencoders; fewer mean that another one was used
_EDGES = ("height", "width")
IMAGE, TEXT, BACK = "latents_", "caption_latents", "caption_back"


@dataclass(frozen=True)
class Layout:
    """How the latents of a folder are stored.

    Attributes:
        shapes: by column. With buckets, height and width are those of a square whose area no bucket exceeds, as each
            sample has its own size.
        dtype: of latents, and of text states that are not packed.
        latent: sample, mode or moments.
        storage: of text states, see :mod:`pipeline.loading.text_storage`.
        buckets: by column of latents; empty: all samples have the column's shape.
        downsample: with buckets, pixels per latent along an edge.
        sources: of captions, if the text states of all captions of a sample are stored; empty: only those of one
            caption are stored.
        patches: by column of image features. Shapes of these columns are those of squares.
        features: the manifest's entry for image features; empty: there are none.
    """

    shapes: Mapping[str, tuple[int, ...]]
    dtype: str = "float16"
    latent: str = "sample"
    storage: str = "dense"
    buckets: Mapping[str, Buckets] = field(default_factory=dict)
    downsample: int = 1
    sources: tuple[str, ...] = ()
    patches: Mapping[str, PatchGrid] = field(default_factory=dict)
    features: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> Layout:
        buckets, downsample = buckets_in(manifest), int(manifest.get("vae", {}).get("downsample", 1))
        shapes = {name: tuple(shape) for name, shape in manifest["shapes"].items()}
        for name, each in buckets.items():
            edge = each.resolution // (2 * downsample) * 2
            shapes[name] = (shapes[name][0], edge, edge)
        storage = manifest.get("text_storage", {}).get("kind", "dense")
        sources = tuple(manifest.get(SOURCES, ()))
        patches, features = grids_in(manifest), manifest.get("image_features", {})
        shapes |= {name: (grid.count(), shapes[name][1]) for name, grid in patches.items()}
        latent = manifest.get("latent", "sample")
        return cls(
            shapes, manifest["dtype"], latent, storage, buckets, downsample, sources, patches=patches, features=features
        )

    def size_in(self, row: Mapping[str, Any], column: str) -> Size | None:
        """Height and width in pixels of the bucket recorded in a stored row; None without buckets."""
        resolution = column.removeprefix(IMAGE).removeprefix(FEATURES)
        if not (column in self.buckets or (column in self.patches and self.buckets)):
            return None
        return int(row[f"height_{resolution}"]), int(row[f"width_{resolution}"])

    def shape_of(self, column: str, size: Size | None = None) -> tuple[int, ...]:
        """Stored shape of a sample; ``size``: height and width of its bucket in pixels."""
        if column in self.patches:
            return self.patches[column].count(size), self.shapes[column][1]
        if size is None or column not in self.buckets:
            return self.shapes[column]
        return (self.shapes[column][0], *(edge // self.downsample for edge in size))

    def bytes_of(self, column: str, size: Size | None = None) -> int:
        if column.startswith(TEXT):
            return text_storage.size_of(self.shapes[column], self.storage, self.dtype)
        if column in self.patches:
            return text_storage.size_of(self.shape_of(column, size), self.features["storage"], self.dtype)
        return int(np.prod(self.shape_of(column, size))) * np.dtype(self.dtype).itemsize

    def image_shape(self, column: str, size: Size | None = None) -> tuple[int, int, int]:
        """Shape (c, h, w) of the latents passed to training."""
        channels, height, width = self.shape_of(column, size)
        return (channels // 2 if self.latent == "moments" else channels, height, width)

    def image(self, raw: Tensor, column: str, noise: Tensor | None, size: Size | None = None) -> Tensor:
        """Latents as passed to training: uint8 (b, bytes) → (b, c, h, w); moments are sampled with ``noise``."""
        values = self.stored_image(raw, column, size)
        return sampled(values.float(), noise).to(values.dtype) if self.latent == "moments" else values

    def stored_image(self, raw: Tensor, column: str, size: Size | None = None) -> Tensor:
        """Latents as stored: uint8 (b, bytes) → (b, c, h, w), or (b, 2c, h, w) for moments."""
        return raw.view(getattr(torch, self.dtype)).reshape(-1, *self.shape_of(column, size))

    def text(self, raw: Tensor, column: str = TEXT) -> Tensor:
        """Unpack text states: uint8 (b, bytes) → (b, l, d)."""
        return text_storage.unpack(raw, self.shapes[column], self.storage, self.dtype)

    def image_features(self, raw: Tensor, column: str, size: Size | None = None) -> Tensor:
        """Unpack image features: uint8 (b, bytes) → (b, n, d)."""
        return text_storage.unpack(raw, self.shape_of(column, size), self.features["storage"], self.dtype)


@dataclass(frozen=True)
class Expected:
    """What a caller knows about stored latents: checked against the manifest, and required without one, as shapes
    cannot be inferred from bytes alone.

    Attributes:
        caption_shape: length and width of the text states; empty: from the manifest.
        latent_shape: (c, h, w) of the image latents; empty: from the manifest, else an eighth of the resolution with at
            least 4 channels, as many as the bytes hold.
        dtype: as stored; empty: from the manifest, else float16.
    """

    caption_shape: tuple[int, ...] = ()
    latent_shape: tuple[int, ...] = ()
    dtype: str = ""

    def __post_init__(self) -> None:
        for name, shape, sizes in (("caption_shape", self.caption_shape, 2), ("latent_shape", self.latent_shape, 3)):
            if shape and (len(shape) != sizes or min(shape) < 1):
                raise ConfigError(f"{name}={list(shape)}: expected {sizes} numbers of at least 1")
        if self.dtype and self.dtype not in _DTYPES:
            raise ConfigError(f"dtype={self.dtype}: expected one of {', '.join(_DTYPES)}")

    def check(self, place: object, layout: Layout, column: str) -> None:
        """Raises ConfigError unless a manifest's layout is as expected."""
        length, width = layout.shapes[TEXT]
        if self.caption_shape and self.caption_shape != (length, width):
            raise ConfigError(
                f"{place}: text states are {length} x {width}: give cap_seq_size={length} and cap_emb_dim={width}"
            )
        if self.latent_shape and self.latent_shape != layout.image_shape(column):
            raise ConfigError(f"{place}: {column} has the shape {layout.image_shape(column)}: leave latent_shape= out")
        if self.dtype and self.dtype != layout.dtype:
            raise ConfigError(f"{place}: latents are stored as {layout.dtype}: leave dtype= out")

    def layout(self, place: object, sizes: Mapping[str, int]) -> Layout:
        """Infer the layout of a folder without a manifest from the number of bytes per sample in each column.

        Raises:
            ConfigError: the bytes do not match what is expected; the message says what they would match.
        """
        dtype = self.dtype or "float16"
        item = np.dtype(dtype).itemsize
        if TEXT not in sizes:
            raise ConfigError(f"{place} has no column {TEXT}, only {', '.join(sizes)}: it holds no latents")
        length, width = self.caption_shape or self._usual_caption(place, sizes[TEXT], item)
        if sizes[TEXT] != length * width * item:
            raise ConfigError(
                f"{place}: text states have {sizes[TEXT]} bytes per sample, but {length} x {width} of {dtype} take "
                f"{length * width * item}: give their shape and dtype as they were stored"
            )
        shapes: dict[str, tuple[int, ...]] = {TEXT: (length, width)}
        for name, size in sizes.items():
            if name.startswith(IMAGE) and name[len(IMAGE) :].isdigit():
                shapes[name] = self._image_shape(place, name, size, dtype)
        return Layout(shapes, dtype)

    def _usual_caption(self, place: object, size: int, item: int) -> tuple[int, int]:
        """The shape of text states if none is given: CLIP's 77 tokens, if the bytes are a multiple."""
        length = 77
        if size % (length * item):
            raise ConfigError(
                f"{place}: text states have {size} bytes per sample, which is not a multiple of 77 tokens: give their "
                "shape with caption_shape=[length,width]"
            )
        return length, size // (length * item)

    def _image_shape(self, place: object, column: str, size: int, dtype: str) -> tuple[int, ...]:
        item = np.dtype(dtype).itemsize
        edge = int(column[len(IMAGE) :]) // _DOWNSAMPLE
        channels, rest = divmod(size, max(1, edge * edge * item))
        shape = self.latent_shape or (channels, edge, edge)
        if int(np.prod(shape)) * item != size or (not self.latent_shape and (rest or channels < _LEAST_CHANNELS)):
            raise ConfigError(
                f"{place}: {column} has {size} bytes per sample, which is not {_shape(shape)} of {dtype}: say what was "
                "stored with latent_shape=(channels, height, width) and dtype="
            )
        return shape


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _check_inside(place: str, name: str) -> None:
    """Raises ConfigError if the name of a shard leads out of its folder."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.name:
        raise ConfigError(f"{place}: index.json names the shard {name!r}, which is not below the folder")


class LatentFolder:
    """Stored latents in a local folder, by position; bytes are copied once, from the page cache to the batch.

    Args:
        path: a dataset directory made by stage=precompute, or any folder of MDS shards with an ``index.json``.
        expected: what is known about the latents; required if there is no manifest.

    Raises:
        ConfigError: the folder does not exist, is not finished, or does not hold the expected latents.
    """

    is_far = False
    """Whether shards have to be downloaded before they are read."""

    def __init__(self, path: str | Path, expected: Expected | None = None) -> None:
        self.path = Path(path)
        self._open: OrderedDict[int, npt.NDArray[Any]] = OrderedDict()
        manifest = self._manifest()
        self._read_index(self._index())
        expected = expected or Expected()
        if manifest is None:
            sizes = {name: stop - start for name, (start, stop) in self._spans(0)[1].items()} if len(self) else {}
            self.layout = expected.layout(self.name, sizes)
        else:
            self.layout = Layout.of(manifest)
        self.expected = expected
        self.has_manifest = manifest is not None

    @property
    def name(self) -> str:
        """Path or URL, for messages."""
        return str(self.path)

    def _manifest(self) -> Mapping[str, Any] | None:
        """Facts about the latents of a dataset directory; None for any other folder."""
        if not (self.path / "plan").is_dir():
            return None
        dataset = Dataset.open(self.path)
        dataset.require_success()
        if "shapes" not in dataset.header["extra"]:
            raise ConfigError(f"{self.path} holds no latents: it was made by stage={dataset.stage}")
        extra: Mapping[str, Any] = dataset.header["extra"]
        return extra

    def _index(self) -> dict[str, Any]:
        try:
            index: dict[str, Any] = json.loads((self.path / "index.json").read_text())
        except (OSError, ValueError) as error:
            said = error.strerror if isinstance(error, OSError) else "not JSON"
            raise ConfigError(f"{self.path}: not an MDS folder: index.json: {said}") from None
        return index

    def _read_index(self, index: Mapping[str, Any]) -> None:
        try:
            self._shards: list[dict[str, Any]] = list(index["shards"])
            if any(shard.get("format", "mds") != "mds" for shard in self._shards):
                raise ConfigError(f"{self.name}: its shards are {self._shards[0]['format']}, not mds")
            self._starts = np.cumsum([0, *(shard["samples"] for shard in self._shards)])
            first = self._shards[0] if self._shards else {"column_sizes": [], "column_names": []}
            self.columns: list[str] = list(first["column_names"])
            self._sizes: list[tuple[str, int | None]] = list(zip(self.columns, first["column_sizes"], strict=True))
            if any(shard["column_names"] != self.columns for shard in self._shards):
                raise ConfigError(f"{self.name}: its shards have different columns")
            for shard in self._shards:
                _check_inside(self.name, str(shard["raw_data"]["basename"]))
        except (KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{self.name}: index.json is not an index of MDS shards ({error!r})") from None
        if not len(self):
            raise ConfigError(f"{self.name} holds no samples")
        self._head = struct.Struct(f"<{sum(size is None for _, size in self._sizes)}I")

    @property
    def starts(self) -> npt.NDArray[Any]:
        """First sample of each shard, followed by the number of samples: int64 (shards + 1,)."""
        found: npt.NDArray[Any] = self._starts
        return found

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        """State for worker processes, which open files themselves."""
        return {**self.__dict__, "_open": OrderedDict(), "_head": self._head.format}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _head=struct.Struct(state["_head"]))

    def require(self, positions: npt.NDArray[Any]) -> None:
        """Announce that these samples will be read soon; remote shards are downloaded meanwhile."""

    def bucket_index(self, column: str) -> BucketIndex:
        """The bucket of each sample; without buckets, all samples are in one.

        Raises:
            ConfigError: the bucket index does not belong to the folder's shards.
        """
        if column not in self.layout.buckets:
            resolution = int(column[len(IMAGE) :])
            return BucketIndex.of_one((resolution, resolution), len(self))
        try:
            index = BucketIndex.parse(self._small_file(BUCKETS), column)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self.name}: {BUCKETS} cannot be read: {error}") from None
        if len(index) != len(self):
            raise ConfigError(f"{self.name}: {BUCKETS} lists {len(index)} samples, index.json {len(self)}")
        return index

    def _small_file(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def read(
        self,
        positions: Sequence[int],
        columns: Sequence[str],
        size: Size | None = None,
        captions: Sequence[int] | None = None,
    ) -> dict[str, Tensor]:
        """Read the bytes of ``columns`` at ``positions``: uint8 (b, bytes) each.

        Args:
            size: height and width in pixels of the bucket of these samples.
            captions: index of the caption whose text states are read for each sample, if several are stored; None: the
                first.

        Raises:
            ValueError: a sample's bytes do not have the size that the layout says, or it is in another bucket; the
                message names its key.
        """
        wanted = {column: self.layout.bytes_of(column, size) for column in columns}
        batch = {column: np.empty((len(positions), size), np.uint8) for column, size in wanted.items()}
        for place, position in enumerate(positions):
            data, spans = self._spans(int(position))
            for column, expected in wanted.items():
                source, (start, stop) = data, spans[column]
                if column.startswith(TEXT) and (start == stop or self.layout.sources):
                    which = 0 if captions is None else captions[place]
                    source, (start, stop) = self._text_span(int(position), column, which)
                if column.startswith(TEXT) and text_storage.is_ragged(self.layout.storage):
                    self._spread(int(position), column, source[start:stop], batch[column][place])
                    continue
                if column in self.layout.buckets and (there := self._size_at(data, spans, column)) != size:
                    raise ValueError(
                        f"{self.name}: sample {self.key(int(position))!r}: {column} is in the bucket {there}, but "
                        f"{BUCKETS} has it in {size}: run stage=repair on the folder"
                    )
                if stop - start != expected:
                    raise ValueError(
                        f"{self.name}: sample {self.key(int(position))!r}: {column} has {stop - start} bytes, "
                        f"expected {expected} for {self.layout.shape_of(column, size)} of {self.layout.dtype}"
                    )
                batch[column][place] = source[start:stop]
        return {
            column: torch.from_numpy(values) if len(positions) else torch.empty(values.shape, dtype=torch.uint8)
            for column, values in batch.items()  # an empty array has strides that cannot be viewed
        }

    def _size_at(self, data: npt.NDArray[Any], spans: Mapping[str, tuple[int, int]], column: str) -> Size:
        """The bucket recorded in a sample's own columns."""
        resolution = column[len(IMAGE) :]
        height, width = (int(data[slice(*spans[f"{edge}_{resolution}"])].view(np.int64)[0]) for edge in _EDGES)
        return height, width

    def _spread(self, position: int, column: str, stored: npt.NDArray[Any], target: npt.NDArray[Any]) -> None:
        layout = self.layout
        try:
            text_storage.spread(stored, target, layout.shapes[column], layout.storage, layout.dtype)
        except ValueError as error:
            raise ValueError(f"{self.name}: sample {self.key(position)!r}: {column}: {error}") from None

    def tokens(
        self, positions: Sequence[int], column: str = TEXT, captions: Sequence[int] | None = None
    ) -> npt.NDArray[Any]:
        """Number of stored tokens of each caption: int64 (b,); the full length if padding is stored. ``captions`` as in
        :meth:`read`."""
        layout = self.layout
        length, width = layout.shapes[column]
        if not text_storage.is_ragged(layout.storage):
            return np.full(len(positions), length, np.int64)
        which = captions if captions is not None else [0] * len(positions)
        spans = [self._text_span(int(at), column, number)[1] for at, number in zip(positions, which, strict=True)]
        sizes = [stop - start for start, stop in spans]
        return np.array(sizes, np.int64) // text_storage.token_bytes(width, layout.storage, layout.dtype)

    def size_conditions(self, positions: Sequence[int], column: str) -> Tensor:
        """SDXL's size conditions, int64 (b, 6), in pixels (Podell et al. 2023, section 2.2).

        Height and width of the original image before any resizing, top and left of the crop after resizing, and height
        and width of the crop. Square latents do not record this: their crop is taken as the original.
        """
        resolution = int(column[len(IMAGE) :])
        if column not in self.layout.buckets:
            return torch.tensor([resolution, resolution, 0, 0, resolution, resolution]).repeat(len(positions), 1)
        names = [*ORIGINAL_COLUMNS, "min_side", *(f"{name}_{resolution}" for name in BUCKET_COLUMNS)]
        found = np.empty((len(positions), len(names)), np.int64)
        for place, position in enumerate(positions):
            data, spans = self._spans(int(position))
            found[place] = [data[slice(*spans[name])].view(np.int64)[0] for name in names]
        height, width, shorter = found[:, 0], found[:, 1], found[:, 2]
        short = np.minimum(height, width)
        original = [(edge * shorter + short // 2) // short for edge in (height, width)]
        cut_height, cut_width, top, left = found[:, 3:].T
        return torch.from_numpy(np.stack([*original, top, left, cut_height, cut_width], 1))

    def caption_sources(self, position: int) -> list[str]:
        """The source of each of a sample's captions; ``["original"]`` if text states of only one caption are stored."""
        if not self.layout.sources:
            return [ORIGINAL]
        data, spans = self._spans(position)
        found: list[str] = json.loads(bytes(data[slice(*spans[SOURCES])]))
        return found

    def _text_span(self, position: int, column: str, caption: int = 0) -> tuple[npt.NDArray[Any], tuple[int, int]]:
        """The file with the text states of a sample's caption, and their start and end in it. They may be in the row of
        an earlier sample that this one refers to.

        Raises:
            ValueError: the column's bytes do not match its captions.
        """
        data, spans = self._spans(position)
        start, stop = spans[column]
        if self.layout.sources:
            layout, tokens = self.layout, None
            if text_storage.is_ragged(layout.storage):
                tokens = data[slice(*spans[tokens_column(column)])].view(TOKENS)
            count = len(tokens) if tokens is not None else len(self.caption_sources(position))
            try:
                ends = ends_of(stop - start, tokens, layout.shapes[column], layout.storage, layout.dtype, count)
            except ValueError as error:
                raise ValueError(f"{self.name}: sample {self.key(position)!r}: {column}: {error}") from None
            return data, (start + (int(ends[caption - 1]) if caption else 0), start + int(ends[caption]))
        if start != stop or BACK not in spans:
            return data, (start, stop)
        data, home = self._spans(position - int(data[slice(*spans[BACK])].view(np.int64)[0]))
        return data, home[column]

    def key(self, position: int) -> str:
        data, spans = self._spans(position)
        return bytes(data[slice(*spans["key"])]).decode(errors="replace") if "key" in spans else str(position)

    def _spans(self, position: int) -> tuple[npt.NDArray[Any], dict[str, tuple[int, int]]]:
        """The file that holds the sample, and start and end of each of its columns."""
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

    def _file(self, number: int) -> npt.NDArray[Any]:
        if number not in self._open:
            self._open[number] = self._mapped(number)
            if len(self._open) > _OPEN_FILES:
                self._open.popitem(last=False)
        return self._open[number]

    def _mapped(self, number: int) -> npt.NDArray[Any]:
        """The uncompressed bytes of shard ``number``, memory-mapped: uint8 (n,)."""
        shard = self._shards[number]
        if shard.get("zip_data"):
            raise ConfigError(f"{self.path}: its shards are compressed: read it as file://{self.path.absolute()}")
        path = self.path / str(shard["raw_data"]["basename"])
        try:
            data = np.memmap(path, np.uint8, "r").view(np.ndarray)
        except (OSError, ValueError) as error:  # ValueError: the file is empty
            raise StorageError(f"{path} cannot be read: {error}") from None
        expected = shard["raw_data"].get("bytes", len(data))
        if len(data) != expected:
            raise StorageError(f"{path} has {len(data)} bytes, but index.json says {expected}: copy it again")
        return data

    def column_of(self, image_size: int) -> str:
        """The column of latents for this image size.

        Raises:
            ConfigError: the folder has no such column, or it is not as expected.
        """
        column = f"{IMAGE}{image_size}"
        if column not in self.layout.shapes or column not in self.columns:
            sizes = [name[len(IMAGE) :] for name in self.columns if name.startswith(IMAGE)]
            raise ConfigError(f"image_size={image_size}: {self.name} has {nearest(str(image_size), sizes)}")
        if self.has_manifest:
            self.expected.check(self.name, self.layout, column)
        return column

    def features_column(self, column: str) -> str:
        """The column of image features that belongs to the latents in ``column``.

        Raises:
            ConfigError: there are none.
        """
        found = FEATURES + column[len(IMAGE) :]
        if found not in self.layout.patches:
            raise ConfigError(f"{self.name}: its latents were made without image_features=")
        return found
