"""Do stored latents say what their pictures and captions say? What hashes cannot tell.

Of each partition all rows are read, and a few (always the same ones) compared with their sources: decoded, they must
look like the picture; encoded again, picture and caption must give what is stored. Where they do not, the usual
mistakes are tried one by one, to say which it was.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from pipeline.encoders.base import Autoencoder, TextEncoder, autoencoder, posterior_noise, sampled, text_encoder
from pipeline.imaging import transform
from pipeline.loading.latent_folder import BACK as _BACK
from pipeline.loading.latent_folder import IMAGE as _IMAGE
from pipeline.loading.latent_folder import TEXT as _TEXT
from pipeline.loading.latent_folder import Layout
from pipeline.partitions.dataset import Dataset, Stored
from pipeline.partitions.verify import Finding
from pipeline.randomness import Permutation, keyed_seed
from pipeline.samples import Row, SampleError

_COMPARED = 4  # samples of a partition
_COUNTED = 64  # samples that a partition's statistics are of
_OTHERS = 8  # partitions that another is compared with
_ERROR = 0.1  # relative, root mean square; bfloat16 costs 0.03
_MARGIN = 3.0  # dB that stored latents may decode worse than fresh ones
_COSINE = 0.02
_MEAN, _SPREAD = 1.0, 3.0  # deviations that a partition's mean may be off, and factor of its deviation
log = logging.getLogger("pipeline")


def validate(dataset: Dataset, index: int) -> Iterator[Finding]:
    """What is wrong inside partition ``index`` of a finished dataset of latents.

    Without its input, latents are checked for themselves alone. What concerns the whole dataset is said with the
    first partition.

    Raises:
        ConfigError: an encoder cannot be loaded.
        StorageError: the partition cannot be read.
    """
    validator = _validator(str(dataset.root.path), dataset.require_success()["content_digest"])
    yield from validator.check(index)


@lru_cache(maxsize=2)
def _validator(path: str, digest: str) -> Validator:
    return Validator(Dataset.open(path))


@dataclass(frozen=True)
class Statistics:
    """Mean and deviation of each channel of a column, float64 (c,)."""

    mean: np.ndarray
    deviation: np.ndarray


class Validator:
    """Checks partitions of one dataset; keeps its encoders."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self.config = dataset.header["config"]
        self.extra = dataset.header["extra"]
        self.layout = Layout.of(self.extra)
        gpu = torch.cuda.is_available()
        self.device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
        self.columns = [name for name in dataset.schema if name.startswith(_IMAGE)]
        self.text_columns = [name for name in dataset.schema if name.startswith(_TEXT)]
        self._statistics: dict[int, dict[str, Statistics]] = {}

    @cached_property
    def vae(self) -> Autoencoder:
        return autoencoder(self.config["vae"], self.device)

    @cached_property
    def texts(self) -> dict[str, TextEncoder]:
        specs = self.config["text_encoder"]
        return {name: text_encoder(spec, self.device) for name, spec in zip(self.text_columns, specs, strict=True)}

    @cached_property
    def upstream(self) -> Dataset | None:
        path = Path(self.dataset.header["upstream"]["path"])
        if not (path / "plan").is_dir():
            log.warning("%s is not there: latents are not compared with their sources", path)
            return None
        upstream = Dataset.open(path)
        if upstream.released:
            log.warning("%s has no data any more: latents are not compared with their sources", path)
            return None
        return upstream

    @torch.inference_mode()
    def check(self, index: int) -> Iterator[Finding]:
        stored = list(self.dataset.samples(index))
        if index == 0:
            yield from self._check_encoders()
        sound = True
        for place, row in enumerate(_rows(stored)):
            for what in self._faults(row):
                sound = False
                yield Finding(index, what, stored[place].file, stored[place].key)
        if not sound or not stored:
            return
        yield from self._check_drift(index)
        if self.upstream is not None and not self._changed_encoders():
            yield from self._compare(index, stored)

    # ---- every row

    def _faults(self, row: Row) -> Iterator[str]:
        for column in [*self.columns, *self.text_columns]:
            data, expected = row[column], self.layout.bytes_of(column)
            if len(data) != expected and (data or not row.get(_BACK)):
                yield f"{column} has {len(data)} bytes, expected {expected} for {self.layout.shapes[column]}"
            elif data and not bool(torch.isfinite(self._values(column, data)).all()):
                yield f"{column} has values that are NaN or infinite"

    def _values(self, column: str, data: bytes) -> Tensor:
        """Stored bytes as float32 (channels, h, w) or (l, d)."""
        raw = torch.from_numpy(np.frombuffer(data, np.uint8).copy())[None]
        if column in self.text_columns:
            return self.layout.text(raw, column)[0].float()
        return raw.view(getattr(torch, self.layout.dtype)).reshape(self.layout.shapes[column]).float()

    # ---- partitions among each other

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
            stored = list(self.dataset.samples(index))
            rows = list(_rows([stored[place] for place in _places(len(stored), _COUNTED, index)]))
            measured = {column: self._measured(rows, column) for column in self.columns}
            self._statistics[index] = {column: values for column, values in measured.items() if values is not None}
        return self._statistics[index]

    def _measured(self, rows: Sequence[Row], column: str) -> Statistics | None:
        """None where no row has as many bytes as it should."""
        expected = self.layout.bytes_of(column)
        good = [self._values(column, row[column]) for row in rows if len(row[column]) == expected]
        if not good:
            return None
        values = torch.stack(good)
        channels = values[:, : self.layout.image_shape(column)[0]].double().nan_to_num(0, 0, 0)
        flat = channels.transpose(0, 1).flatten(1)
        return Statistics(flat.mean(1).numpy(), flat.std(1, correction=0).numpy())

    # ---- encoders

    def _changed_encoders(self) -> list[str]:
        said = {"vae": self.extra["vae"], **self.extra["text_encoders"]}
        now = {"vae": self.vae.describe(), **{name: text.describe() for name, text in self.texts.items()}}
        facts = ("weights_xxh3", "version", "scaling", "shift")
        return [
            f"{name}: {fact} is {now[name].get(fact)}, was {before[fact]}"
            for name, before in said.items()
            for fact in facts
            if fact in before and now[name].get(fact) != before[fact]
        ]

    def _check_encoders(self) -> Iterator[Finding]:
        """Are they those that made the latents, and does the autoencoder bring back what it is given?"""
        for changed in self._changed_encoders():
            yield Finding(-1, f"cannot be compared with its sources: {changed}")
        edge = min(int(column[len(_IMAGE) :]) for column in self.columns)
        x = self.vae.preprocess([_smooth(edge)], edge)
        found = psnr(self.vae.decode(self.vae.encode(x)), x)
        if found < self.vae.floor:
            yield Finding(
                -1,
                f"vae={self.config['vae']} brings back a smooth picture with {found:.1f} dB, less than "
                f"{self.vae.floor:.0f}: its weights, its scaling or its input are wrong",
            )

    # ---- a few samples and their sources

    def _compare(self, index: int, stored: Sequence[Stored]) -> Iterator[Finding]:
        assert self.upstream is not None
        sources = {
            sample.key: sample for sample in self.upstream.samples(self.dataset.partition(index).inputs[0].start)
        }
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
            for what in (
                *self._compare_caption(row, source, stored, place, neighbours),
                *self._compare_pictures(row, source, [sources[n.key] for n in neighbours if n.key in sources]),
            ):
                yield Finding(index, what, sample.file, sample.key)

    def _compare_caption(
        self, row: Row, source: Row, stored: Sequence[Stored], place: int, neighbours: Sequence[Stored]
    ) -> Iterator[str]:
        if row["caption"] != source["caption"]:
            yield f"has the caption {row['caption'][:60]!r}, its source {source['caption'][:60]!r}"
            return
        home = stored[place - row.get(_BACK, 0)].read()
        others = {neighbour.key: neighbour.read()["caption"] for neighbour in neighbours}
        for column, encoder in self.texts.items():
            states = self._values(column, home[column])
            expected = encoder.encode([row["caption"], *others.values()]).cpu()
            errors = [_cosine_error(states, other) for other in expected]
            if errors[0] > _COSINE:
                same = [key for key, error in zip(others, errors[1:], strict=True) if error <= _COSINE]
                whose = f"those of sample {same[0]}" if same else f"not those of its caption (error {errors[0]:.2f})"
                yield f"{column}: text states are {whose}"

    def _compare_pictures(self, row: Row, source: Row, neighbours: Sequence[Stored]) -> Iterator[str]:
        for column in self.columns:
            resolution = int(column[len(_IMAGE) :])
            x = self._input(source, resolution)
            noise = None
            if self.layout.latent == "sample":
                shape = tuple(self.layout.shapes[column])
                noise = posterior_noise(self.config["seed"], [row["key"]], resolution, shape)  # type: ignore[arg-type]
            expected = self._encoded(x, noise)
            found = self._values(column, row[column])[None, : expected.shape[1]].to(expected)
            best = psnr(self.vae.decode(expected), x)
            now = psnr(self.vae.decode(found), x)
            error = _error(found, expected)
            if error <= _ERROR and now >= min(self.vae.floor, best - _MARGIN):
                continue
            others = {n.key: self._encoded(self._input(n.read(), resolution), None) for n in neighbours}
            reason = self._reason(found, x, noise, expected, others)
            yield (
                f"{column} decodes to its picture with {now:.1f} dB instead of {best:.1f}, "
                f"and is off by {error:.0%}: {reason}"
            )

    def _input(self, source: Row, resolution: int) -> Tensor:
        """The source's image as the encoder takes it, decoded as the stage does it."""
        header = transform.probe(source["jpg"], transform.Limits())
        return self.vae.preprocess([transform.decode_fast(source["jpg"], header)], resolution)

    def _encoded(self, x: Tensor, noise: Tensor | None) -> Tensor:
        return sampled(self.vae.moments(x), noise)

    def _reason(
        self, found: Tensor, x: Tensor, noise: Tensor | None, expected: Tensor, others: dict[str, Tensor]
    ) -> str:
        """Which of the usual mistakes explains ``found``."""
        mistakes = {
            "pictures went in in [0, 1] instead of [-1, 1]": self._encoded((x + 1) / 2, noise),
            "red and blue were swapped": self._encoded(x.flip(1), noise),
            "pictures were turned over": self._encoded(x.flip(3), noise),
            **{f"they are those of sample {key}": other for key, other in others.items()},
        }
        slope = float((found * expected).sum() / expected.square().sum())
        missing = "the scaling factor is missing" if abs(slope * self.vae.scaling - 1) < _ERROR else "wrong scaling"
        if abs(slope) > 1e-3:
            mistakes[f"{missing}: they are {slope:.3g} times what they should be"] = expected * slope
        nearest = _channel_order(found[0], expected[0])
        mistakes[f"the latents' channels are in the order {nearest}"] = expected[:, nearest]
        errors = {name: _error(found, wrong) for name, wrong in mistakes.items()}
        likeliest = min(errors, key=errors.__getitem__)
        explained = errors[likeliest] <= _ERROR and errors[likeliest] < 0.5 * _error(found, expected)
        return likeliest if explained else "none of the usual mistakes explains it"


