"""Images of any size, decoded in worker processes: for stages that read images but store none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from pipeline.imaging.headers import DEFAULT_LIMITS, ImageError, Limits
from pipeline.imaging.transform import Pixels
from pipeline.imaging.worker_pool import DEFAULT_WORKER_LIMITS, Lost, Pool, WorkerLimits
from pipeline.imaging.worker_protocol import SMALL, read_pixels, read_size

Token = TypeVar("Token")
PIXELS, SIZE = "pipeline.imaging.worker_protocol:pixels", "pipeline.imaging.worker_protocol:size"
"""What workers run."""


class DecoderDied(ImageError):
    """A worker died while it decoded an image, or gave an answer that cannot be right; the reason is
    ``decoder_crash`` or ``decoder_timeout``."""


class ImageDecoder:
    """Decodes images in ``workers`` processes, so that no image can harm the process that asks for it.

    Processes start when there is something to decode, and end with :meth:`close`, or with this object.
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
        """(token, image) of each (token, file) in order: uint8 (h, w, 3), or the error why it cannot be decoded; None
        where there is no file. ``tick`` is called now and then while waiting."""
        return _answers(self._pixels, images, tick)

    def sizes(
        self, images: Iterable[tuple[Token, bytes | None]], tick: Callable[[], None] = lambda: None
    ) -> Iterator[tuple[Token, tuple[int, int] | ImageError | None]]:
        """The same with (height, width) instead of the pixels; each image is decoded whole."""
        return _answers(self._sizes, images, tick)

    def decode(self, image: bytes) -> Pixels:
        """uint8 (h, w, 3).

        Raises:
            ImageError: it cannot be decoded.
        """
        found = next(self.pixels([(None, image)]))[1]
        assert found is not None
        if isinstance(found, ImageError):
            raise found
        return found

    def close(self) -> None:
        """End the processes."""
        self._pixels.close()
        self._sizes.close()


def _answers(pool: Pool, images: Iterable[tuple[Token, bytes | None]], tick: Callable[[], None]) -> Iterator[Any]:
    for token, found in pool.map(images, tick):
        yield token, DecoderDied(f"decoder_{found.reason}", found.detail) if isinstance(found, Lost) else found
