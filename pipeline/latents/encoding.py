"""Batches of decoded pictures and captions → the bytes that are stored, on one device.

On a GPU nothing here waits for it: pictures are copied on a stream of their own while the batch before is encoded, and
results are on their way back when :meth:`Encoding.encode` returns; :meth:`Encoded.wait` is for whoever writes them.
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

from pipeline.config import ConfigError
from pipeline.encoders.base import Autoencoder, ImageEncoder, TextEncoder, sampled, sent
from pipeline.latents import text_storage

_TOKENS = 16_384
"""Tokens of captions that are encoded at once."""
_AUTO = (8, 128)
_GAIN = 1.05
Result = TypeVar("Result")
log = logging.getLogger("pipeline")


@dataclass
class Batch:
    """What is encoded at once.

    Attributes:
        pictures: uint8 (h, w, 3) each; those in ``staged`` as (place, height, width).
        staged: uint8 (n, bytes), (pinned) memory that holds pictures, to be copied as a whole.
        noise: by resolution, float32 (b, c, h, w); nothing where latents are no samples.
        captions: to be encoded along with the pictures; not theirs.
        copied: called when ``staged`` may be used again.
    """

    pictures: Sequence[np.ndarray | tuple[int, int, int]]
    staged: Tensor | None = None
    noise: dict[int, Tensor] = field(default_factory=dict)
    captions: Sequence[str] = ()
    copied: Callable[[], None] = lambda: None


@dataclass
class Encoded:
    """Stored bytes on their way to the host; there after :meth:`wait`.

    Attributes:
        columns: by name, uint8 (b, bytes).
        finite: bool (b,), whether all values of the picture's columns are.
        texts: by name, uint8 (captions, bytes), in the order of the captions.
        texts_finite: bool (captions,).
        seconds: that the device was busy with it (a GPU: measured by itself).
    """

    columns: dict[str, Tensor]
    finite: Tensor
    texts: dict[str, Tensor]
    texts_finite: Tensor
    seconds: float = 0.0
    events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None

    def wait(self) -> None:
        if self.events is not None:
            begin, end = self.events
            end.synchronize()
            self.seconds = begin.elapsed_time(end) / 1000


@dataclass
class Encoding:
    """The encoders and how their results are stored.

    Attributes:
        texts: by column.
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
    notes: Counter[str] = field(default_factory=Counter)
    _most: dict[str, int] = field(default_factory=dict)
    _copies: torch.cuda.Stream | None = None

    @torch.inference_mode()
    def encode(self, batch: Batch) -> Encoded:
        """Raises ConfigError where not even one picture fits into the memory."""
        begun = perf_counter()
        events = None
        pictures, noise = self._upload(batch)
        if self.device.type == "cuda":
            events = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            events[0].record()
        texts = {name: self._encode_texts(encoder, batch.captions) for name, encoder in self.texts.items()}
        parts = self._in_parts("pictures", lambda part: self._encode_pictures(pictures, noise, part), len(pictures))
        columns = {name: torch.cat([columns[name] for columns, _ in parts]) for name in parts[0][0]} if parts else {}
        encoded = Encoded(
            {name: self._download(values) for name, values in columns.items()},
            self._download(torch.cat([finite for _, finite in parts])) if parts else torch.ones(0, dtype=torch.bool),
            {name: self._download(packed) for name, (packed, _) in texts.items()},
            self._download(torch.stack([finite for _, finite in texts.values()])),
            perf_counter() - begun,
            events,
        )
        if events is not None:
            events[1].record()
        else:
            batch.copied()
        return encoded

    # ---- to the device and back

    def _upload(self, batch: Batch) -> tuple[list[Tensor], dict[int, Tensor]]:
        """The batch's pictures and noise on the device: all pictures that are staged in one copy."""
        if self.device.type != "cuda":
            return [_view(picture, batch.staged) for picture in batch.pictures], batch.noise
        if self._copies is None:
            self._copies = torch.cuda.Stream(self.device)
        compute = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._copies):
            staged = batch.staged.to(self.device, non_blocking=True) if batch.staged is not None else None
            pictures = [
                _view(picture, staged) if isinstance(picture, tuple) else torch.from_numpy(picture).to(self.device)
                for picture in batch.pictures
            ]
            noise = {name: values.to(self.device, non_blocking=True) for name, values in batch.noise.items()}
            there = torch.cuda.Event()
            there.record()
        compute.wait_event(there)
        for tensor in [*pictures, *noise.values()]:
            tensor.record_stream(compute)
        there.synchronize()  # of the copies alone; the encoders are still at the batch before
        batch.copied()
        return pictures, noise

    def _download(self, values: Tensor) -> Tensor:
        if values.device.type != "cuda":
            return values
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        return host.copy_(values, non_blocking=True)

    # ---- encoding

    def _encode_pictures(
        self, pictures: list[Tensor], noise: dict[int, Tensor], part: slice
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Columns, uint8 (b, bytes), and whether all in them is finite, bool (b,), of a part of the pictures."""
        values: dict[str, Tensor] = {}
        for resolution in self.resolutions:
            x = self.vae.preprocess(pictures[part], resolution)
            if self.moments:
                latents = self.vae.moments(x)
            elif resolution in noise:
                latents = sampled(self.vae.moments(x), noise[resolution][part])
            else:
                latents = self.vae.encode(x)
            values[f"latents_{resolution}"] = latents
        if self.image_encoder is not None:
            values["image_embedding"] = self.image_encoder.encode(self.image_encoder.preprocess(pictures[part]))
        stored = {name: tensor.to(getattr(torch, self.dtype)) for name, tensor in values.items()}
        finite = torch.stack([torch.isfinite(tensor).flatten(1).all(1) for tensor in stored.values()]).all(0)
        return {name: tensor.contiguous().flatten(1).view(torch.uint8) for name, tensor in stored.items()}, finite

    def _encode_texts(self, encoder: TextEncoder, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Packed states, uint8 (b, bytes), and whether they are finite, bool (b,): like lengths together."""
        lengths = encoder.lengths(captions) if captions else []
        order = np.argsort(lengths, kind="stable")
        packed = torch.empty((len(captions), self._packed_bytes(encoder)), dtype=torch.uint8, device=self.device)
        finite = torch.empty(len(captions), dtype=torch.bool, device=self.device)
        for places in _by_tokens(order, lengths):
            chosen = [captions[place] for place in places]

            def encode(part: slice, chosen: list[str] = chosen) -> tuple[Tensor, Tensor]:
                states = encoder.encode(chosen[part])
                stored = (
                    states if text_storage.kind_of(self.storage) != "dense" else states.to(getattr(torch, self.dtype))
                )
                return (
                    text_storage.pack(states, self.storage, self.dtype),
                    torch.isfinite(stored).flatten(1).all(1),
                )

            at = sent(torch.as_tensor(places), self.device)
            parts = self._in_parts("captions", encode, len(chosen))
            packed[at] = torch.cat([values for values, _ in parts])
            finite[at] = torch.cat([good for _, good in parts])
        return packed, finite

    def _packed_bytes(self, encoder: TextEncoder) -> int:
        return text_storage.size_of((encoder.length, encoder.width), self.storage, self.dtype)

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
        except torch.OutOfMemoryError:
            return None

    def find_batch_size(self) -> int:
        """How many pictures at once: doubled while that makes a GPU faster and fits into its memory; 32 on a CPU."""
        if self.device.type != "cuda":
            return 32
        size, best, speed = _AUTO[0], _AUTO[0], 0.0
        while size <= _AUTO[1]:
            now = self._speed(size)
            if now <= speed * _GAIN:
                break
            best, speed, size = size, now, size * 2
        log.info("batch_size=auto: %d", best)
        return best

    @torch.inference_mode()
    def _speed(self, size: int) -> float:
        """Pictures per second of the autoencoder with batches of ``size``, the second time; 0 if they do not fit."""
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
        except torch.OutOfMemoryError:
            return 0.0
        finally:
            x = torch.empty(0)
            torch.cuda.empty_cache()
        return size / seconds


def _view(picture: np.ndarray | tuple[int, int, int], staged: Tensor | None) -> Tensor:
    if isinstance(picture, np.ndarray):
        return torch.from_numpy(picture if picture.flags.writeable else picture.copy())
    place, height, width = picture
    assert staged is not None
    return staged[place, : height * width * 3].view(height, width, 3)


def _by_tokens(order: np.ndarray, lengths: Sequence[int]) -> list[list[int]]:
    """Cut ``order``, by rising length, into parts whose longest caption times their number stays within ``_TOKENS``."""
    parts: list[list[int]] = []
    for place in order.tolist():
        if not parts or (len(parts[-1]) + 1) * lengths[place] > _TOKENS:
            parts.append([])
        parts[-1].append(place)
    return parts
