"""Text states of captions: which captions are encoded, into which columns, and how these are stored.

stage=precompute encodes captions along with images. stage=texts encodes captions alone, and stage=precompute then
stores their states with the latents (:mod:`pipeline.latents.stored_texts`). Both write the same bytes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.config.schema import ConfigError, TextStatesConfig
from pipeline.encoders.base import TextEncoder, text_encoder
from pipeline.loading.caption_choice import TOKENS, tokens_column
from pipeline.partitions.dataset import Dataset
from pipeline.samples import Row, SampleError, Schema
from pipeline.samples.captions import ORIGINAL, SOURCES, sources_of

if TYPE_CHECKING:
    import torch

    from pipeline.latents.encoding import Encoded

BACK = "caption_back"
WINDOW = 512
"""Rows that are read ahead, so that captions of similar length can be encoded together."""
PER_SAMPLE = 4
"""Assumed number of captions per sample, if all are encoded."""
_REMEMBERED = 2048
"""Captions of a partition whose states are kept for later samples with the same caption."""
_MEASURED = 32
"""Captions that storage is measured on."""


class TextStates:
    """Text states that are computed here.

    Args:
        config: encoders, captions to encode, and storage.
        upstream: returns the current dataset with the captions.
        dtype: of the networks.
    """

    encodes = True
    """Whether captions have to be encoded."""

    def __init__(
        self, config: TextStatesConfig, upstream: Callable[[], Dataset], device: torch.device, dtype: str
    ) -> None:
        self.config = config
        self._upstream = upstream
        self._device, self._dtype = device, dtype

    @property
    def upstream(self) -> Dataset:
        return self._upstream()

    @cached_property
    def encoders(self) -> dict[str, TextEncoder]:
        """Encoders by the column of their states."""
        specs = self.config.text_encoder
        if not specs:
            raise ConfigError("text_encoder=[]: name at least one")
        return {
            f"caption_latents{f'_{number}' if number > 1 else ''}": text_encoder(spec, self._device, self._dtype)
            for number, spec in enumerate(specs, 1)
        }

    @cached_property
    def pooled(self) -> dict[str, str]:
        """Columns of pooled embeddings, by the column of the encoder's states."""
        if not self.config.pooled:
            return {}
        columns = {name: _pooled(name) for name, text in self.encoders.items() if text.pooled_width}
        if not columns:
            raise ConfigError("pooled=true: none of the text encoders has pooled embeddings; CLIPs have")
        return columns

    @cached_property
    def shapes(self) -> dict[str, list[int]]:
        """Shape of each column: (l, d) for states, (d,) for pooled embeddings."""
        shapes = {name: [text.length, text.width] for name, text in self.encoders.items()}
        return shapes | {pooled: [self.encoders[name].pooled_width] for name, pooled in self.pooled.items()}

    @property
    def several(self) -> bool:
        """Whether all captions of a sample are encoded."""
        return bool(self.config.encode_captions == "all")

    @property
    def shared(self) -> bool:
        """Whether a row may refer to states stored in an earlier row."""
        return str(self.config.text_storage).endswith("dedup")

    @property
    def reads(self) -> tuple[str, ...]:
        """Upstream columns to read, if they exist."""
        return ("caption", "captions", SOURCES) if self.several else ("caption",)

    def captions_of(self, row: Row) -> list[str]:
        """The captions of a sample that are encoded."""
        return list(row["captions"]) or [""] if self.several else [row["caption"]]

    @cached_property
    def token_bytes(self) -> dict[str, int]:
        """Bytes per token in each column of states whose padding is not stored."""
        from pipeline.loading import text_storage

        storage, dtype = self.config.text_storage, self.config.save_dtype
        ragged = text_storage.is_ragged(storage)
        shapes = {name: shape for name, shape in self.shapes.items() if ragged and len(shape) == 2}
        return {name: text_storage.token_bytes(shape[1], storage, dtype) for name, shape in shapes.items()}

    def of_several(self) -> Schema:
        """Additional columns if all captions of a sample are encoded."""
        if not self.several:
            return {}
        return {"captions": "json", SOURCES: "json"} | dict.fromkeys(map(tokens_column, self.token_bytes), "bytes")

    def validate(self) -> None:
        """Raises ConfigError for settings that cannot be combined."""
        if self.several and self.shared:
            raise ConfigError(
                f"text_storage={self.config.text_storage}: with encode_captions=all each sample has the states of its "
                "captions itself: leave dedup out"
            )

    def extra(self) -> dict[str, Any]:
        """Facts about text states for the manifest."""
        encoders = {name: text.describe() for name, text in self.encoders.items()}
        extra: dict[str, Any] = {
            "text_encoder": encoders["caption_latents"],
            "text_encoders": encoders,
            "text_storage": self._describe_storage(),
        }
        if self.several:
            extra[SOURCES] = self.upstream.header["extra"].get(SOURCES, [ORIGINAL])
        return extra

    def _describe_storage(self) -> dict[str, Any]:
        """How states are stored, with bytes per caption and rounding error measured on the first captions."""
        from pipeline.loading import text_storage

        storage, dtype = self.config.text_storage, self.config.save_dtype
        said: dict[str, Any] = {"kind": storage}
        for name, text in self.encoders.items():
            said[name] = {"bytes": text_storage.size_of((text.length, text.width), storage, dtype)}
            if text_storage.is_ragged(storage):
                tokens = sum(text.tokens(self.first_captions)) / len(self.first_captions)
                said[name]["bytes"] = round(tokens * text_storage.token_bytes(text.width, storage, dtype))
            if text_storage.kind_of(storage) != "dense":
                states = text.encode(self.first_captions)
                said[name]["cosine_error"] = text_storage.cosine_error(states, storage, dtype)
        return said

    @cached_property
    def first_captions(self) -> list[str]:
        """Up to 32 distinct captions."""
        captions: dict[str, None] = {}
        for stored in islice(self.upstream.samples(0), 8 * _MEASURED):
            try:
                captions[stored.read(("caption",))["caption"]] = None
            except SampleError:
                continue
            if len(captions) == _MEASURED:
                break
        return list(captions) or [""]

    def rows(self) -> TextRows:
        """A builder of the text columns of one partition's rows."""
        return TextRows(self)