def _rows(stored: Sequence[Stored]) -> Iterator[Row]:
    for sample in stored:
        yield sample.read()


def _places(count: int, most: int, index: int) -> list[int]:
    """Up to ``most`` places in a partition of ``count`` samples: the same in every run."""
    order = Permutation(count, keyed_seed(0, "validate", index))
    return sorted(order[place] for place in range(min(most, count)))


def _smooth(edge: int) -> np.ndarray:
    """A picture uint8 (edge, edge, 3) of slow waves, different in each colour."""
    y, x = np.meshgrid(*[np.linspace(0, 1, edge)] * 2, indexing="ij")
    waves = [np.sin(3 * x + phase) * np.cos(2 * y - phase) for phase in (0.0, 1.0, 2.5)]
    return (127.5 + 100 * np.stack(waves, -1)).astype(np.uint8)


def psnr(a: Tensor, b: Tensor) -> float:
    """Of pictures in [-1, 1], in dB."""
    return float(10 * torch.log10(4 / (a - b).square().mean().clamp(min=1e-10)))


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt().clamp(min=1e-6))


def _cosine_error(states: Tensor, expected: Tensor) -> float:
    """Mean over tokens of 1 - cosine; tokens that are zero in both agree."""
    there = (states.abs().amax(1) > 0) | (expected.abs().amax(1) > 0)
    if not bool(there.any()):
        return 0.0
    return float((1 - cosine_similarity(states[there], expected[there], dim=1)).mean())


def _channel_order(found: Tensor, expected: Tensor) -> list[int]:
    """For each channel of ``found`` (c, h, w), the channel of ``expected`` that it is like most."""
    distance = (found[:, None] - expected[None]).square().flatten(2).mean(2)
    return [int(at) for at in distance.argmin(1)]
