"""Encodes batches of cropped images and captions into stored bytes, on one device.

On a GPU, nothing here waits for the device: images are copied on a separate stream while the previous batch is encoded,
and :meth:`Encoding.encode` returns while results are still being copied back; :meth:`Encoded.wait` waits for them.
Image batches always have the same shape there, however many images they hold: kernels and compiled graphs are chosen by
shape, so that a sample's bytes do not depend on the size of its batch.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.config.schema import ConfigError
from pipeline.encoders.base import Autoencoder, ImageEncoder, TextEncoder, sampled, sent
from pipeline.encoders.crop import AnyCrop, PatchCrop
from pipeline.imaging.buckets import Buckets, Size
from pipeline.imaging.patches import FEATURES, PatchGrid
from pipeline.latents.image_decoding import Layout, Noise
from pipeline.latents.transfers import Transfers, Transit, out_of_memory
from pipeline.loading import text_storage

_TOKENS = 16_384
"""Maximum number of tokens encoded at once."""
_AUTO = (8, 128)
_GAIN = 1.05
_ELEMENTS = 2**31
"""Tensors must have fewer elements, as some kernels use 32-bit indices."""
Result = TypeVar("Result")
log = logging.getLogger("pipeline")


@dataclass
class Batch:
    """Input that is encoded at once.

    Attributes:
        slots: uint8 (n, bytes), laid out as :attr:`Encoding.slot`; on a GPU pinned, with the same n each time.
        captions: to encode along with the images; not necessarily theirs.
        copied: called when ``slots`` may be overwritten.
        sizes: with buckets, (height, width) of all images of the batch at each resolution; empty: slots hold no images.
    """

    slots: Tensor
    captions: Sequence[str] = ()
    copied: Callable[[], None] = lambda: None
    sizes: tuple[Size, ...] = ()


@dataclass
class Encoded:
    """Encoded bytes that are being copied to the host; valid after :meth:`wait`.

    Attributes:
        columns: name → uint8 (n, bytes).
        finite: bool (n, 2), whether all values of an image's columns are finite, as computed and as stored.
        texts: column → uint8 (captions, bytes), in the order of the captions.
        texts_finite: bool (captions, 2), the same for captions.
        cuts: column → function that removes padding from a caption's packed bytes, if padding is not stored.
    """

    columns: dict[str, Tensor]
    finite: Tensor
    texts: dict[str, Tensor]
    texts_finite: Tensor
    transit: Transit
    cuts: dict[str, Callable[[npt.NDArray[Any], int], npt.NDArray[Any]]] = field(default_factory=dict)

    def text(self, column: str, packed: npt.NDArray[Any], number: int) -> bytes:
        """The bytes to store for caption ``number``, whose row of ``texts[column]`` is ``packed``."""
        cut = self.cuts.get(column)
        return (packed if cut is None else cut(packed, number)).tobytes()

    def wait(self) -> None:
        self.transit.wait()


@dataclass(kw_only=True)
class TextEncoding:
    """Text encoders and how their results are stored.

    Attributes:
        texts: column → encoder.
        dtype: stored dtype.
        pooled: column of an encoder's states → column of its pooled embeddings.
        notes: counts of batches that were halved because memory ran out.
    """

    device: torch.device
    texts: dict[str, TextEncoder]
    storage: str
    dtype: str
    pooled: dict[str, str] = field(default_factory=dict)
    notes: Counter[str] = field(default_factory=Counter)
    _most: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.transfers = Transfers(self.device)

    @torch.inference_mode()
    def encode_captions(self, captions: Sequence[str]) -> Encoded:
        """Encode captions; raises ConfigError if not even one fits into memory."""
        self.transfers.begin()
        return self._encoded({}, torch.ones((0, 2), dtype=torch.bool), captions)

    def _encoded(self, columns: dict[str, Tensor], finite: Tensor, captions: Sequence[str]) -> Encoded:
        """Start the copy to the host of computed image columns and of the text states of ``captions``."""
        transfers = self.transfers
        texts: dict[str, Tensor] = {}
        text_flags = [self._encode_texts(name, captions, texts) for name in self.texts]
        return Encoded(
            {name: transfers.download(values) for name, values in columns.items()},
            transfers.download(finite),
            {name: transfers.download(packed) for name, packed in texts.items()},
            transfers.download(torch.stack(text_flags).all(0)) if text_flags else torch.ones((0, 2), dtype=torch.bool),
            transfers.end(),
            {name: self._cut(name, captions) for name in self.texts if text_storage.is_ragged(self.storage)},
        )

    def _encode_texts(self, name: str, captions: Sequence[str], texts: dict[str, Tensor]) -> Tensor:
        """Put packed states and pooled embeddings, uint8 (b, bytes), into ``texts``; returns which captions are finite,
        bool (b, 2). Captions of similar length are encoded together."""
        encoder, pooled = self.texts[name], self.pooled.get(name)
        lengths = encoder.lengths(captions) if captions else []
        order = np.argsort(lengths, kind="stable")
        texts[name] = self._bytes(len(captions), text_storage.size_of((encoder.length, encoder.width), *self._how))
        if pooled:
            size = encoder.pooled_width * getattr(torch, self.dtype).itemsize
            texts[pooled] = self._bytes(len(captions), size)
        finite = torch.empty((len(captions), 2), dtype=torch.bool, device=self.device)
        for places in _by_tokens(order, lengths):
            chosen = [captions[place] for place in places]

            def encode(part: slice, chosen: list[str] = chosen) -> list[Tensor]:
                if not pooled:
                    return self._packed(encoder.encode(chosen[part]), self.storage)
                states, embedding = encoder.encode_pooled(chosen[part])
                packed, good = self._packed(states, self.storage)
                stored = embedding.to(getattr(torch, self.dtype))
                return [packed, good & flags(embedding, stored), stored.contiguous().view(torch.uint8)]

            at = sent(torch.as_tensor(places), self.device)
            parts = self._in_parts("captions", encode, len(chosen))
            targets = [texts[name], finite, *([texts[pooled]] if pooled else [])]
            for target, values in zip(targets, zip(*parts, strict=True), strict=True):
                target[at] = torch.cat(values)
        return finite

    def _cut(self, name: str, captions: Sequence[str]) -> Callable[[npt.NDArray[Any], int], npt.NDArray[Any]]:
        encoder = self.texts[name]
        tokens = encoder.tokens(captions) if captions else []  # not in the lambda: tokenizers are not thread-safe
        shape = (encoder.length, encoder.width)
        return lambda packed, number: text_storage.cut(packed, tokens[number], shape, *self._how)

    def _packed(self, states: Tensor, storage: str) -> list[Tensor]:
        """Stored bytes of states (b, l, d), uint8 (b, bytes), and whether they are finite, bool (b, 2)."""
        dense = text_storage.kind_of(storage) == "dense"
        stored = states.to(getattr(torch, self.dtype)) if dense else states
        return [text_storage.pack(states, storage, self.dtype), flags(states, stored)]

    @property
    def _how(self) -> tuple[str, str]:
        return self.storage, self.dtype

    def _bytes(self, count: int, size: int) -> Tensor:
        return torch.empty((count, size), dtype=torch.uint8, device=self.device)

    # ---- memory

    def _in_parts(self, what: str, function: Callable[[slice], Result], count: int) -> list[Result]:
        """Apply ``function`` to slices of ``range(count)``: to all at once unless memory has run out, else in parts."""
        parts: list[Result] = []
        at = 0
        while at < count:
            size = min(self._most.get(what, count), count - at)
            part = self._attempt(function, slice(at, at + size))
            if part is not None:
                parts.append(part)
                at += size
            elif size == 1:
                raise ConfigError(f"not even one of the {what} fits into the memory of {self.device}")
            else:
                self._most[what] = size // 2
                self.notes[f"{what} of {size} at once: out of memory"] += 1
                log.warning("out of memory with %d %s at once: continuing with %d", size, what, size // 2)
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
        return parts

    def _attempt(self, function: Callable[[slice], Result], part: slice) -> Result | None:
        try:
            return function(part)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            return None


@dataclass(kw_only=True)
class Encoding(TextEncoding):
    """Image and text encoders and how their results are stored.

    Attributes:
        seed: of the noise with which latents are sampled from their posterior; None: they are not sampled.
        buckets: one for each resolution; empty: images are square.
        crop_seed: keys random crop positions, with buckets.
        patch_encoder: encoder of image features; None: there are none.
        grids: patches of the image features, one for each resolution.
        features_storage: how image features are stored, see :mod:`pipeline.loading.text_storage`.
    """

    vae: Autoencoder
    image_encoder: ImageEncoder | None
    resolutions: Sequence[int]
    moments: bool
    seed: int | None = None
    buckets: Sequence[Buckets] = ()
    crop_seed: int = 0
    patch_encoder: ImageEncoder | None = None
    grids: Sequence[PatchGrid] = ()
    features_storage: str = "dense"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.slot = self._slot()
        self._starts = self.slot.starts
        if self.device.type == "cuda":
            self._most["images"] = self.largest_batch()

    def _slot(self) -> Layout:
        """The layout of a decoded image's slot."""
        buckets: Sequence[Buckets | None] = self.buckets or [None] * len(self.resolutions)
        latents = [self.vae.crop(r, each, self.crop_seed) for r, each in zip(self.resolutions, buckets, strict=True)]
        crops: list[AnyCrop] = [*latents]
        if self.image_encoder is not None:
            crops.append(self.image_encoder.preprocessing.crop(self.image_encoder.resolution))
        if self.patch_encoder is not None:
            mode = self.patch_encoder.preprocessing.mode
            crops += [PatchCrop(crop, grid, mode) for crop, grid in zip(latents, self.grids, strict=True)]
        if self.seed is None:
            return Layout(tuple(crops))
        if not self.buckets:
            return Layout(tuple(crops), tuple(Noise(self.seed, r, self.vae.latent_shape(r)) for r in self.resolutions))
        return Layout(tuple(crops), tuple(self._bucket_noise(buckets, self.seed) for buckets in self.buckets))

    def _bucket_noise(self, buckets: Buckets, seed: int) -> Noise:
        downsample = self.vae.downsample
        shape = (self.vae.channels, buckets.largest // downsample**2)
        return Noise(seed, buckets.resolution, shape, downsample)

    def largest_batch(self) -> int:
        """Largest batch whose activations at the largest resolution have fewer than 2^31 elements."""
        return max(1, (_ELEMENTS - 1) // (self.vae.widest * max(self.resolutions) ** 2))

    @torch.inference_mode()
    def encode(self, batch: Batch) -> Encoded:
        """Encode a batch; raises ConfigError if not even one image fits into memory."""
        transfers, count = self.transfers, len(batch.slots) if batch.sizes or not self.buckets else 0
        (slots,) = transfers.upload([batch.slots], batch.copied)
        transfers.begin()
        parts = self._in_parts("images", lambda part: self._encode_images(slots[part], batch.sizes), count)
        columns = {name: torch.cat([columns[name] for columns, _ in parts]) for name in parts[0][0]} if parts else {}
        finite = torch.cat([finite for _, finite in parts]) if parts else torch.ones((0, 2), dtype=torch.bool)
        encoded = self._encoded(columns, finite, batch.captions)
        if not transfers.on_gpu:
            batch.copied()
        return encoded

    # ---- encoding

    def _encode_images(self, slots: Tensor, sizes: tuple[Size, ...]) -> tuple[dict[str, Tensor], Tensor]:
        """From slots, uint8 (n, bytes): columns, uint8 (n, bytes), and which images are finite, bool (n, 2)."""
        values: dict[str, Tensor] = {}
        sizes = sizes or tuple((resolution, resolution) for resolution in self.resolutions)
        for place, (resolution, size) in enumerate(zip(self.resolutions, sizes, strict=True)):
            x = self.vae.preprocessing.normalise(self._pixels(slots, place, size))
            if self.moments:
                latents = self.vae.moments(x)
            elif self.seed is not None:
                latents = sampled(self.vae.moments(x), self._noise(slots, place, size))
            else:
                latents = self.vae.encode(x)
            values[f"latents_{resolution}"] = latents
        if self.image_encoder is not None:
            edge = self.image_encoder.resolution
            pixels = self._pixels(slots, len(self.resolutions), (edge, edge))
            values["image_embedding"] = self.image_encoder.encode(self.image_encoder.preprocessing.normalise(pixels))
        stored = {name: tensor.to(getattr(torch, self.dtype)) for name, tensor in values.items()}
        columns = {name: tensor.contiguous().flatten(1).view(torch.uint8) for name, tensor in stored.items()}
        finite = [flags(values[name], stored[name]) for name in values]
        if self.patch_encoder is not None:
            first = len(self.slot.crops) - len(self.grids)
            for place, (grid, size) in enumerate(zip(self.grids, sizes, strict=True), first):
                x = self.patch_encoder.preprocessing.normalise(self._pixels(slots, place, grid.pixels(size)))
                features = self.patch_encoder.encode_patches(x)
                columns[f"{FEATURES}{grid.resolution}"], good = self._packed(features, self.features_storage)
                finite.append(good)
        return columns, torch.stack(finite).all(0)

    def _pixels(self, slots: Tensor, place: int, size: Size) -> Tensor:
        """Pixels of crop ``place``, uint8 (n, h, w, 3)."""
        start, (height, width) = self._starts[place], size
        found: Tensor = slots[:, start : start + 3 * height * width].unflatten(1, (height, width, 3))
        return found

    def _noise(self, slots: Tensor, place: int, size: Size) -> Tensor:
        start, shape = self._starts[len(self.slot.crops) + place], self.slot.noises[place].shape_for(size)
        found: Tensor = slots[:, start : start + 4 * math.prod(shape)].view(torch.float32).unflatten(1, shape)
        return found

    # ---- memory

    def find_batch_size(self) -> int:
        """Find a batch size: doubled as long as this makes a GPU faster and fits into its memory; 32 on a CPU."""
        if self.device.type != "cuda":
            return 32
        most = min(_AUTO[1], self.largest_batch())
        size = best = min(_AUTO[0], most)
        speed = 0.0
        while size <= most:
            now = self._speed(size)
            if now <= speed * _GAIN:
                break
            best, speed, size = size, now, size * 2
        log.info("batch_size=auto: %d", best)
        return best

    @torch.inference_mode()
    def _speed(self, size: int) -> float:
        """Images per second of the autoencoder with batches of ``size``, after one warm-up; 0 if memory runs out."""
        largest = max(self.resolutions)
        largest -= largest % self.vae.downsample
        seconds = math.inf
        try:
            x = torch.zeros((size, 3, largest, largest), device=self.device)
            for _ in range(2):
                torch.cuda.synchronize(self.device)
                begin = perf_counter()
                self.vae.moments(x)
                torch.cuda.synchronize(self.device)
                seconds = perf_counter() - begin
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            return 0.0
        finally:
            x = torch.empty(0)
            torch.cuda.empty_cache()
        return size / seconds


def flags(values: Tensor, stored: Tensor) -> Tensor:
    """Whether all values of each row are finite, as computed (b, ...) and as stored: bool (b, 2)."""
    return torch.stack([torch.isfinite(tensor).flatten(1).all(1) for tensor in (values, stored)], 1)


def _by_tokens(order: npt.NDArray[Any], lengths: Sequence[int]) -> list[list[int]]:
    """Split ``order``, sorted by length, into parts whose longest caption times their count is at most ``_TOKENS``."""
    parts: list[list[int]] = []
    for place in order.tolist():
        if not parts or (len(parts[-1]) + 1) * lengths[place] > _TOKENS:
            parts.append([])
        parts[-1].append(place)
    return parts