def _pooled(column: str) -> str:
    return column.replace("latents", "pooled")


def news(known: OrderedDict[str, None], captions: list[str]) -> tuple[list[str], list[str]]:
    """Those of ``captions`` that are not in ``known``, without repetition, and captions to forget afterwards."""
    new = []
    for caption in captions:
        if caption not in known:
            known[caption] = None
            new.append(caption)
        known.move_to_end(caption)
    forget = [known.popitem(last=False)[0] for _ in range(len(known) - _REMEMBERED)]
    return new, forget


class TextRows:
    """Builds the text columns of a partition's rows; remembers states of captions that may recur, and their rows.

    Attributes:
        captions: number of captions encoded.
    """

    def __init__(self, states: TextStates) -> None:
        self.captions = 0
        self._shared = states.shared
        self._captions_of = states.captions_of
        self._widths = states.token_bytes if states.several else None
        self._states: dict[str, tuple[Row, str]] = {}
        self._stored: dict[str, int] = {}
        self._kept = 0

    def learn(self, captions: Sequence[str], encoded: Encoded) -> None:
        """Add the states of newly encoded ``captions``."""
        self.captions += len(captions)
        flags = encoded.texts_finite.tolist()
        texts = {name: values.numpy() for name, values in encoded.texts.items()}
        for number, caption in enumerate(captions):
            packed = {name: encoded.text(name, values[number], number) for name, values in texts.items()}
            self._states[caption] = (packed, fault_of(*flags[number]))

    def forget(self, captions: Sequence[str]) -> None:
        for caption in captions:
            del self._states[caption]

    def of(self, row: Row) -> tuple[Row, str]:
        """The text columns of the sample ``row``, and what is wrong with its states; empty if nothing."""
        found = [self._states[caption] for caption in self._captions_of(row)]
        fault = next((fault for _, fault in found if fault), "")
        return self._joined(row, [states for states, _ in found]), fault

    def _joined(self, row: Row, states: list[Row]) -> Row:
        """Concatenate the states of a sample's captions."""
        if self._widths is None:
            return states[0]
        joined: Row = {name: b"".join(each[name] for each in states) for name in states[0]}
        for name, width in self._widths.items():
            joined[tokens_column(name)] = np.array([len(each[name]) // width for each in states], TOKENS).tobytes()
        captions = self._captions_of(row)
        known = sources_of(row)
        return joined | {"captions": captions, SOURCES: known if len(known) == len(captions) else [ORIGINAL]}

    def kept(self, row: Row, texts: Row) -> Row:
        """The part of ``texts`` to store with the sample ``row``, which must be the next kept sample."""
        if not self._shared:
            return texts
        back = self._kept - self._stored.setdefault(row["caption"], self._kept)
        self._kept += 1
        return {**(dict.fromkeys(texts, b"") if back else texts), BACK: back}


def fault_of(computed: bool, stored: bool) -> str:
    """The fault of values that are not all finite, as computed or as stored; empty if they are."""
    if not computed:
        return "a latent is NaN or infinite; model_dtype=float32 may help"
    return "" if stored else "a latent is too large for the precision that it is stored in: save_dtype=float32 helps"
