"""Storage formats of one's own: by subclassing a converter, with everything else as for our formats."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from formats.conftest import CLASSES, SIZE
from stages.conftest import digests
from torch.utils.data import DataLoader

import pipeline.formats
from pipeline.config.schema import ConfigError
from pipeline.formats import (
    ConverterFixedSize,
    ConverterFlexibleSize,
    FixedFiles,
    FlexibleFiles,
    Reader,
    TarConverter,
    register_format,
)
from pipeline.formats.base import get_format
from pipeline.partitions.dataset import Dataset
from pipeline.partitions.verify import verify


class Npz(FixedFiles):
    name = "npz"
    suffix = ".npz"

    def pack(self, arrays: dict[str, np.ndarray]) -> bytes:
        file = io.BytesIO()
        np.savez(file, **arrays)  # type: ignore[arg-type]
        return file.getvalue()

    def unpack(self, data: bytes) -> dict[str, np.ndarray]:
        with np.load(io.BytesIO(data)) as arrays:
            return dict(arrays)


class NpzConverter(ConverterFixedSize):
    format = Npz()


class JsonLines(FlexibleFiles):
    name = "jsonl"
    suffix = ".jsonl"

    def pack(self, rows: Sequence[dict[str, Any]]) -> bytes:
        lines = (json.dumps({**row, "jpg": row["jpg"].hex()}, sort_keys=True) for row in rows)
        return "\n".join(lines).encode()

    def unpack(self, data: bytes) -> Sequence[dict[str, Any]]:
        rows = map(json.loads, data.decode().splitlines())
        return [{**row, "jpg": bytes.fromhex(row["jpg"])} for row in rows]


class JsonLinesConverter(ConverterFlexibleSize):
    format = JsonLines()


def test_a_format_of_fixed_size_works_like_ours(small_folder: Path, small: dict[str, Path], tmp_path: Path) -> None:
    given = {"images_per_file": 25, "shape": SIZE, "im_mode": "RGB"}
    output = NpzConverter(small_folder, tmp_path / "one", **given).convert()
    assert [path.name for path in output.glob("data/000/00000/arrays*")] == ["arrays.00000.npz"]
    with np.load(next(output.glob("data/000/00000/*.npz"))) as arrays:
        assert arrays["jpg"].shape == (20, *SIZE, 3)
    reader, ours = Reader(output, output="array"), Reader(small["memmap"], output="array")
    assert reader.storage_format == "npz" and reader.classes == list(CLASSES) and len(reader) == 60
    for index in (0, 31, -1):
        assert np.array_equal(reader[index][0], ours[index][0]) and reader[index][1] == ours[index][1]
        assert reader.key(index) == ours.key(index)
    assert sum(len(labels) for _, labels in DataLoader(reader, batch_size=8, num_workers=1)) == 60
    assert list(verify(Dataset.open(output))) == []
    again = NpzConverter(small_folder, tmp_path / "two", num_workers=2, **given).convert()
    assert digests(again) == digests(output)
    tar = TarConverter(output, tmp_path / "tar").convert()
    assert np.array_equal(np.asarray(Reader(tar)[31][0]), ours[31][0])


def test_a_damaged_file_is_found_named_and_repaired(small_folder: Path, tmp_path: Path) -> None:
    converter = NpzConverter(small_folder, tmp_path / "out", images_per_file=25, shape=SIZE, im_mode="RGB")
    output = converter.convert()
    before = digests(output)
    file = next(output.glob("data/000/00001/*.npz"))
    file.write_bytes(file.read_bytes()[:-9] + b"\0" * 9)
    (finding,) = verify(Dataset.open(output))
    assert "arrays.00000.npz" in str(finding) and finding.key
    assert converter.repair() and list(verify(Dataset.open(output))) == []
    assert set(before.values()) <= set(digests(output).values())  # what was damaged is there, too, until stage=gc


def test_a_format_of_flexible_size_works_like_ours(small_folder: Path, tmp_path: Path) -> None:
    output = JsonLinesConverter(small_folder, tmp_path / "out", images_per_file=25).convert()
    reader = Reader(output, output="bytes")
    files = {path.read_bytes() for path in small_folder.glob("*/*")}
    assert {reader[index][0] for index in range(60)} == files and [reader[i][1] for i in (0, 20, 40)] == [0, 1, 2]
    assert list(verify(Dataset.open(output))) == []


class Inverted(ConverterFixedSize):
    """The hooks alone, in one of our formats."""

    def _custom_collate_fn(self, batch: list[Any]) -> list[dict[str, Any]]:
        return [{"image": 255 - image, "label": label} for image, label in batch]

    def _write_data_to_disk(self, writer: Any, number: int, arrays: Mapping[str, np.ndarray], rows: list[Any]) -> Any:
        assert len(rows) <= 4
        return super()._write_data_to_disk(writer, number, arrays, rows)


ITEMS = [(np.full((4, 4, 3), n, np.uint8), n) for n in range(10)]


def test_hooks_work_without_naming_a_format(tmp_path: Path) -> None:
    reader = Reader(Inverted(ITEMS, tmp_path / "out", images_per_file=4).convert(), output="array")
    assert reader.storage_format == "memmap"
    assert [(int(image[0, 0, 0]), label) for image, label in reader] == [(255 - n, n) for n in range(10)]
    flexible = type("Plain", (ConverterFlexibleSize,), {})(ITEMS, tmp_path / "flexible").convert()
    assert Reader(flexible).storage_format == "ipc"


def test_writing_what_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    class Own(ConverterFixedSize):
        def _write_data_to_disk(self, writer: Any, number: int, arrays: Any, rows: Any) -> Any:
            with writer.create(f"mine.{number:05d}.bin") as file:
                file.write(np.ascontiguousarray(arrays["jpg"]).tobytes())
            return [(f"mine.{number:05d}.bin", 0, 1)] * len(rows)

    with pytest.raises(ConfigError, match="Own._write_data_to_disk has written data that format=memmap cannot read"):
        Own(ITEMS, tmp_path / "own").convert()

    class Forgetful(ConverterFixedSize):
        def _write_data_to_disk(self, writer: Any, number: int, arrays: Any, rows: Any) -> Any:
            super()._write_data_to_disk(writer, number, arrays, rows)

    with pytest.raises(ConfigError, match=r"must return a list of \(file, offset, length\), one for each of the 10"):
        Forgetful(ITEMS, tmp_path / "forgetful").convert()


def test_wrong_classes_and_names_are_clear_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for base, format, message in (
        (pipeline.formats.Converter, "memmap", "derive it from ConverterFixedSize or ConverterFlexibleSize"),
        (ConverterFixedSize, "tar", "format=tar: derive the class from ConverterFlexibleSize"),
        (ConverterFlexibleSize, Npz(), "format=npz: derive the class from ConverterFixedSize"),
        (ConverterFixedSize, "mnpz", "format=mnpz: did you mean npz.*entry point of the group latentmill.formats"),
    ):
        with pytest.raises(ConfigError, match=message):
            type("Mine", (base,), {"format": format})(ITEMS, tmp_path / "out")
    for name, message in (
        ("", "expected letters"),
        ("a b", "expected letters"),
        ("tar", "another format of this name"),
    ):
        with pytest.raises(ConfigError, match=message):
            register_format(type("Odd", (JsonLines,), {"name": name})())


def test_installed_packages_bring_formats_by_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    class Brought(JsonLines):
        name = "brought"

    class Point:
        name, value, dist = "brought", "package:Brought", None

        def load(self) -> type:
            return Brought

    monkeypatch.setattr("pipeline.registry._points", lambda group: {"brought": Point()})
    assert isinstance(get_format("brought"), Brought)
    with pytest.raises(ConfigError, match="format=unknown: known: "):
        get_format("unknown")


def test_the_package_lists_its_names() -> None:
    assert set(pipeline.formats.__all__) <= set(dir(pipeline.formats))
    assert all(getattr(pipeline.formats, name) is not None for name in pipeline.formats.__all__)
