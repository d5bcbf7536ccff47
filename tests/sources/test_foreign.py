"""Folders of others in the storage formats that we write: MDS, Arrow IPC, Parquet and tar, taken as they are."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from stages.conftest import run_stage

from pipeline.config.schema import ConfigError
from pipeline.partitions.dataset import Dataset, RandomAccess

COUNT = 12


def picture(number: int, format: str = "JPEG", size: int = 48) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 255, (size, size + number, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(file, format)
    return file.getvalue()


def write_mds(folder: Path, numbers: Any = range(COUNT), **options: Any) -> Path:
    """As micro_diffusion's convert.py writes it."""
    streaming = pytest.importorskip("streaming")
    columns = {"width": "int32", "height": "int32", "jpg": "jpeg", "caption": "str", **options.pop("more", {})}
    with streaming.MDSWriter(out=str(folder), columns=columns, size_limit=20_000, **options) as writer:
        for n in numbers:
            image = Image.open(io.BytesIO(picture(n)))
            row = {"width": image.width, "height": 48, "jpg": image, "caption": f"caption {n} é"}
            more = {"uid": f"u{n}", "score": n / 4, "png": Image.open(io.BytesIO(picture(n, "PNG"))), "secret": {n}}
            more |= {"raw": Image.open(io.BytesIO(picture(n, "PNG"))), "tags": {"a": n}}
            writer.write({name: {**row, **more}[name] for name in columns})
    return folder


def rows(output: Path) -> list[dict[str, Any]]:
    dataset = Dataset.open(output)
    return RandomAccess(dataset).rows(range(len(dataset)))


def download(folder: Path, output: Path, source: str = "mds", **settings: Any) -> dict[str, Any]:
    return run_stage("download", source=source, input=str(folder), output=str(output), **settings)


# ---- MDS


def test_a_folder_of_mds_is_taken_through_filter_or_straight_to_latents(tmp_path: Path) -> None:
    write_mds(tmp_path / "mds")
    counts = download(tmp_path / "mds", tmp_path / "raw")["counts"]
    assert (counts["in"], counts["kept"], counts["containers"]) == (COUNT, COUNT, 2)
    found = rows(tmp_path / "raw")
    assert [row["caption"] for row in found] == [f"caption {n} é" for n in range(COUNT)]
    assert found[0]["key"] == "shard=2E00000=2Emds/000000000-" and found[0]["format"] == "jpeg"
    assert Image.open(io.BytesIO(found[3]["jpg"])).size == (51, 48)
    download(tmp_path / "mds", tmp_path / "raw")  # the second run finds nothing to do
    fused = {"source": "mds", "input": str(tmp_path / "mds"), "min_image_size": 50}
    kept = run_stage("filter", fuse=True, output=str(tmp_path / "fused"), **fused, workers="0")["counts"]
    assert (kept["in"], kept["dropped"]) == (COUNT, COUNT)  # their smaller edge is 48
    for source, output in (("raw", "latents"), ("filtered", "latents of filtered")):
        if source == "filtered":
            given = {"input": str(tmp_path / "raw"), "min_image_size": 32, "workers": "0"}
            run_stage("filter", output=str(tmp_path / "filtered"), **given)
        given = {"input": str(tmp_path / source), "image_resolutions": (32,)}
        assert run_stage("precompute", output=str(tmp_path / output), **given)["counts"]["kept"] == COUNT


def test_indexes_that_were_not_merged_are_read_as_one(tmp_path: Path) -> None:
    for part in range(3):
        write_mds(tmp_path / "mds" / str(part), range(4 * part, 4 * part + 4))
    assert download(tmp_path / "mds", tmp_path / "raw")["counts"]["kept"] == COUNT
    assert [row["caption"] for row in rows(tmp_path / "raw")] == [f"caption {n} é" for n in range(COUNT)]
    assert rows(tmp_path / "raw")[4]["key"].startswith("1/shard")
    from streaming.base.util import merge_index

    merge_index(str(tmp_path / "mds"))
    assert download(tmp_path / "mds", tmp_path / "merged")["counts"]["kept"] == COUNT


@pytest.mark.parametrize("compression", ["zstd", "gz", "bz2", "br"])
def test_compressed_shards_are_taken(tmp_path: Path, compression: str) -> None:
    write_mds(tmp_path / "mds", compression=compression)
    assert download(tmp_path / "mds", tmp_path / "raw")["counts"]["kept"] == COUNT


