"""Checks that stored latents match their images and captions, which hashes cannot show.

All rows of a partition are read, and a few (always the same ones) are compared with their sources: decoded latents must
look like the image, and encoding image and caption again must give what is stored. If they do not, the usual mistakes
are tried one by one to find the cause.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from pipeline.encoders.base import (
    Autoencoder,
    ImageEncoder,
    TextEncoder,
    autoencoder,
    patch_encoder,
    posterior_noise,
    sampled,
    text_encoder,
)
from pipeline.encoders.crop import PatchCrop
from pipeline.imaging.buckets import BUCKET_COLUMNS, ORIGINAL_COLUMNS, Runs, Size
from pipeline.imaging.decoder import ImageDecoder
from pipeline.imaging.headers import ImageError
from pipeline.imaging.patches import FEATURES as _FEATURES
from pipeline.latents.stored_texts import images_of, sources_of
from pipeline.loading import text_storage
from pipeline.loading.caption_choice import TOKENS, ends_of, tokens_column
from pipeline.loading.latent_folder import BACK as _BACK
from pipeline.loading.latent_folder import IMAGE as _IMAGE
from pipeline.loading.latent_folder import TEXT as _TEXT
from pipeline.loading.latent_folder import Layout
from pipeline.partitions.dataset import RECORD, Dataset, SlotReader, Stored, Unfinished
from pipeline.partitions.verify import Finding
from pipeline.randomness import Permutation, keyed_seed
from pipeline.samples import Row, SampleError
from pipeline.samples.captions import ORIGINAL, SOURCES
from pipeline.samples.captions import sources_of as caption_sources

_COMPARED = 4  # samples per partition
_COUNTED = 64  # samples per partition that statistics are computed from
_FEWEST = 6  # samples required for statistics: after a retry, a partition may have only one
_OTHERS = 8  # partitions that a partition is compared with
_ERROR = 0.1  # relative root mean square error; bfloat16 alone causes 0.03
_MARGIN = 3.0  # dB by which stored latents may decode worse than fresh ones
_COSINE = 0.02
_MEAN, _SPREAD = 1.0, 3.0  # allowed offset of a partition's mean, in deviations, and allowed ratio of deviations
log = logging.getLogger("pipeline")


def validate(dataset: Dataset, index: int, decoder: ImageDecoder) -> Iterator[Finding]:
    """Yield the problems in the contents of partition ``index`` of a finished dataset of latents.

    If the dataset's input is gone, latents are not compared with their sources. Problems of the dataset as a whole are
    reported with the first partition.

    Args:
        decoder: decodes the images of the input.

    Raises:
        ConfigError: an encoder cannot be loaded.
        StorageError: the partition cannot be read.
    """
    validator = _validator(str(dataset.root.path), dataset.require_success()["content_digest"])
    yield from validator.check(index, decoder)


@lru_cache(maxsize=2)
def _validator(path: str, digest: str) -> Validator:
    return Validator(Dataset.open(path))


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation of each channel of a column, float64 (c,)."""

    mean: npt.NDArray[Any]
    deviation: npt.NDArray[Any]


