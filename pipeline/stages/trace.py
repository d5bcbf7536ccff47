"""Trace a sample through the stages: its source, its outcome and position in each stage, and its image."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.options import Options, default_value, extended, shown
from pipeline.config.schema import STAGES, ConfigError
from pipeline.imaging import transform
from pipeline.imaging.buckets import buckets_in, covering
from pipeline.partitions.dataset import Dataset, Released, SlotReader
from pipeline.samples import Row, SampleError, make_key
from pipeline.samples.captions import sources_of

if TYPE_CHECKING:
    from PIL import Image

_PANEL = 256  # edge of a panel in pixels
_TEXT = 15
_COLUMNS, _INDENT = 80, 4  # of what is printed


@dataclass(frozen=True)
class Station:
    """A sample's newest row in the ledger of one dataset directory."""

    dataset: Dataset
    partition: int
    row: dict[str, Any]

    def facts(self) -> dict[str, Any]:
        """What is known about the sample here, as JSON-serialisable values."""
        dataset, row = self.dataset, self.row
        facts = {
            "folder": str(dataset.root.path),
            "stage": dataset.stage,
            "made_with": dataset.header["identity"],
            "partition": self.partition,
            "outcome": row["outcome"],
        }
        for name in ("reason", "detail", "source", "member", "source_hash"):
            if row[name]:
                facts[name] = row[name]
        for name in ("source_offset", "source_bytes", "width", "height"):
            if row[name] > 0 or (name == "source_offset" and row[name] == 0):
                facts[name] = row[name]
        if row["file"]:
            facts |= {"file": f"{dataset.path_of(self.partition)}/{row['file']}"}
            facts |= {"offset": row["offset"], "length": row["length"]}
            facts |= {"buckets": sizes} if (sizes := self._buckets()) else {}
            if self.partition in dataset.released:
                facts["released"] = True
        if dataset.stage == "recaption" and (sample := self.read()) is not None:
            captions = zip(sources_of(sample), sample["captions"], strict=True)
            facts["captions"] = [f"{source}: {caption}" for source, caption in captions]
        return facts

    def lines(self) -> Iterator[str]:
        """The same for people, with the settings that differ from their defaults."""
        facts = self.facts()
        identity = facts["made_with"]
        cls = extended(STAGES[self.dataset.stage], identity) if self.dataset.stage in STAGES else Options
        defaults = {f.name: default_value(f) for f in dataclasses.fields(cls)}
        chosen = [f"{n}={shown(v)}" for n, v in identity.items() if n not in defaults or shown(v) != shown(defaults[n])]
        rest = len(identity) - len(chosen)
        facts["made_with"] = ", ".join([*chosen, *([f"{rest} settings at their defaults"] if rest else [])])
        yield f"{facts.pop('stage')}: {facts.pop('outcome')} {facts.pop('reason', '')}".rstrip()
        for name, value in facts.items():
            indent = " " * (_INDENT + 14)
            text = f"{' ' * _INDENT}{name:<13} {value}"
            yield from textwrap.wrap(
                text, _COLUMNS, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
            )

    def _buckets(self) -> dict[str, str]:
        """For latents with buckets, the crop at each resolution."""
        found = {}
        for column, buckets in buckets_in(self.dataset.header["extra"]).items():
            source = (self.row["height"], self.row["width"])
            place = buckets.place_of(*source, self.dataset.header["config"]["seed"], self.row["key"])
            if place is not None:
                resized = covering(source, place.size)
                cut = f"{place.size[0]} x {place.size[1]} at row {place.top}, column {place.left}"
                found[column] = f"{cut} of {resized[0]} x {resized[1]}"
        return found

    def read(self) -> Row | None:
        """The stored sample; None if it is not or no longer kept, or if what it points to is gone."""
        kept = {stored.key: stored for stored in SlotReader(self.dataset, self.partition).stored()}
        try:
            return kept[self.row["key"]].read() if self.row["key"] in kept else None
        except (SampleError, Released):
            return None


def stations(datasets: list[Dataset], key: str) -> list[Station]:
    """The datasets that know ``key``, in the order of ``datasets``.

    A ledger row names the upstream's partition, so usually only the last dataset directory of a pipeline is searched.
    """
    found: dict[str, Station] = {}
    by_path = {str(dataset.root.path): dataset for dataset in datasets}
    for dataset in reversed(datasets):
        station = found.get(str(dataset.root.path)) or _search(dataset, key, range(dataset.partitions - 1, -1, -1))
        while station is not None:
            found[str(station.dataset.root.path)] = station
            above = by_path.get(str((station.dataset.header.get("upstream") or {}).get("path")))
            if above is None or str(above.root.path) in found:
                break
            number = station.row["source"].rpartition("/")[2]
            station = _search(above, key, [int(number)] if number.isdigit() else [])
    return [found[path] for path in by_path if path in found]