def test_columns_of_every_encoding_but_pickles(tmp_path: Path) -> None:
    more = {"uid": "str", "score": "float64", "png": "png", "secret": "pkl", "raw": "pil", "tags": "json"}
    folder = write_mds(tmp_path / "mds", more=more)
    download(folder, tmp_path / "raw", columns=["uid", "score", "tags", "width"])
    assert rows(tmp_path / "raw")[5]["meta"] == {"uid": "u5", "score": 1.25, "tags": {"a": 5}, "width": 53}
    for column in ("png", "raw"):
        download(folder, tmp_path / f"of {column}", image_column=column)
        stored = rows(tmp_path / f"of {column}")[2]
        assert stored["format"] == "png"
        same = Image.open(io.BytesIO(picture(2, "PNG")))
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(stored["jpg"]))), np.asarray(same))
    counts = download(folder, tmp_path / "pickled", columns=["secret"], max_failed_fraction=1)
    assert counts["counts"]["failed"] == COUNT and counts["reasons"] == {"failed:bad_row": COUNT}
    with pytest.raises(Exception, match="no_column"):
        download(folder, tmp_path / "none", image_column="image")


@pytest.mark.parametrize("damage", ["cut", "head", "offsets", "empty", "text"])
def test_a_damaged_shard_fails_by_itself(tmp_path: Path, damage: str) -> None:
    folder = write_mds(tmp_path / "mds")
    shard = folder / "shard.00000.mds"
    data = shard.read_bytes()
    broken = {"cut": data[:-1], "head": b"\xff" * 8 + data[8:], "offsets": data[:4] + bytes(8) + data[12:]}
    shard.write_bytes({**broken, "empty": b"", "text": b"hello, world, this is no shard"}[damage])
    found = download(folder, tmp_path / "raw", max_failed_fraction=1)
    assert 0 < found["counts"]["kept"] < COUNT and found["counts"]["containers_failed"] == 1


def test_what_is_no_folder_of_mds_is_one_clear_error(tmp_path: Path) -> None:
    folder = write_mds(tmp_path / "mds")
    index = json.loads((folder / "index.json").read_text())

    def refused(match: str) -> None:
        with pytest.raises(ConfigError, match=match):
            download(folder, tmp_path / "out")

    (folder / "shard.00001.mds").rename(tmp_path / "hidden")
    refused("1 of 2 shards are not there, such as .shard.00001.mds.")
    for content, message in (
        ("{", "is not an index of MDS shards"),
        ('{"shards": [1]}', "is not an index of MDS shards"),
        (json.dumps({"shards": [{**index["shards"][0], "format": "json"}]}), "its shards are json, not mds"),
    ):
        (folder / "index.json").write_text(content)
        refused(message)
    index["shards"][0]["raw_data"]["basename"] = "../hidden"
    (folder / "index.json").write_text(json.dumps(index))
    refused("names the shard '../hidden', which is not below its folder")
    (folder / "index.json").unlink()
    refused("no index.json in it or below: its writer did not finish")
    shutil.rmtree(folder)
    refused("no such file or folder")


def test_a_changed_shard_is_noticed(tmp_path: Path) -> None:
    folder = write_mds(tmp_path / "mds")
    download(folder, tmp_path / "raw")
    shutil.rmtree(folder)
    write_mds(folder, range(COUNT, 2 * COUNT))
    with pytest.raises(ConfigError, match="shard"):
        download(folder, tmp_path / "raw")


# ---- Arrow IPC, Parquet, tar


def table() -> pa.Table:
    images = [picture(n) for n in range(COUNT)]
    return pa.table({"image": images, "text": [f"text {n}" for n in range(COUNT)], "label": list(range(COUNT))})


@pytest.mark.parametrize("layout", ["file", "stream", "feather"])
def test_arrow_files_of_either_layout_are_taken(tmp_path: Path, layout: str) -> None:
    (tmp_path / "in").mkdir()
    found = table()
    if layout == "feather":
        import pyarrow.feather

        pyarrow.feather.write_feather(found, str(tmp_path / "in/a.feather"))
    else:
        make = pa.ipc.new_file if layout == "file" else pa.ipc.new_stream
        with make(str(tmp_path / "in/a.arrow"), found.schema) as writer:
            writer.write_table(found, max_chunksize=5)
    download(tmp_path / "in", tmp_path / "raw", "ipc", labels=True)
    taken = rows(tmp_path / "raw")
    assert [(row["caption"], row["label"]) for row in taken] == [(f"text {n}", n) for n in range(COUNT)]
    assert [row["jpg"] for row in taken] == [picture(n) for n in range(COUNT)]