class Validator:
    """Checks partitions of one dataset, and keeps its encoders loaded."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self.config = dataset.header["config"]
        self.extra = dataset.header["extra"]
        self.layout = Layout.of(self.extra)
        gpu = torch.cuda.is_available()
        self.device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
        self.columns = [name for name in dataset.schema if name.startswith(_IMAGE)]
        self.text_columns = [name for name in dataset.schema if name.startswith(_TEXT)]
        self.feature_columns = [name for name in dataset.schema if name.startswith(_FEATURES)]
        self._statistics: dict[int, dict[str, Statistics]] = {}

    @cached_property
    def vae(self) -> Autoencoder:
        return autoencoder(self.config["vae"], self.device)

    @cached_property
    def patch_encoder(self) -> ImageEncoder:
        """The encoder of image features."""
        return patch_encoder(self.config["image_features"], self.device)

    @cached_property
    def texts(self) -> dict[str, TextEncoder]:
        specs = self.config["text_encoder"]
        return {name: text_encoder(spec, self.device) for name, spec in zip(self.text_columns, specs, strict=True)}

    @cached_property
    def upstream(self) -> Dataset | None:
        """The dataset that the partitions were made from; None if it is gone."""
        path = Path(self.dataset.header["upstream"]["path"])
        if not (path / "plan").is_dir():
            log.warning("%s does not exist: latents are not compared with their sources", path)
            return None
        return Dataset.open(path)

    @cached_property
    def images(self) -> Dataset | None:
        """The samples with images and captions; None if they are gone."""
        if self.upstream is None:
            return None
        try:
            images = images_of(self.upstream)
        except Unfinished as error:
            log.warning("latents are not compared with their sources: %s", error)
            return None
        if images.released:
            log.warning("%s no longer has data: latents are not compared with their sources", images.root.path)
            return None
        return images

    def sources(self, index: int) -> dict[str, Stored]:
        """The samples with images and captions that partition ``index`` was made from, by key."""
        assert self.upstream is not None and self.images is not None
        return sources_of(self.upstream, self.images, self.dataset.partition(index).inputs[0].start)

    @torch.inference_mode()
    def check(self, index: int, decoder: ImageDecoder) -> Iterator[Finding]:
        stored = SlotReader(self.dataset, index).stored()
        if index == 0:
            yield from self._check_encoders()
        sound = True
        runs = Runs(self.layout.buckets)
        ledger = self._sizes_in_ledger(stored) if self.layout.buckets else {}
        for place, row in enumerate(_rows(stored)):
            if self.layout.buckets:
                runs.add(row["original_height"], row["original_width"])
            for what in [*self._bucket_faults(row, ledger), *self._faults(row)]:
                sound = False
                yield Finding(index, what, stored[place].file, stored[place].key)
        if sound and self.layout.buckets and runs.runs != (self.dataset.record(index) or {}).get("buckets"):
            sound = False
            yield Finding(index, "its samples are in other buckets than its record says", RECORD)
        if not sound or not stored:
            return
        if self.layout.sources and self.images is not None:
            yield from self._compare_texts(index, stored)
        yield from self._check_drift(index)
        if self.images is not None and not self._changed_encoders():
            yield from self._compare(index, stored, decoder)

    # ---- every row

    def _sizes_in_ledger(self, stored: Sequence[Stored]) -> dict[str, Size]:
        """Height and width of the source images according to the ledger, by key."""
        if not stored:
            return {}
        table = stored[0].reader.ledger(["key", "height", "width"]).to_pydict()
        return dict(zip(table["key"], zip(table["height"], table["width"], strict=True), strict=True))

    def _bucket_faults(self, row: Row, ledger: dict[str, Size]) -> Iterator[str]:
        """Check that a sample has the bucket and crop position that its image size implies."""
        if not self.layout.buckets:
            return
        height, width = source = tuple(int(row[name]) for name in ORIGINAL_COLUMNS)
        if source != ledger[row["key"]]:
            yield f"its row says that its image has {_size(source)} pixels, its ledger {_size(ledger[row['key']])}"
        for column, buckets in self.layout.buckets.items():
            place = buckets.place_of(height, width, self.config["seed"], row["key"])
            found = [int(row[f"{name}_{buckets.resolution}"]) for name in BUCKET_COLUMNS]
            right = [*place.size, place.top, place.left] if place else []
            if found[:2] != right[:2]:
                where = _size(right[:2]) if right else "no bucket"
                yield (
                    f"{column} is in the bucket {_size(found[:2])}, but an image of {_size(source)} belongs to {where}"
                )
            elif found != right:
                yield f"{column} says that it was cut at {found[2:]} (top, left) of its image, but that is {right[2:]}"

    def _faults(self, row: Row) -> Iterator[str]:
        for column in [*self.columns, *self.feature_columns, *self.text_columns]:
            size = self.layout.size_in(row, column)
            data, expected = row[column], self.layout.bytes_of(column, size)
            if column in self.text_columns and self.layout.sources:
                yield from self._faults_of_several(column, row)
            elif column in self.text_columns and text_storage.is_ragged(self.layout.storage):
                yield from self._ragged_faults(column, row)
            elif len(data) != expected and (data or not row.get(_BACK)):
                yield f"{column} has {len(data)} bytes, expected {expected} for {self.layout.shape_of(column, size)}"
            elif data and not bool(torch.isfinite(self._values(column, data, size)).all()):
                yield f"{column} has values that are NaN or infinite"

    def _parts(self, column: str, row: Row) -> list[bytes]:
        """The bytes of the text states of each of a sample's captions.

        Raises:
            ValueError: the number of bytes does not match the number of captions.
        """
        data, layout = row[column], self.layout
        if not layout.sources:
            return [data]
        tokens = None
        if text_storage.is_ragged(layout.storage):
            tokens = np.frombuffer(row[tokens_column(column)], TOKENS)
        count = len(row["captions"])
        ends = ends_of(len(data), tokens, layout.shapes[column], layout.storage, layout.dtype, count).tolist()
        return [data[start:stop] for start, stop in zip([0, *ends], ends, strict=False)]

    def _faults_of_several(self, column: str, row: Row) -> Iterator[str]:
        try:
            if len(row["captions"]) != len(row[SOURCES]) or row["captions"][0] != (row["caption"] or ""):
                yield "its captions, their sources and its first caption do not match"
                return
            parts = self._parts(column, row)
        except (ValueError, IndexError) as error:
            yield f"{column}: {error}"
            return
        for number, (caption, part) in enumerate(zip(row["captions"], parts, strict=True), 1):
            if text_storage.is_ragged(self.layout.storage):
                faults = self._ragged_faults(column, {column: part, "caption": caption})
            else:
                finite = bool(torch.isfinite(self._values(column, part)).all())
                faults = iter([] if finite else [f"{column} has values that are NaN or infinite"])
            yield from (f"caption {number}: {fault}" for fault in faults)

    def _ragged_faults(self, column: str, row: Row) -> Iterator[str]:
        try:
            values = self._values(column, row[column])
        except ValueError as error:
            yield f"{column}: {error}"
            return
        if not bool(torch.isfinite(values).all()):
            yield f"{column} has values that are NaN or infinite"
        elif not row.get(_BACK):
            width = self.layout.shapes[column][1]
            stored = len(row[column]) // text_storage.token_bytes(width, self.layout.storage, self.layout.dtype)
            expected = self.tokens(column, row["caption"])
            if stored != expected:
                yield f"{column} has {stored} tokens, its caption has {expected}"

    def tokens(self, column: str, caption: str) -> int:
        """Number of tokens that the encoder of ``column`` makes of a caption."""
        return self.texts[column].tokens([caption])[0]

    def _values(self, column: str, data: bytes, size: Size | None = None) -> Tensor:
        """Stored bytes as float32 (channels, h, w) or (n, d), for buckets with ``size`` in pixels, or (l, d).

        Raises:
            ValueError: the bytes are not a whole number of tokens.
        """
        stored = np.frombuffer(data, np.uint8)
        if column in self.text_columns and text_storage.is_ragged(self.layout.storage):
            whole = np.empty(self.layout.bytes_of(column), np.uint8)
            text_storage.spread(stored, whole, self.layout.shapes[column], self.layout.storage, self.layout.dtype)
            stored = whole
        raw = torch.from_numpy(stored.copy())[None]
        if column in self.text_columns:
            return self.layout.text(raw, column)[0].float()
        if column in self.feature_columns:
            return self.layout.image_features(raw, column, size)[0].float()
        return self.layout.stored_image(raw, column, size)[0].float()

    # ---- comparison of partitions

    def _check_drift(self, index: int) -> Iterator[Finding]:
        count = self.dataset.partitions
        others = {count * number // _OTHERS for number in range(_OTHERS)} - {index}
        known = [self._statistics_of(other) for other in sorted(others)]
        for column, own in self._statistics_of(index).items():
            there = [other[column] for other in known if column in other]
            if len(there) < 2:
                continue
            mean = np.median([other.mean for other in there], 0)
            deviation = np.median([other.deviation for other in there], 0) + 1e-6
            off = np.abs(own.mean - mean) / deviation
            spread = np.maximum(own.deviation / deviation, deviation / (own.deviation + 1e-6))
            if off.max() > _MEAN:
                at = int(off.argmax())
                yield Finding(
                    index,
                    f"{column}: channel {at} has mean {own.mean[at]:.3g}, in other partitions {mean[at]:.3g} "
                    f"with deviation {deviation[at]:.3g}",
                )
            elif spread.max() > _SPREAD:
                at = int(spread.argmax())
                yield Finding(
                    index,
                    f"{column}: channel {at} has deviation {own.deviation[at]:.3g}, in other partitions "
                    f"{deviation[at]:.3g}",
                )

    def _statistics_of(self, index: int) -> dict[str, Statistics]:
        if index not in self._statistics:
            stored = SlotReader(self.dataset, index).stored()
            places = _places(len(stored), _COUNTED, index) if len(stored) >= _FEWEST else []
            rows = list(_rows([stored[place] for place in places]))
            measured = {column: self._measured(rows, column) for column in self.columns}
            self._statistics[index] = {column: values for column, values in measured.items() if values is not None}
        return self._statistics[index]

    def _measured(self, rows: Sequence[Row], column: str) -> Statistics | None:
        """Statistics of a column; None if no row has the expected number of bytes."""
        sized = [(row[column], self.layout.size_in(row, column)) for row in rows]
        good = [self._values(column, *one) for one in sized if len(one[0]) == self.layout.bytes_of(column, one[1])]
        if not good:
            return None
        channels = self.layout.image_shape(column)[0]
        flat = torch.cat([values[:channels].flatten(1) for values in good], 1).double().nan_to_num(0, 0, 0)
        return Statistics(flat.mean(1).numpy(), flat.std(1, correction=0).numpy())

    # ---- encoders

    def _changed_encoders(self) -> list[str]:
        said = dict(self.extra["text_encoders"])
        now = {name: text.describe() for name, text in self.texts.items()}
        if self.columns:
            said["vae"], now["vae"] = self.extra["vae"], self.vae.describe()
        if self.feature_columns:
            said["image_features"], now["image_features"] = self.layout.features, self.patch_encoder.describe()
        facts = ("weights_xxh3", "version", "scaling", "shift")
        return [
            f"{name}: {fact} is {now[name].get(fact)}, was {before[fact]}"
            for name, before in said.items()
            for fact in facts
            if fact in before and now[name].get(fact) != before[fact]
        ]

    def _check_encoders(self) -> Iterator[Finding]:
        """Check that the encoders made these latents, and that the autoencoder reconstructs a smooth image."""
        for changed in self._changed_encoders():
            yield Finding(-1, f"cannot be compared with its sources: {changed}")
        if not self.columns:
            return
        edge = min(int(column[len(_IMAGE) :]) for column in self.columns)
        edge -= edge % self.vae.downsample
        x = self.vae.preprocess([_smooth(edge)], edge)
        found = psnr(self.vae.decode(self.vae.encode(x)), x)
        if found < self.vae.floor:
            yield Finding(
                -1,
                f"vae={self.config['vae']} reconstructs a smooth image with {found:.1f} dB, less than "
                f"{self.vae.floor:.0f}: its weights, its scaling or its input are wrong",
            )

    # ---- comparison with sources

    def _compare(self, index: int, stored: Sequence[Stored], decoder: ImageDecoder) -> Iterator[Finding]:
        sources = self.sources(index)
        for place in _places(len(stored), _COMPARED, index):
            sample = stored[place]
            try:
                source = sources[sample.key].read()
            except KeyError:
                yield Finding(index, "its source is not in the input", sample.file, sample.key)
                continue
            except SampleError as error:
                log.warning("%s: its source cannot be read: %s", sample.key, error)
                continue
            row = sample.read()
            neighbours = [stored[other] for other in (place - 1, place + 1) if 0 <= other < len(stored)]
            around = [sources[neighbour.key] for neighbour in neighbours if neighbour.key in sources]
            try:
                found = [
                    *self._compare_caption(row, source, stored, place, neighbours),
                    *self._compare_images(row, source, around, decoder),
                ]
            except ImageError as error:
                found = [f"an image of the input, its own or a neighbour's, does not decode: {error}"]
            for what in found:
                yield Finding(index, what, sample.file, sample.key)

    def _compare_texts(self, index: int, stored: Sequence[Stored]) -> Iterator[Finding]:
        """Check that every sample has the captions of its source, with the same caption sources."""
        assert self.images is not None
        columns = [name for name in ("key", "captions", SOURCES) if name in self.images.schema]
        sources: dict[str, Row] = {}
        for source in self.sources(index).values():
            with suppress(SampleError):  # removed by a takedown, or gone
                sources[source.key] = source.read(columns)
        for sample in stored:
            before = sources.get(sample.key)
            if before is None:
                continue  # reported by `_compare`
            row = sample.read()
            expected = list(zip(before["captions"], caption_sources(before), strict=True)) or [("", ORIGINAL)]
            if list(zip(row["captions"], row[SOURCES], strict=True)) != expected:
                yield Finding(index, "has other captions than its source", sample.file, sample.key)

    def _compare_caption(
        self, row: Row, source: Row, stored: Sequence[Stored], place: int, neighbours: Sequence[Stored]
    ) -> Iterator[str]:
        if row["caption"] != source["caption"]:
            yield f"has the caption {row['caption'][:60]!r}, its source {source['caption'][:60]!r}"
            return
        several = bool(self.layout.sources)
        captions = row["captions"] if several else [row["caption"]]
        home = stored[place - row.get(_BACK, 0)].read()
        around = [(neighbour.key, neighbour.read()) for neighbour in neighbours]
        texts = [(key, other["captions"] if several else [other["caption"]]) for key, other in around]
        others = [(key, text) for key, found in texts for text in found]
        for column, encoder in self.texts.items():
            encoded = encoder.encode([*captions, *(text for _, text in others)]).cpu()
            for number, part in enumerate(self._parts(column, home)):
                states = self._values(column, part)
                if (error := _cosine_error(states, encoded[number])) <= _COSINE:
                    continue
                expected = zip(others, encoded[len(captions) :], strict=True)
                same = [key for (key, _), other in expected if _cosine_error(states, other) <= _COSINE]
                whose = f"those of sample {same[0]}" if same else f"not those of its caption (error {error:.2f})"
                which = f" of caption {number + 1}" if several else ""
                yield f"{column}: text states{which} are {whose}"

    def _compare_images(
        self, row: Row, source: Row, neighbours: Sequence[Stored], decoder: ImageDecoder
    ) -> Iterator[str]:
        if not self.columns:
            return
        pixels = decoder.decode(source["jpg"])
        if self.layout.buckets and pixels.shape[:2] != (row["original_height"], row["original_width"]):
            said = _size((row["original_height"], row["original_width"]))
            yield f"its row says that its image has {said} pixels, it has {_size(pixels.shape[:2])}"
            return
        for column in self.columns:
            resolution = int(column[len(_IMAGE) :])
            size = self.layout.size_in(row, column)
            x = self._cut(pixels, column, row["key"])
            noise = None
            if self.layout.latent == "sample":
                shape = self.layout.image_shape(column, size)
                noise = posterior_noise(self.config["seed"], [row["key"]], resolution, shape)
            expected = self._encoded(x, noise)
            found = self._values(column, row[column], size)[None, : expected.shape[1]].to(expected)
            best = psnr(self.vae.decode(expected), x)
            now = psnr(self.vae.decode(found), x)
            error = _error(found, expected)
            if error <= _ERROR and now >= min(self.vae.floor, best - _MARGIN):
                continue
            inputs = {n.key: self._cut(decoder.decode(n.read()["jpg"]), column, n.key) for n in neighbours}
            others = {key: self._encoded(other, None) for key, other in inputs.items() if other.shape == x.shape}
            reason = self._reason(found, x, noise, expected, others)
            yield (
                f"{column} decodes to its image with {now:.1f} dB instead of {best:.1f}, "
                f"and is off by {error:.0%}: {reason}"
            )
        for column in self.feature_columns:
            yield from self._compare_features(row, column, pixels, neighbours, decoder)

    def _compare_features(
        self,
        row: Row,
        column: str,
        pixels: npt.NDArray[Any],
        neighbours: Sequence[Stored],
        decoder: ImageDecoder,
    ) -> Iterator[str]:
        size = self.layout.size_in(row, column)
        x, encode = self._patches_of(pixels, column, row["key"]), self.patch_encoder.encode_patches
        expected = encode(x)
        found = self._values(column, row[column], size)[None].to(expected)
        error = _error(found, expected)
        if error <= _ERROR:
            return
        inputs = {n.key: self._patches_of(decoder.decode(n.read()["jpg"]), column, n.key) for n in neighbours}
        rows, columns = x.shape[2] // self.patch_encoder.patch, x.shape[3] // self.patch_encoder.patch
        scale = float((found * expected).sum() / expected.square().sum().clamp(min=1e-12))
        mistakes = {
            "red and blue were swapped": encode(x.flip(1)),
            "images were mirrored": encode(x.flip(3)),
            "rows and columns of patches were swapped": expected.unflatten(1, (rows, columns))
            .transpose(1, 2)
            .flatten(1, 2),
            **{
                f"they are those of sample {key}": encode(other)
                for key, other in inputs.items()
                if other.shape == x.shape
            },
            f"wrong scale: they are {scale:.3g} times what they should be": expected * scale,
        }
        yield f"{column} is off by {error:.0%}: {_likeliest(found, expected, mistakes)}"

    def _patches_of(self, pixels: npt.NDArray[Any], column: str, key: str) -> Tensor:
        """An image, uint8 (h, w, 3), as the input of the encoder of image features, (1, 3, h, w)."""
        grid, prepared = self.layout.patches[column], self.patch_encoder.preprocessing
        buckets = self.layout.buckets.get(f"{_IMAGE}{grid.resolution}")
        latents = self.vae.crop(grid.resolution, buckets, self.config["seed"])
        return prepared.of_one(pixels, PatchCrop(latents, grid, prepared.mode), self.device, key)

    def _cut(self, pixels: npt.NDArray[Any], column: str, key: str) -> Tensor:
        """An image, uint8 (h, w, 3), as the autoencoder's input, (1, 3, h, w)."""
        resolution, buckets = int(column[len(_IMAGE) :]), self.layout.buckets.get(column)
        return self.vae.preprocess_for(pixels, resolution, buckets, self.config["seed"], key)

    def _encoded(self, x: Tensor, noise: Tensor | None) -> Tensor:
        return sampled(self.vae.moments(x), noise)

    def _reason(
        self, found: Tensor, x: Tensor, noise: Tensor | None, expected: Tensor, others: dict[str, Tensor]
    ) -> str:
        """The usual mistake that explains ``found``, if one does."""
        mistakes = {
            "images were given in [0, 1] instead of [-1, 1]": self._encoded((x + 1) / 2, noise),
            "red and blue were swapped": self._encoded(x.flip(1), noise),
            "images were mirrored": self._encoded(x.flip(3), noise),
            "height and width were swapped": expected.transpose(2, 3).reshape(expected.shape),
            **{f"they are those of sample {key}": other for key, other in others.items()},
        }
        slope = float((found * expected).sum() / expected.square().sum())
        missing = "the scaling factor is missing" if abs(slope * self.vae.scaling - 1) < _ERROR else "wrong scaling"
        if abs(slope) > 1e-3:
            mistakes[f"{missing}: they are {slope:.3g} times what they should be"] = expected * slope
        shift = float((found - expected).mean())
        if abs(shift) > 1e-3:
            mistakes[f"wrong shift: they are {shift:.3g} more than they should be"] = expected + shift
        nearest = _channel_order(found[0], expected[0])
        mistakes[f"the latents' channels are in the order {nearest}"] = expected[:, nearest]
        return _likeliest(found, expected, mistakes)


