"""Decodes images of any size in worker processes, for stages that read images without storing them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from pipeline.imaging.headers import DEFAULT_LIMITS, ImageError, Limits
from pipeline.imaging.transform import Pixels
from pipeline.imaging.worker_pool import DEFAULT_WORKER_LIMITS, Lost, Pool, WorkerLimits
from pipeline.imaging.worker_protocol import SMALL, read_pixels, read_size

Token = TypeVar("Token")
PIXELS, SIZE = "pipeline.imaging.worker_protocol:pixels", "pipeline.imaging.worker_protocol:size"
"""Functions that the workers run."""


class DecoderDied(ImageError):
    """A worker died while decoding an image, or gave an invalid answer; the reason is ``decoder_crash`` or
    ``decoder_timeout``."""


class ImageDecoder:
    """Decodes images in ``workers`` processes, so that no image can harm the calling process.

    Processes start on first use and end with :meth:`close` or when this object is deleted.
    """

    def __init__(
        self, limits: WorkerLimits = DEFAULT_WORKER_LIMITS, *, workers: int = 1, image_limits: Limits = DEFAULT_LIMITS
    ) -> None:
        settings = {"workers": workers, "timeout": limits.timeout, "memory": limits.memory}
        largest = 3 * image_limits.max_pixels + SMALL
        self._pixels = Pool(PIXELS, (image_limits,), read=read_pixels, largest=largest, **settings)  # type: ignore[arg-type]
        self._sizes = Pool(SIZE, (image_limits,), read=read_size, largest=SMALL, **settings)  # type: ignore[arg-type]

    def pixels(
        self, images: Iterable[tuple[Token, bytes | None]], tick: Callable[[], None] = lambda: None
    ) -> Iterator[tuple[Token, Pixels | ImageError | None]]:
        """Yield (token, image) for each (token, file) in order.

        An image is uint8 (h, w, 3), an error if it cannot be decoded, or None without a file. ``tick`` is called
        regularly while waiting.
        """
        return _answers(self._pixels, images, tick)

    def sizes(
        self, images: Iterable[tuple[Token, bytes | None]], tick: Callable[[], None] = lambda: None
    ) -> Iterator[tuple[Token, tuple[int, int] | ImageError | None]]:
        """Like :meth:`pixels`, but yield (height, width) instead of pixels; images are decoded completely."""
        return _answers(self._sizes, images, tick)

    def decode(self, image: bytes) -> Pixels:
        """Decode an image to uint8 (h, w, 3).

        Raises:
            ImageError: the image cannot be decoded.
        """
        found = next(self.pixels([(None, image)]))[1]
        assert found is not None
        if isinstance(found, ImageError):
            raise found
        return found

    def close(self) -> None:
        """Terminate the processes."""
        self._pixels.close()
        self._sizes.close()


def _answers(pool: Pool, images: Iterable[tuple[Token, bytes | None]], tick: Callable[[], None]) -> Iterator[Any]:
    for token, found in pool.map(images, tick):
        yield token, DecoderDied(f"decoder_{found.reason}", found.detail) if isinstance(found, Lost) else found