def _search(dataset: Dataset, key: str, partitions: Any) -> Station | None:
    """The newest row of ``key`` in ``partitions``, which are searched in the order given."""
    for index in partitions:
        if not dataset.root.exists(dataset.path_of(index)):
            continue
        reader = SlotReader(dataset, index)
        if key in set(reader.ledger(["key"])["key"].to_pylist()):
            rows = [row for row in reader.ledger().to_pylist() if row["key"] == key and not row["container"]]
            if rows:
                return Station(dataset, index, rows[0])
    return None


def tell(places: list[Path], key: str, show: str, as_json: bool) -> int:
    """Print the trace of ``key``, and draw it to the file ``show``; returns 1 if no dataset knows the key, else 0.

    Raises:
        ConfigError: the image cannot be written.
    """
    datasets = [Dataset.open(place) for place in places]
    way = stations(datasets, key)
    if not way and make_key(key) != key:  # users often give a file's path
        way = stations(datasets, make_key(key))
    if as_json:
        print(json.dumps([station.facts() for station in way], indent=1))
    else:
        for station in way:
            print("\n".join(station.lines()))
        if not way:
            print(f"no dataset directory in this folder contains {key}")
    if show and way:
        try:
            image_of(way).save(show)
        except (OSError, ValueError) as error:
            raise ConfigError(f"show={show}: cannot be written: {error}") from None
        print(f"image: {show}")
    return 0 if way else 1


# ---- the image


def image_of(way: list[Station]) -> Image.Image:
    """The sample's image at each stage that kept it, side by side, with its caption."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(_TEXT)
    panels = [panel for station in way for panel in _panels(station)]
    margin, line = 12, _TEXT + 4
    canvas = Image.new("RGB", (max(1, len(panels)) * (_PANEL + margin) + margin, _PANEL + 5 * line), "white")
    draw = ImageDraw.Draw(canvas)
    for number, (title, image) in enumerate(panels):
        left = margin + number * (_PANEL + margin)
        draw.text((left, 4), title, "black", font)
        canvas.paste(image, (left, line + 8))
    rows = [row for row in (station.read() for station in way) if row is not None]
    caption = next((str(row["caption"]) for row in reversed(rows) if row.get("caption")), "")
    letters = max(1, (canvas.width - 2 * margin) * 2 // _TEXT)
    for number, text in enumerate(textwrap.wrap(caption, letters)[:3]):
        draw.text((margin, _PANEL + line + 12 + number * line), text, "black", font)
    return canvas


def _panels(station: Station) -> Iterator[tuple[str, Image.Image]]:
    from PIL import Image

    stage = station.dataset.stage
    row = station.read()
    if row is None:
        said = " ".join(filter(None, (station.row["outcome"], station.row["reason"], station.row["detail"])))
        yield f"{stage}: no image", _placard(said if station.row["outcome"] != "kept" else "its data are missing")
        return
    if "jpg" in row:
        try:
            pixels = transform.decode(row["jpg"], transform.probe(row["jpg"], transform.Limits()))
        except transform.ImageError as error:
            yield f"{stage}: not decodable", _placard(str(error))
        else:
            yield _panel(f"{stage}: {pixels.shape[1]} x {pixels.shape[0]}", Image.fromarray(pixels))
    for name in sorted(name for name in row if name.startswith("latents_")):
        yield _panel(f"{name}, decoded", Image.fromarray(_decoded(station.dataset, row, name)))


def _placard(text: str) -> Image.Image:
    """A grey panel with a text that explains why there is no image."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(_TEXT)
    panel = Image.new("RGB", (_PANEL, _PANEL), "#dddddd")
    draw = ImageDraw.Draw(panel)
    for number, line in enumerate(textwrap.wrap(text, _PANEL * 2 // _TEXT - 4)[: _PANEL // (_TEXT + 4) - 1]):
        draw.text((8, 8 + number * (_TEXT + 4)), line, "black", font)
    return panel


def _panel(title: str, image: Image.Image) -> tuple[str, Image.Image]:
    from PIL import Image

    scale = _PANEL / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return title, image.resize(size, Image.Resampling.NEAREST if scale > 2 else Image.Resampling.BICUBIC)


def _decoded(dataset: Dataset, row: Row, name: str) -> Any:
    """Decode a stored latent to an image, uint8 (h, w, 3)."""
    import torch

    from pipeline.encoders.base import autoencoder, to_pixels
    from pipeline.loading.latent_folder import Layout

    layout = Layout.of(dataset.header["extra"])
    raw = torch.frombuffer(bytearray(row[name]), dtype=torch.uint8)[None]
    latent = layout.stored_image(raw, name, layout.size_in(row, name)).float()
    vae = autoencoder(dataset.header["config"]["vae"])
    with torch.inference_mode():
        return to_pixels(vae.decode(latent[:, : vae.channels]))[0]