def _likeliest(found: Tensor, expected: Tensor, mistakes: Mapping[str, Tensor]) -> str:
    """The one of ``mistakes``, by name with the values it leads to, that explains ``found``."""
    errors = {name: _error(found, wrong) for name, wrong in mistakes.items()}
    likeliest = min(errors, key=errors.__getitem__)
    explained = errors[likeliest] <= _ERROR and errors[likeliest] < 0.5 * _error(found, expected)
    return likeliest if explained else "none of the usual mistakes explains it"


def _size(size: Sequence[int]) -> str:
    return " x ".join(map(str, size))


def _rows(stored: Sequence[Stored]) -> Iterator[Row]:
    for sample in stored:
        yield sample.read()


def _places(count: int, most: int, index: int) -> list[int]:
    """Up to ``most`` positions in a partition of ``count`` samples, the same in every run."""
    order = Permutation(count, keyed_seed(0, "validate", index))
    return sorted(order[place] for place in range(min(most, count)))


def _smooth(edge: int) -> npt.NDArray[Any]:
    """A smooth image, uint8 (edge, edge, 3), with different waves in each colour channel."""
    y, x = np.meshgrid(*[np.linspace(0, 1, edge)] * 2, indexing="ij")
    waves = [np.sin(3 * x + phase) * np.cos(2 * y - phase) for phase in (0.0, 1.0, 2.5)]
    found: npt.NDArray[Any] = (127.5 + 100 * np.stack(waves, -1)).astype(np.uint8)
    return found


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio of images in [-1, 1], in dB."""
    return float(10 * torch.log10(4 / (a - b).square().mean().clamp(min=1e-10)))


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt().clamp(min=1e-6))


def _cosine_error(states: Tensor, expected: Tensor) -> float:
    """Mean of 1 - cosine similarity over tokens, without tokens that are zero in both."""
    there = (states.abs().amax(1) > 0) | (expected.abs().amax(1) > 0)
    if not bool(there.any()):
        return 0.0
    return float((1 - cosine_similarity(states[there], expected[there], dim=1)).mean())


def _channel_order(found: Tensor, expected: Tensor) -> list[int]:
    """For each channel of ``found`` (c, h, w), the most similar channel of ``expected``."""
    distance = (found[:, None] - expected[None]).square().flatten(2).mean(2)
    return [int(at) for at in distance.argmin(1)]