def test_what_the_hugging_face_library_saved_is_taken_without_its_caches(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows_ = [{"image": {"bytes": picture(n), "path": f"{n}.jpg"}, "text": f"text {n}"} for n in range(COUNT)]
    datasets.Dataset.from_list(rows_, features=features).save_to_disk(str(tmp_path / "in"))
    (data,) = (tmp_path / "in").glob("data-*.arrow")
    shutil.copy(data, tmp_path / "in/cache-0123456789abcdef.arrow")
    assert download(tmp_path / "in", tmp_path / "raw", "ipc")["counts"]["kept"] == COUNT
    assert [row["caption"] for row in rows(tmp_path / "raw")] == [f"text {n}" for n in range(COUNT)]
    data.unlink()
    with pytest.raises(ConfigError, match="state.json names 1 files that are not there"):
        download(tmp_path / "in", tmp_path / "raw", "ipc")


def test_a_damaged_arrow_file_fails_by_itself(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        with pa.ipc.new_file(str(tmp_path / f"in/{name}.arrow"), table().schema) as writer:
            writer.write_table(table())
    data = (tmp_path / "in/a.arrow").read_bytes()
    (tmp_path / "in/a.arrow").write_bytes(data[: len(data) // 2])
    counts = download(tmp_path / "in", tmp_path / "raw", "ipc", max_failed_fraction=1)["counts"]
    assert (counts["kept"], counts["containers_failed"]) == (COUNT, 1)


def texts(data: bytes, *ends: int) -> pa.Array:
    """Texts that end at these places of ``data``."""
    offsets = np.array([0, *ends], np.int32)
    return pa.Array.from_buffers(pa.string(), len(ends), [None, pa.py_buffer(offsets), pa.py_buffer(data)])


NESTED = {
    "plain": lambda found: found,
    "list": lambda found: pa.ListArray.from_arrays(pa.array(range(len(found) + 1), pa.int32()), found),
    "struct": lambda found: pa.StructArray.from_arrays([found], ["x"]),
    "dictionary": lambda found: pa.DictionaryArray.from_arrays(pa.array(range(len(found)), pa.int8()), found),
}


@pytest.mark.parametrize("nested", NESTED)
def test_texts_that_are_not_utf8_cost_no_file_and_offsets_that_point_nowhere_do(tmp_path: Path, nested: str) -> None:
    """Following such an offset ends the process."""
    (tmp_path / "in").mkdir()
    ends = range(1, COUNT + 1)
    for name, column in (("good", texts(b"a\xff" * COUNT, *ends)), ("wrong", texts(b"a" * COUNT, 1 << 30, *ends[1:]))):
        found = table().append_column("more", NESTED[nested](column))
        with pa.ipc.new_file(str(tmp_path / f"in/{name}.arrow"), found.schema) as writer:
            writer.write_table(found)
    counts = download(tmp_path / "in", tmp_path / "raw", "ipc", max_failed_fraction=1)["counts"]
    assert (counts["kept"], counts["containers_failed"]) == (COUNT, 1)


def test_a_parquet_file_of_this_machine_is_taken(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    pq.write_table(table(), tmp_path / "in/0.parquet")
    assert download(tmp_path / "in", tmp_path / "raw", "parquet")["counts"]["kept"] == COUNT


@pytest.mark.parametrize(("source", "format"), [("mds", "mds"), ("ipc", "ipc"), ("parquet", "parquet")])
def test_dataset_directories_are_the_input_of_stages_not_of_sources(tmp_path: Path, source: str, format: str) -> None:
    write_mds(tmp_path / "mds", range(2))
    download(tmp_path / "mds", tmp_path / "raw")
    run_stage("shard", input=str(tmp_path / "raw"), output=str(tmp_path / format / "ours"), format=format)
    with pytest.raises(ConfigError, match="this is a dataset directory: no source reads it"):
        download(tmp_path / format / "ours", tmp_path / "out", source)
