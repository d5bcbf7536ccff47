"""The output of stage=texts, joined with the images of the same samples, for stage=precompute."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from pipeline.config.options import shown
from pipeline.config.schema import ConfigError, TextStatesConfig, identity
from pipeline.encoders.base import TextEncoder
from pipeline.latents.text_states import BACK, TextRows, TextStates
from pipeline.partitions.dataset import Dataset, Stored, Unfinished
from pipeline.partitions.planning import last_upstream
from pipeline.samples import Row
from pipeline.samples.captions import SOURCES

STAGE = "texts"
_STATES = ("caption_latents", "caption_pooled")
_MANIFEST = ("text_encoder", "text_encoders", "text_storage", SOURCES)


def images_of(dataset: Dataset) -> Dataset:
    """The dataset with the images of ``dataset``: itself, or the upstream of stage=texts.

    Raises:
        Unfinished: the texts do not cover all current samples.
    """
    if dataset.stage != STAGE:
        return dataset
    known = last_upstream(dataset)
    assert known is not None
    images = Dataset.open(known["path"])
    if images.require_success()["content_digest"] != known["content_digest"]:
        raise Unfinished(
            f"{dataset.root.path} was not made from what {images.root.path} holds now: run stage=texts again first"
        )
    return images


def sources_of(dataset: Dataset, images: Dataset, index: int) -> dict[str, Stored]:
    """The samples that partition ``index`` of ``dataset`` was made from, with their images, by key."""
    number = index if images is dataset else dataset.partition(index).inputs[0].start
    return {sample.key: sample for sample in images.samples(number)}


@dataclass(frozen=True, slots=True)
class WithImage(Stored):
    """A sample of stage=texts joined with the sample that has its image.

    Attributes:
        columns: those read from the texts.
        shared: whether text states may be stored in an earlier row.
        kept: the kept samples of the partition; this one is ``kept[place]``.
    """

    image: Stored
    columns: Collection[str]
    shared: bool
    kept: Sequence[Stored]
    place: int

    def read(self, columns: Collection[str] | None = None) -> Row:
        """Text columns, with shared states from their earlier row; all other columns from the image's sample."""
        texts = [name for name in self.columns if columns is None or name in columns]
        found = Stored.read(self, [*texts, BACK] if self.shared else texts) if texts else {}
        row = self.image.read(None if columns is None else [name for name in columns if name not in self.columns])
        row |= {name: found[name] for name in texts}
        if back := found.get(BACK, 0):
            home = self.kept[self.place - back].read(texts)
            row |= {name: home[name] for name in texts if name.startswith(_STATES)}
        return row


def with_images(texts: Dataset, images: Dataset, index: int) -> Iterator[Stored]:
    """The samples of partition ``index`` of ``texts``, in order, each with its image."""
    sources, columns, shared = sources_of(texts, images, index), columns_of(texts), BACK in texts.schema
    kept: list[Stored] = []
    for stored in texts.samples(index):
        values: dict[str, Any] = {field.name: getattr(stored, field.name) for field in fields(Stored)}
        image, place = sources[stored.key], len(kept)
        yield WithImage(**values, image=image, columns=columns, shared=shared, kept=kept, place=place)
        if stored.file:
            kept.append(stored)


def columns_of(texts: Dataset) -> list[str]:
    """Columns with captions and their states."""
    return [name for name in texts.schema if name not in ("key", BACK)]


class StoredTextStates(TextStates):
    """Text states that stage=texts has computed; nothing is encoded.

    Args:
        config: text settings, which must equal those of the stage that computed the states.
        texts: returns the current output of that stage.
    """

    encodes = False

    def __init__(self, config: TextStatesConfig, texts: Callable[[], Dataset]) -> None:
        self.config = config
        self._upstream = texts

    @property
    def _extra(self) -> dict[str, Any]:
        found: dict[str, Any] = self.upstream.header["extra"]
        return found

    @cached_property
    def encoders(self) -> dict[str, TextEncoder]:
        return {}

    @cached_property
    def pooled(self) -> dict[str, str]:
        return {}

    @cached_property
    def shapes(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = self._extra["shapes"]
        return dict(found)

    @property
    def reads(self) -> tuple[str, ...]:
        return tuple(columns_of(self.upstream))

    def validate(self) -> None:
        """Raises ConfigError if the texts were made with other settings."""
        place, theirs, ours = self.upstream.root.path, self.upstream.header["identity"], identity(self.config)
        for name in _SAME:
            if ours[name] != theirs[name]:
                raise ConfigError(
                    f"{name}={shown(ours[name])}, but {place} was made with {name}={shown(theirs[name])}: give both "
                    f"stages the same, or input={images_of(self.upstream).root.path} to encode captions here"
                )

    def extra(self) -> dict[str, Any]:
        return {name: self._extra[name] for name in _MANIFEST if name in self._extra}

    def rows(self) -> TextRows:
        return _StoredTextRows(self)


_SAME = ("text_encoder", "encode_captions", "pooled", "text_storage", "model_dtype", "save_dtype")


class _StoredTextRows(TextRows):
    def __init__(self, states: StoredTextStates) -> None:
        super().__init__(states)
        self._columns = [name for name in states.reads if name != "caption"]

    def of(self, row: Row) -> tuple[Row, str]:
        return {name: row[name] for name in self._columns}, ""
