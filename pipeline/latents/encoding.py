"""Batches of cut images and captions → the bytes that are stored, on one device.

On a GPU nothing here waits for it: images are copied on a stream of their own while the batch before is encoded, and
results are on their way back when :meth:`Encoding.encode` returns; :meth:`Encoded.wait` is for whoever writes them.
Batches of images have always the same shape there, whatever their number: kernels and compiled graphs are chosen by
shape, so that a sample's bytes do not depend on how many others came with it.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from pipeline.config.schema import ConfigError
from pipeline.encoders.base import Autoencoder, ImageEncoder, TextEncoder, sampled, sent
from pipeline.latents.decoding import Layout, Noise
from pipeline.latents.transfers import Transfers, Transit, out_of_memory
from pipeline.loading import text_storage

_TOKENS = 16_384
"""Tokens of captions that are encoded at once."""
_AUTO = (8, 128)
_GAIN = 1.05
_ELEMENTS = 2**31
"""Kernels of 32-bit indices hold fewer elements in a tensor."""
Result = TypeVar("Result")
log = logging.getLogger("pipeline")


@dataclass
class Batch:
    """What is encoded at once.

    Attributes:
        slots: uint8 (n, bytes), as :attr:`Encoding.slot` says; on a GPU pinned, of the same n each time.
        captions: to be encoded along with the images; not theirs.
        copied: called when ``slots`` may be used again.
    """

    slots: Tensor
    captions: Sequence[str] = ()
    copied: Callable[[], None] = lambda: None


@dataclass
class Encoded:
    """Stored bytes on their way to the host; there after :meth:`wait`.

    Attributes:
        columns: by name, uint8 (n, bytes).
        finite: bool (n, 2), whether all values of the image's columns are: as computed, and as stored.
        texts: by column, uint8 (captions, bytes), in the order of the captions.
        texts_finite: bool (captions, 2).
    """

    columns: dict[str, Tensor]
    finite: Tensor
    texts: dict[str, Tensor]
    texts_finite: Tensor
    transit: Transit

    def wait(self) -> None:
        self.transit.wait()


@dataclass
class Encoding:
    """The encoders and how their results are stored.

    Attributes:
        texts: by column.
        seed: of the noise that makes latents samples of their posterior; None: they are none.
        pooled: columns of pooled text embeddings, by the column of the encoder's states.
        dtype: of what is stored.
        notes: counts of batches that had to be halved because the memory did not suffice.
    """

    device: torch.device
    vae: Autoencoder
    texts: dict[str, TextEncoder]
    image_encoder: ImageEncoder | None
    resolutions: Sequence[int]
    moments: bool
    storage: str
    dtype: str
    seed: int | None = None
    pooled: dict[str, str] = field(default_factory=dict)
    notes: Counter[str] = field(default_factory=Counter)
    _most: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.transfers = Transfers(self.device)
        self.slot = self._slot()
        self._starts = self.slot.starts
        if self.device.type == "cuda":
            self._most["images"] = self.largest_batch()

    def _slot(self) -> Layout:
        """What decoding leaves in an image's slot."""
        crops = [self.vae.preprocessing.crop(resolution) for resolution in self.resolutions]
        if self.image_encoder is not None:
            crops.append(self.image_encoder.preprocessing.crop(self.image_encoder.resolution))
        if self.seed is None:
            return Layout(tuple(crops))
        return Layout(tuple(crops), tuple(Noise(self.seed, r, self.vae.latent_shape(r)) for r in self.resolutions))

    def largest_batch(self) -> int:
        """Images whose activations at the largest resolution have fewer than 2^31 elements."""
        return max(1, (_ELEMENTS - 1) // (self.vae.widest * max(self.resolutions) ** 2))

    @torch.inference_mode()
    def encode(self, batch: Batch) -> Encoded:
        """Raises ConfigError where not even one image fits into the memory."""
        transfers, count = self.transfers, len(batch.slots)
        (slots,) = transfers.upload([batch.slots], batch.copied)
        transfers.begin()
        texts: dict[str, Tensor] = {}
        text_flags = [self._encode_texts(name, batch.captions, texts) for name in self.texts]
        parts = self._in_parts("images", lambda part: self._encode_images(slots[part]), count)
        columns = {name: torch.cat([columns[name] for columns, _ in parts]) for name in parts[0][0]} if parts else {}
        finite = torch.cat([finite for _, finite in parts]) if parts else torch.ones((0, 2), dtype=torch.bool)
        encoded = Encoded(
            {name: transfers.download(values) for name, values in columns.items()},
            transfers.download(finite),
            {name: transfers.download(packed) for name, packed in texts.items()},
            transfers.download(torch.stack(text_flags).all(0)) if text_flags else torch.ones((0, 2), dtype=torch.bool),
            transfers.end(),
        )
        if not transfers.on_gpu:
            batch.copied()
        return encoded

    # ---- encoding

    def _encode_images(self, slots: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Columns, uint8 (n, bytes), and which images are finite, bool (n, 2), of slots, uint8 (n, bytes)."""
        values: dict[str, Tensor] = {}
        for place, resolution in enumerate(self.resolutions):
            x = self.vae.preprocessing.normalise(self._pixels(slots, place))
            if self.moments:
                latents = self.vae.moments(x)
            elif self.seed is not None:
                latents = sampled(self.vae.moments(x), self._noise(slots, place))
            else:
                latents = self.vae.encode(x)
            values[f"latents_{resolution}"] = latents
        if self.image_encoder is not None:
            pixels = self._pixels(slots, len(self.resolutions))
            values["image_embedding"] = self.image_encoder.encode(self.image_encoder.preprocessing.normalise(pixels))
        stored = {name: tensor.to(getattr(torch, self.dtype)) for name, tensor in values.items()}
        finite = torch.stack([flags(values[name], stored[name]) for name in values]).all(0)
        return {name: tensor.contiguous().flatten(1).view(torch.uint8) for name, tensor in stored.items()}, finite

    def _pixels(self, slots: Tensor, place: int) -> Tensor:
        """uint8 (n, edge, edge, 3)."""
        crop, start = self.slot.crops[place], self._starts[place]
        return slots[:, start : start + crop.bytes].unflatten(1, (crop.edge, crop.edge, 3))

    def _noise(self, slots: Tensor, place: int) -> Tensor:
        noise, start = self.slot.noises[place], self._starts[len(self.slot.crops) + place]
        return slots[:, start : start + noise.bytes].view(torch.float32).unflatten(1, noise.shape)

    def _encode_texts(self, name: str, captions: Sequence[str], texts: dict[str, Tensor]) -> Tensor:
        """Put packed states (and what is pooled), uint8 (b, bytes), into ``texts``; which captions are finite, bool
        (b, 2). Captions of like lengths are encoded together."""
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
                    return self._packed(encoder.encode(chosen[part]))
                states, embedding = encoder.encode_pooled(chosen[part])
                packed, good = self._packed(states)
                stored = embedding.to(getattr(torch, self.dtype))
                return [packed, good & flags(embedding, stored), stored.contiguous().view(torch.uint8)]

            at = sent(torch.as_tensor(places), self.device)
            parts = self._in_parts("captions", encode, len(chosen))
            targets = [texts[name], finite, *([texts[pooled]] if pooled else [])]
            for target, values in zip(targets, zip(*parts, strict=True), strict=True):
                target[at] = torch.cat(values)
        return finite

    def _packed(self, states: Tensor) -> list[Tensor]:
        """Stored bytes of states (b, l, d), uint8 (b, bytes), and which are finite, bool (b, 2)."""
        dense = text_storage.kind_of(self.storage) == "dense"
        stored = states.to(getattr(torch, self.dtype)) if dense else states
        return [text_storage.pack(states, *self._how), flags(states, stored)]

    @property
    def _how(self) -> tuple[str, str]:
        return self.storage, self.dtype

    def _bytes(self, count: int, size: int) -> Tensor:
        return torch.empty((count, size), dtype=torch.uint8, device=self.device)

    # ---- memory

    def _in_parts(self, what: str, function: Callable[[slice], Result], count: int) -> list[Result]:
        """``function`` of parts of ``range(count)``: of all at once, unless the memory did not suffice before."""
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
                log.warning("out of memory with %d %s at once: going on with %d", size, what, size // 2)
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

    def find_batch_size(self) -> int:
        """How many images at once: doubled while that makes a GPU faster and fits into its memory; 32 on a CPU."""
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
        """Images per second of the autoencoder with batches of ``size``, the second time; 0 if they do not fit."""
        largest = max(self.resolutions)
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
    """bool (b, 2): whether all of each row is finite, as computed (b, ...) and as stored."""
    return torch.stack([torch.isfinite(tensor).flatten(1).all(1) for tensor in (values, stored)], 1)


def _by_tokens(order: np.ndarray, lengths: Sequence[int]) -> list[list[int]]:
    """Cut ``order``, by rising length, into parts whose longest caption times their number stays within ``_TOKENS``."""
    parts: list[list[int]] = []
    for place in order.tolist():
        if not parts or (len(parts[-1]) + 1) * lengths[place] > _TOKENS:
            parts.append([])
        parts[-1].append(place)
    return parts
